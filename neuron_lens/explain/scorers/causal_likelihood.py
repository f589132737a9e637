"""Causal scoring by likelihood: is the explanation likelier after what the model writes with the unit steered?

Intervention scoring of Paulo et al. (2024), "Automatically interpreting millions of features in large language models":
over texts x, with g(x) what the model writes after x by itself and g_u(x) what it writes with the unit u steered, the
mean of

    log p(explanation | x, g_u(x)) - log p(explanation | x, g(x))

under a judge that reports log-probabilities of a prompt, by the token of the explanation: else of two explanations that
fit as many texts the longer one would win. The judge never sees the unit; an explanation gains only if
what the unit makes the model write speaks of it. Steering alone can make any such sentence likelier (of a text that
went astray, for one), so the score is read beside the same sentence asked of what random units do, steered to the same
divergence, and beside another unit's explanation asked of this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence, PartName
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorer_result import Demanded
from neuron_lens.explain.scorers.base import BaseScorer
from neuron_lens.explain.scorers.outcome import Outcome
from neuron_lens.explain.scorers.surprisal import likelihood_of
from neuron_lens.explain.scores import from_sums, share_score
from neuron_lens.llm import Backend, Request
from neuron_lens.records import Record, Unit

__all__ = ["CausalLikelihood", "Continuation", "Continuations"]

Floats = NDArray[np.float64]

_PROMPT = "causal_likelihood"
_NO_ANSWERS = (
    "a sentence is weighed, and nothing is said to be the unit's or not: there is no yes to be right"
)


class Continuation(Record):
    """What the model wrote after one text, by itself (`intact`) and with a unit `steered` from the text's last token on.

    `strength`: as in `Effect`. `divergence`: KL(intact || steered) of the first token's prediction, nats. `of`: the
    document and first token of the window.
    """

    text: str
    intact: str
    steered: str
    strength: float | None = None
    divergence: float | None = None
    of: tuple[NonNegativeInt, NonNegativeInt] | None = None


# So many continuations of texts of a part, at most; called once a unit and never with a judge running.
Continuations = Callable[[Unit, PartName, int], Sequence[Continuation]]


@dataclass(frozen=True, eq=False)
class _Likelihoods(Outcome):
    """A row a text: the explanation's log-probability (nats a token) after the steered continuation and after the
    intact one.

    `divergence` `[text]`: how far steering moved the prediction, NaN where that is not known; `tokens` `[text]`: those
    of the explanation.
    """

    divergence: Floats
    tokens: Floats


@dataclass(frozen=True, kw_only=True)
class CausalLikelihood(BaseScorer):
    """See the module. Two calls a text; `n_texts` texts of the unit, and as many of all `random_units` together.

    likelihood_gain        the mean gain, nats a token of the explanation; 0 where it has nothing to do with the unit
    log_likelihood_ratio   the same, nats an explanation: how much one text should change what is believed of it
    share_likelier         the share of texts after which steering makes the explanation likelier; chance is 1/2
    divergence             how far steering moved the prediction, mean KL(intact || steered) in nats: is it the target?

    Raises RequestError without continuations, or without a random unit other than the one scored.
    """

    name: ClassVar[str] = "causal"
    headline: ClassVar[str] = "likelihood_gain"
    chance: ClassVar[float] = 0.0
    needs: ClassVar[tuple[str, ...]] = ("completion", "prompt_logprobs")
    meaningless: ClassVar[Mapping[Demanded, str]] = {
        "precision": _NO_ANSWERS,
        "precision_at_density": _NO_ANSWERS,
        "quantiles": "texts are steered alike, to one divergence: there is no activation to tell strata by",
    }

    continuations: Continuations | None = None
    random_units: tuple[Unit, ...] = ()
    n_texts: int = 12

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        super().check(evidence, backend)
        if self.continuations is None or not self._others(evidence):
            raise RequestError(
                f"causal scoring of {evidence.unit} by likelihood needs continuations (a callable that gives what the "
                "model writes with a unit steered, such as harvest.effects.UnitEffects.continuations) and random_units, "
                "other units to compare with"
            )

    def prompt(self, backend: Backend | None) -> str:
        """The version of the prompt used."""
        return prompt_named(_PROMPT).version

    def method(self, backend: Backend | None) -> str:
        """Which form of causal scoring this is."""
        return "likelihood"

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        assert self.continuations is not None, "checked before anything is asked"
        return self._weighed(explanation, self.continuations(evidence.unit, self.part, self.n_texts))

    def further_controls(
        self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int
    ) -> dict[Literal["random_unit"], Plan[Outcome]]:
        """The explanation, asked of what random units do."""
        assert self.continuations is not None, "checked before anything is asked"
        others = self._others(evidence)
        each = -(-self.n_texts // len(others))
        found = [list(self.continuations(other, self.part, each)) for other in others]
        turns = [one[place] for place in range(each) for one in found if place < len(one)]
        return {"random_unit": self._weighed(explanation, turns[: self.n_texts])}

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See the class."""
        assert isinstance(outcome, _Likelihoods), "made by ask"
        gain = outcome.predicted[:, 0] - outcome.predicted[:, 1]
        known = np.isfinite(outcome.divergence)
        return {
            "likelihood_gain": _mean(gain, outcome.given, seed),
            "log_likelihood_ratio": _mean(gain * outcome.tokens, outcome.given, seed),
            "share_likelier": share_score(gain > 0, outcome.given),
            "divergence": _mean(np.where(known, outcome.divergence, 0.0), known, seed),
        }

    def _others(self, evidence: Evidence) -> list[Unit]:
        return [unit for unit in self.random_units if unit != evidence.unit]

    def _weighed(self, explanation: str, found: Sequence[Continuation]) -> Plan[Outcome]:
        prompt = prompt_named(_PROMPT)
        calls = tuple(
            Request(
                prompt=prompt.render(
                    explanation=explanation,
                    text=json.dumps(one.text, ensure_ascii=False),
                    continuation=json.dumps(written, ensure_ascii=False),
                ),
                max_tokens=0,
                prompt_logprobs=0,
                prompt_version=prompt.version,
            )
            for one in found
            for written in (one.steered, one.intact)
        )
        moved = np.array([np.nan if one.divergence is None else one.divergence for one in found])

        def read(answers: Sequence[Answer]) -> Outcome:
            found = [likelihood_of(answer, explanation) or (np.nan, 0) for answer in answers]
            said, tokens = np.array(found, dtype=np.float64).reshape(-1, 2, 2).transpose(2, 0, 1)
            there = np.ones(said.shape, dtype=bool)
            return _Likelihoods(
                true=np.broadcast_to([1.0, 0.0], said.shape),
                predicted=np.nan_to_num(said),
                present=there,
                mask=there,
                given=np.asarray(np.isfinite(said).all(1)),
                fires=np.ones(len(said), dtype=bool),
                natural=np.zeros(len(said), dtype=bool),
                stratum=(None,) * len(said),
                divergence=moved.astype(np.float64),
                tokens=tokens.max(1),
            )

        return Plan(calls, read)


def _mean(values: Floats, given: NDArray[np.bool_], seed: int) -> Score:
    def mean(sums: Floats) -> Floats:
        return np.asarray(sums[..., 0] / sums[..., 1])

    return from_sums(np.stack([values, np.ones(len(values))], axis=1), mean, given=given, seed=seed)
