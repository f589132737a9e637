"""Several candidates, one of them chosen: on validation windows, never on those it is reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import Candidate
from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.scorers.base import BaseScorer, ScorerResult
from neuron_lens.llm import Backend

__all__ = ["Choice", "best_of"]


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and how each did on validation (None for one without a sentence).

    The chosen one's validation score is the largest of several and so flatters it: report `scorer.score` on test.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    validation: tuple[ScorerResult | None, ...]


def best_of(
    evidence: Evidence,
    candidates: Sequence[Candidate],
    scorer: BaseScorer,
    backend: Backend | None,
    *,
    seed: int,
) -> Choice:
    """The candidate with the best headline figure on validation; of equals the first; one that has no figure loses.

    With one candidate that has a sentence nothing is asked. Raises RequestError when none has one.
    """
    usable = [place for place, candidate in enumerate(candidates) if candidate.sentence is not None]
    if not usable:
        reasons = {c.missing.reason for c in candidates if c.missing is not None}
        raise RequestError(
            f"none of the {len(candidates)} candidates for {evidence.unit} has a sentence to choose "
            f"({'; '.join(sorted(reasons)) or 'none was given'})"
        )
    results: list[ScorerResult | None] = [None] * len(candidates)
    if len(usable) > 1:
        judge = replace(scorer, part="validation", controls=False)
        plans = [
            judge.plan(evidence, candidates[place].sentence or "", backend, seed=seed) for place in usable
        ]
        found = carry_out(backend, plans)
        for place, result in zip(usable, found, strict=True):
            results[place] = result

    def standing(place: int) -> float:
        result = results[place]
        value = None if result is None else result.score.value
        return float("-inf") if value is None else value

    best = max(usable, key=standing)  # of equals, the first
    return Choice(candidates[best], tuple(candidates), tuple(results))
