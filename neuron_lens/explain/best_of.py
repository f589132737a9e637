"""Several candidates, one of them chosen: on validation windows, never on those it is reported on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import Candidate
from neuron_lens.explain.plan import Plan, carry_out
from neuron_lens.explain.scorers.base import BaseScorer, ScorerResult
from neuron_lens.llm import Backend

__all__ = ["Choice", "best_of", "choice_plan"]


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
    return carry_out(backend, [choice_plan(evidence, candidates, scorer, backend, seed=seed)])[0]


def choice_plan(
    evidence: Evidence,
    candidates: Sequence[Candidate],
    scorer: BaseScorer,
    backend: Backend | None,
    *,
    seed: int,
) -> Plan[Choice]:
    """The calls of `best_of`, and the choice they lead to."""
    usable = [place for place, candidate in enumerate(candidates) if candidate.sentence is not None]
    if not usable:
        reasons = {c.missing.reason for c in candidates if c.missing is not None}
        raise RequestError(
            f"none of the {len(candidates)} candidates for {evidence.unit} has a sentence to choose "
            f"({'; '.join(sorted(reasons)) or 'none was given'})"
        )
    asked = usable if len(usable) > 1 else []
    judge = replace(scorer, part="validation", controls=False)
    plan = Plan.joined(
        [judge.plan(evidence, candidates[place].sentence or "", backend, seed=seed) for place in asked]
    )

    def chosen(found: list[ScorerResult]) -> Choice:
        results = dict(zip(asked, found, strict=True))

        def standing(place: int) -> float:
            value = results[place].score.value if place in results else None
            return float("-inf") if value is None else value

        best = max(usable, key=standing)  # of equals, the first
        return Choice(
            candidates[best], tuple(candidates), tuple(results.get(i) for i in range(len(candidates)))
        )

    return plan.then(chosen)
