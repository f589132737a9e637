"""Causal scoring: does the explanation tell this unit's effects on the model's predictions from other units'?

The unit is steered or ablated at some places of texts, and what becomes of the model's predictions is recorded (which
needs the model and comes from outside: `harvest.effects.UnitEffects`). The explanation is judged by these changes in
one of two forms:

    likelihood   how much likelier the explanation is after what the steered model wrote than after what it wrote by
                 itself, with the effects of other units as a control: see `causal_likelihood`. For judges that report
                 log-probabilities of a prompt.
    answers      a chat judge is shown records of changed next-token predictions, half of them of other units of the
                 same model (the random-unit control is in the test itself), and says which are of the unit described.
                 After the intervention scoring of Paulo et al. (2024), with answers in words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
from pydantic import NonNegativeInt

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.evidence import Evidence, PartName
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.result import ScorerResult
from neuron_lens.explain.scorer_result import Demanded
from neuron_lens.explain.scorers.batches import ask_in_batches
from neuron_lens.explain.scorers.causal_likelihood import CausalLikelihood, Continuations
from neuron_lens.explain.scorers.detection import BinaryScorer
from neuron_lens.explain.scorers.outcome import Outcome, judgements
from neuron_lens.llm import Backend
from neuron_lens.records import Record, Unit

__all__ = ["Causal", "Effect", "Effects", "Form"]

_DONE = {"steer": "made stronger", "ablate": "switched off"}
_LISTED = 8

Form = Literal["likelihood", "answers"]


class Effect(Record):
    """What changing a unit did to the next-token prediction at some place of one text.

    `text` ends with the token it was changed at. `raised` and `lowered`: the next tokens whose logit (centred over the
    vocabulary) changed most, most changed first. `divergence`: KL(intact || changed) there, nats. `strength`: what the
    unit was set to, of a direction how much of it was added, of a head the factor on what it writes; None where it was
    ablated. `of`: the document and first
    token of the window.
    """

    kind: Literal["steer", "ablate"]
    text: str
    raised: tuple[str, ...]
    lowered: tuple[str, ...]
    divergence: float | None = None
    strength: float | None = None
    of: tuple[NonNegativeInt, NonNegativeInt] | None = None


# What is known of a unit's effects in the windows of a part, strongest evidence first; called once a unit and never
# with a judge running.
Effects = Callable[[Unit, PartName], Sequence[Effect]]


@dataclass(frozen=True, kw_only=True)
class Causal(BinaryScorer):
    """See the module. `form` None takes the likelihood where the backend can and there are `continuations`, and answers
    elsewhere.

    Of the form "answers": records of effects, yes or no; `n_firing` of the unit itself and `n_silent` of
    `random_units`, in turn; by strength there are the records of it ablated, in windows of the strata. Of the form
    "likelihood": `n_texts` texts.

    Raises RequestError without what its form takes: `effects` or `continuations`, and a random unit other than the one
    scored.
    """

    name: ClassVar[str] = "causal"
    meaningless: ClassVar[Mapping[Demanded, str]] = {
        "precision_at_density": "records of effects are made by changing a unit, not met in a corpus: they have no density"
    }

    effects: Effects | None = None
    continuations: Continuations | None = None
    random_units: tuple[Unit, ...] = ()
    form: Form | None = None
    n_texts: int = 12

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is not None and self.form not in get_args(Form):
            raise RequestError(
                f"there is no form {self.form!r} of causal scoring; {did_you_mean(self.form, get_args(Form))}"
            )

    def taken(self, backend: Backend | None) -> Form:
        """The form that this backend is asked in."""
        if self.form is not None:
            return self.form
        able = backend is not None and not backend.capabilities.lacking(CausalLikelihood.needs)
        return "likelihood" if able and self.continuations is not None else "answers"

    def plan(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> Plan[ScorerResult]:
        """See `Scorer.plan`."""
        if self.taken(backend) == "answers":
            return super().plan(evidence, explanation, backend, seed=seed, others=others)
        return self._likelihood.plan(evidence, explanation, backend, seed=seed, others=others)

    def prompt(self, backend: Backend | None) -> str:
        """The version of the prompt of the form taken."""
        if self.taken(backend) == "answers":
            return super().prompt(backend)
        return self._likelihood.prompt(backend)

    def method(self, backend: Backend | None) -> str:
        """The form taken."""
        return self.taken(backend)

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        super().check(evidence, backend)
        if self.effects is None or not any(unit != evidence.unit for unit in self.random_units):
            raise RequestError(
                f"causal scoring of {evidence.unit} needs effects (a callable that changes a unit and records what "
                "happens, such as harvest.effects.UnitEffects) and random_units, other units to compare with"
            )

    def density(self, evidence: Evidence) -> float | None:
        """Effects have none."""
        return None

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        records = self._records(evidence.unit, seed)
        asked = ask_in_batches(
            prompt_named(self.name),
            [_shown(effect) for effect, _ in records],
            self.batch,
            lambda shown: {
                "explanation": explanation,
                "records": "\n".join(f"{number}: {record}" for number, record in enumerate(shown, 1)),
            },
        )
        strata = evidence.part(self.part).stratum_of
        own = [is_own for _, is_own in records]
        of = [
            strata.get(effect.of) if is_own and effect.kind == "ablate" and effect.of else None
            for effect, is_own in records
        ]
        return asked.then(
            lambda answers: judgements(answers, fires=own, natural=[True] * len(own), stratum=of)
        )

    @property
    def _likelihood(self) -> CausalLikelihood:
        return CausalLikelihood(
            part=self.part,
            controls=self.controls,
            continuations=self.continuations,
            random_units=self.random_units,
            n_texts=self.n_texts,
        )

    def _records(self, unit: Unit, seed: int) -> list[tuple[Effect, bool]]:
        assert self.effects is not None, "checked before anything is asked"
        rng = np.random.default_rng([seed, 6])
        own = list(self.effects(unit, self.part))[: self.n_firing]
        others = [list(self.effects(other, self.part)) for other in self.random_units if other != unit]
        turns = [
            found for place in range(max(map(len, others))) for one in others for found in one[place:][:1]
        ]
        # As many of other units as of this one: the share must not give the answer away.
        records = [(effect, True) for effect in own]
        records += [(effect, False) for effect in turns[: min(self.n_silent, max(len(own), 1))]]
        return [records[place] for place in rng.permutation(len(records))]


def _shown(effect: Effect) -> str:
    return json.dumps(
        {
            "done": _DONE[effect.kind],
            "text": effect.text,
            "more likely": list(effect.raised[:_LISTED]),
            "less likely": list(effect.lowered[:_LISTED]),
        },
        ensure_ascii=False,
    )
