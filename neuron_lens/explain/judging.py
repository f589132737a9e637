"""Explaining and scoring many units with a judge: candidates, the choice among them on validation, scores on test.

The calls of all units of one stage run side by side. A rehearsal takes the same steps and makes no call: it collects
the requests, for an estimate, and goes on with answers the cache holds, or with filler where there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from neuron_lens.errors import RequestError
from neuron_lens.explain.best_of import Choice, choice_plan
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers import Candidate, Explainer
from neuron_lens.explain.plan import Plan, carry_out, requests_of
from neuron_lens.explain.result import (
    Baseline,
    CandidateScore,
    Explanation,
    ScoredWindow,
    ScorerResult,
    UnitResult,
)
from neuron_lens.explain.scorers import BaseScorer, Detection, Simulation
from neuron_lens.llm import Backend, CachedBackend, CallFailed, Capabilities, Request, Response

__all__ = ["Judging", "Rehearsal", "Scored", "by_judge", "controlled", "with_scores"]

_FILLER = (
    "a description of about the length that such descriptions have, of what makes the unit respond, number"
)

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Scored:
    """What the scorers say of one unit's explanation; `unscored`: scorers that do not apply, and why; `shown`: windows
    with the simulation that was scored, None without one."""

    results: tuple[ScorerResult, ...]
    unscored: dict[str, str]
    shown: tuple[ScoredWindow, ...] | None


@dataclass(eq=False)
class Rehearsal:
    """The requests a run would make, in order."""

    requests: list[Request] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Judging:
    """Who explains, who scores, who is asked.

    `explainer` None: explanations come from elsewhere and are scored only. `rehearsal`: collect, do not ask.
    """

    explainer: Explainer | None
    scorers: tuple[BaseScorer, ...]
    backend: Backend | None
    seed: int
    progress: bool = False
    rehearsal: Rehearsal | None = None

    @property
    def chooser(self) -> BaseScorer:
        """The scorer that chooses among candidates: the first one, or detection."""
        return self.scorers[0] if self.scorers else Detection()

    def explain(self, units: Sequence[tuple[Evidence, Evidence | None]]) -> list[Explanation | str]:
        """Explanations of units, each given with its partner, whose first candidate serves as the control of later
        scores; of a unit that cannot be explained the reason.

        Raises BackendError when no further call can be answered.
        """
        subjects = {one.unit.name: one for pair in units for one in pair if one is not None}
        candidates, refused = self._candidates(subjects)
        own = [evidence.unit.name for evidence, _ in units]
        plans: dict[str, Plan[Choice]] = {}
        for evidence, _ in units:
            name = evidence.unit.name
            try:
                if name not in refused:
                    plans[name] = choice_plan(
                        evidence, candidates[name], self.chooser, self.backend, seed=self.seed
                    )
            except RequestError as error:
                refused[name] = str(error)
        chosen = dict(zip(plans, self._ask(list(plans.values()), "choosing"), strict=True))
        others = {
            evidence.unit.name: _first_sentence(candidates.get(partner.unit.name, ())) if partner else ""
            for evidence, partner in units
        }
        return [
            refused[name] if name in refused else self._explanation(chosen[name], others[name])
            for name in own
        ]

    def score(self, units: Sequence[tuple[Evidence, Explanation]]) -> list[Scored]:
        """Scores of explanations on test windows, the scorers of all units side by side."""
        plans: list[Plan[ScorerResult]] = []
        shown: list[Plan[tuple[ScoredWindow, ...]]] = []
        places: list[tuple[list[int], int | None, dict[str, str]]] = []
        for evidence, explanation in units:
            unscored: dict[str, str] = {}
            own: list[int] = []
            simulated = None
            for scorer in self.scorers:
                sentence, others = explanation.sentence, [explanation.another]
                try:
                    plan = scorer.plan(evidence, sentence, self.backend, seed=self.seed, others=others)
                except RequestError as error:
                    unscored[scorer.name] = str(error)
                    continue
                own.append(len(plans))
                plans.append(plan)
                if isinstance(scorer, Simulation) and explanation.predicate is None:
                    simulated = len(shown)
                    shown.append(scorer.shown(evidence, sentence, self.backend, self.seed))
            places.append((own, simulated, unscored))
        # Windows are shown with the simulation that is scored: equal calls in one plan are made once.
        ((results, windows),) = self._ask([Plan.joined(plans).beside(Plan.joined(shown))], "scoring")
        return [
            Scored(
                results=tuple(results[place] for place in own),
                unscored=unscored,
                shown=None if simulated is None else windows[simulated],
            )
            for own, simulated, unscored in places
        ]

    def _candidates(
        self, subjects: dict[str, Evidence]
    ) -> tuple[dict[str, tuple[Candidate, ...]], dict[str, str]]:
        assert self.explainer is not None, "asked to explain without an explainer"
        plans: dict[str, Plan[tuple[Candidate, ...]]] = {}
        refused: dict[str, str] = {}
        for name, evidence in subjects.items():
            try:
                plans[name] = self.explainer.plan(evidence, self.backend)
            except RequestError as error:
                refused[name] = str(error)
        found = dict(zip(plans, self._ask(list(plans.values()), "explaining"), strict=True))
        if self.rehearsal is not None:
            found = {name: _filled(name, candidates) for name, candidates in found.items()}
        return found, refused

    def _explanation(self, choice: Choice, another: str) -> Explanation:
        chosen = choice.chosen
        assert chosen.sentence is not None, "only candidates with a sentence are chosen"
        several = len(choice.candidates) > 1
        return Explanation(
            explainer=chosen.explainer,
            sentence=chosen.sentence,
            predicate=chosen.predicate,
            prompt=chosen.prompt,
            backend=chosen.backend,
            another=another,
            candidates=tuple(
                CandidateScore(
                    sentence=candidate.sentence,
                    missing="" if candidate.missing is None else candidate.missing.reason,
                    chosen=candidate is chosen,
                    validation=None if result is None else result.score,
                )
                for candidate, result in zip(choice.candidates, choice.validation, strict=True)
            )
            if several
            else (),
            chosen_by=self.chooser.name if several else "",
        )

    def _ask(self, plans: Sequence[Plan[T]], description: str) -> list[T]:
        if self.rehearsal is None or self.backend is None:
            return carry_out(self.backend, plans, progress=self.progress, description=description)
        self.rehearsal.requests += requests_of(plans, self.backend)
        return carry_out(_OnlyKnown(self.backend), plans)


class _OnlyKnown:
    """A backend that answers what a cache holds, and fails at everything else."""

    def __init__(self, inner: Backend) -> None:
        self._inner = inner

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def model(self) -> str:
        return self._inner.model

    @property
    def identity(self) -> str:
        return self._inner.identity

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    @property
    def concurrency(self) -> int:
        return 1

    async def complete(self, request: Request) -> Response:
        if isinstance(self._inner, CachedBackend) and self._inner.has(request):
            return await self._inner.complete(request)
        raise CallFailed("not asked yet")

    async def aclose(self) -> None:
        await self._inner.aclose()


def _filled(name: str, candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Candidates with filler, different in each, for sentences that are not known yet."""
    return tuple(
        candidate
        if candidate.sentence is not None
        else candidate.model_copy(
            update={"sentence": f"{_FILLER} {candidate.number} of {name}", "missing": None}
        )
        for candidate in candidates
    )


def _first_sentence(candidates: Sequence[Candidate]) -> str:
    return next((one.sentence for one in candidates if one.sentence is not None), "")


def by_judge(result: UnitResult, explanation: Explanation) -> UnitResult:
    """The result with a judge's explanation; what token statistics say becomes its baseline."""
    return result.model_copy(
        update={
            "explanation": explanation,
            "scores": {},
            "controls": (),
            "baseline": Baseline(
                explanation=result.explanation, scores=result.scores, controls=result.controls
            ),
            "test_windows": tuple(
                window.model_copy(update={"simulated": None}) for window in result.test_windows
            ),
        }
    )


def with_scores(result: UnitResult, said: Scored) -> UnitResult:
    """The result with the scores of a judge; of an explanation without a predicate also with its simulation."""
    kept = {one.scorer: one for one in (*result.judged, *said.results)}
    update: dict[str, Any] = {"judged": tuple(kept.values()), "unscored": result.unscored | said.unscored}
    if said.shown is not None and result.explanation.predicate is None:
        update["test_windows"] = said.shown
    return result.model_copy(update=update)


def controlled(result: UnitResult) -> Explanation:
    """The explanation, with another unit's beside it for the controls."""
    if result.explanation.another:
        return result.explanation
    others = [control.sentence for control in result.controls if control.name == "another_unit"]
    return result.explanation.model_copy(update={"another": (others and others[0]) or ""})
