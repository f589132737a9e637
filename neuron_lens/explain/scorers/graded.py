"""Detection and fuzzing by how sure the judge is: its probability of "yes", one text a call.

    p = P(yes) / (P(yes) + P(no))    of the first token of the answer (as log_prob of EleutherAI's Delphi does)

A judge that says yes to nearly everything, as small ones do, may still be surer where it should be: texts are ranked,
and no level is called the right one. Needs a judge that reports log-probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import marks_for, quoted, text_of
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.fuzzing import Fuzzing, draw_markings
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.explain.scorers.ranking import RankingScorer
from neuron_lens.llm import Backend, Missing, Request, Response

__all__ = ["GradedDetection", "GradedFuzzing", "probability_of_yes"]

_ALTERNATIVES = 20  # "yes" and "no" are written in several ways, each a token


@dataclass(frozen=True, kw_only=True)
class _Graded(RankingScorer):
    """Base of the two: a text is asked about by itself."""

    needs: ClassVar[tuple[str, ...]] = ("chat", "logprobs")

    def _asked(self, backend: Backend | None, slots: Sequence[dict[str, str]]) -> Plan[list[float | None]]:
        """A probability for each filling of the prompt's slots, None where it is missing."""
        assert backend is not None, "checked"
        prompt = prompt_named(self.name)
        calls = tuple(
            Request(
                messages=prompt.messages(**filling),
                max_tokens=1,
                top_logprobs=min(_ALTERNATIVES, backend.capabilities.max_top_logprobs),
                prompt_version=prompt.version,
            )
            for filling in slots
        )

        def read(answers: Sequence[Answer]) -> list[float | None]:
            return [probability_of_yes(answer) for answer in answers]

        return Plan(calls, read)


@dataclass(frozen=True, kw_only=True)
class GradedDetection(_Graded):
    """Whole texts, more or less likely to hold what the explanation says; figures as in `ranking_figures`."""

    name: ClassVar[str] = "graded_detection"

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        examples = draw_examples(evidence, self.part, firing=self.n_firing, silent=self.n_silent, seed=seed)
        asked = self._asked(
            backend, [{"explanation": explanation, "text": quoted(text_of(one.window))} for one in examples]
        )
        return asked.then(lambda answers: judgements_of(examples, answers))


@dataclass(frozen=True, kw_only=True)
class GradedFuzzing(_Graded):
    """Marked tokens, more or less likely to be the right ones: those that `Fuzzing` marks."""

    name: ClassVar[str] = "graded_fuzzing"

    density = Fuzzing.density

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        markings = draw_markings(evidence, self.part, right=self.n_firing, wrong=self.n_silent, seed=seed)
        begin, end = marks = marks_for(marking.window for marking in markings)
        about = {"explanation": explanation, "begin": begin, "end": end}
        asked = self._asked(backend, [{**about, "text": quoted(one.text(marks))} for one in markings])
        return asked.then(lambda answers: judgements_of([one.judged for one in markings], answers))


def probability_of_yes(answer: Response | Missing) -> float | None:
    """P(yes) / (P(yes) + P(no)) at the answer's first token, all ways to write them together.

    None when the answer is missing, or neither is among the likeliest tokens.
    """
    if isinstance(answer, Missing) or not answer.tokens:
        return None
    shares = {"yes": 0.0, "no": 0.0}
    for one in answer.tokens[0].top:
        word = one.token.strip(" \n\"'.*▁Ġ").lower()
        if word in shares:
            shares[word] += math.exp(one.logprob)
    total = shares["yes"] + shares["no"]
    return shares["yes"] / total if total > 0 else None
