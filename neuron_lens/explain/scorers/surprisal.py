"""Surprisal: does knowing the explanation make the texts the unit fires in less surprising? (After EleutherAI's Delphi.)

A language model reads each text after the explanation and after one that says nothing. The gain is the difference of
the negative log-likelihoods, in nats a token. It must be larger where the unit fires than where it is silent: a
sentence that makes any text likelier gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import text_of
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.base import NULL_EXPLANATION
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.explain.scorers.ranking import RankingScorer
from neuron_lens.explain.scores import from_sums
from neuron_lens.llm import Backend, Missing, Request, Response

Floats = NDArray[np.float64]

__all__ = ["Surprisal", "likelihood_of", "surprisal_of"]


@dataclass(frozen=True, kw_only=True)
class Surprisal(RankingScorer):
    """Needs a base model that reports log-probabilities of a prompt; two calls a text.

    Besides `ranking_figures`: "gain_firing" and "gain_silent", the mean gain of either sort (nats a token), and
    "gain_difference". Within a call that failed, or whose tokens do not fit the text, nothing is known: missing.
    """

    name: ClassVar[str] = "surprisal"
    needs: ClassVar[tuple[str, ...]] = ("completion", "prompt_logprobs")

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        examples = draw_examples(evidence, self.part, firing=self.n_firing, silent=self.n_silent, seed=seed)
        prompt = prompt_named(self.name)
        texts = [text_of(example.window) for example in examples]
        calls = [
            Request(
                prompt=prompt.render(explanation=sentence, text=text),
                max_tokens=0,
                prompt_logprobs=0,
                prompt_version=prompt.version,
            )
            for sentence in (explanation, NULL_EXPLANATION)
            for text in texts
        ]

        def read(answers: Sequence[Answer]) -> Outcome:
            found = [
                surprisal_of(answer, text) for answer, text in zip(answers, [*texts, *texts], strict=True)
            ]
            gains = [
                None if told is None or untold is None else untold - told
                for told, untold in zip(found[: len(texts)], found[len(texts) :], strict=True)
            ]
            return judgements_of(examples, gains)

        return Plan(tuple(calls), read)

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See the class."""
        gain, fires = outcome.predicted[:, 0], outcome.fires.astype(np.float64)
        sums = np.stack([gain * fires, fires, gain * (1 - fires), 1 - fires], axis=1)

        def figure(which: str) -> Score:
            def of(sums: Floats) -> Floats:
                with np.errstate(invalid="ignore", divide="ignore"):
                    firing, silent = sums[..., 0] / sums[..., 1], sums[..., 2] / sums[..., 3]
                return {"firing": firing, "silent": silent, "difference": firing - silent}[which]

            return from_sums(sums, of, given=outcome.given, seed=seed)

        return super().figures(outcome, evidence, seed) | {
            f"gain_{which}": figure(which) for which in ("difference", "firing", "silent")
        }


def surprisal_of(answer: Response | Missing, text: str) -> float | None:
    """Mean negative log-probability (nats) of the prompt's tokens that begin in `text`, with which the prompt ends.

    None when the answer is missing, or its tokens do not add up to a prompt that ends so.
    """
    found = _logprobs(answer, text, lambda begin, end: begin >= 0)
    return None if found is None else -float(np.mean(found))


def likelihood_of(answer: Response | Missing, text: str) -> tuple[float, int] | None:
    """Mean log-probability (nats) of the prompt's tokens that reach into `text`, with which the prompt ends, and how
    many these are.

    The first may begin before it (with a space). None as in `surprisal_of`.
    """
    found = _logprobs(answer, text, lambda begin, end: end > 0)
    return None if found is None else (float(np.mean(found)), len(found))


def _logprobs(
    answer: Response | Missing, text: str, counts: Callable[[int, int], bool]
) -> list[float] | None:
    """Of the tokens that count, told where they begin and end, in characters from where the text begins."""
    if isinstance(answer, Missing) or answer.prompt_tokens is None:
        return None
    whole = "".join(token.token for token in answer.prompt_tokens)
    if not text or not whole.endswith(text):
        return None
    begin, logprobs = len(text) - len(whole), []
    for token in answer.prompt_tokens:
        end = begin + len(token.token)
        if counts(begin, end):
            logprobs.append(token.logprob)
        begin = end
    known = [logprob for logprob in logprobs if logprob is not None]
    return known if known and len(known) == len(logprobs) else None
