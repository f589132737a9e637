"""Whether a judge can be trusted: its scores for explanations that are known to be true, and known to be false.

A score of an explanation is worth what the judge behind it is worth. Here it is tried on the planted puzzles: for each,
the scorer is given the true explanation and the false ones, and a judge that can do the work scores the true one
highest. The false ones are hard: each fits some of the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from neuron_lens.errors import RequestError
from neuron_lens.explain.explainers.base import described
from neuron_lens.explain.plan import Plan, carry_out, requests_of
from neuron_lens.explain.puzzles import Puzzle, puzzles
from neuron_lens.explain.scorer_result import Score, ScorerResult
from neuron_lens.explain.scorers import BaseScorer
from neuron_lens.explain.scores import mean_score
from neuron_lens.llm import Backend, CachedBackend, Estimate, Price, estimate
from neuron_lens.records import Record

__all__ = ["JudgeCheck", "PuzzleScores", "check_judge", "estimate_check"]


class PuzzleScores(Record):
    """What a scorer said of one puzzle's explanations.

    `true` and `false` are headline figures; `sentences` the explanations, the true one first.
    """

    puzzle: str
    sentences: tuple[str, ...]
    true: Score
    false: tuple[Score, ...]

    @property
    def best_false(self) -> float | None:
        """The highest score of a false explanation; None when none has one."""
        return max((one.value for one in self.false if one.value is not None), default=None)

    @property
    def true_is_first(self) -> bool:
        """Whether the true explanation scored above every false one. A missing score is never above."""
        if self.true.value is None:
            return False
        return self.best_false is None or self.true.value > self.best_false


class JudgeCheck(Record):
    """One judge by one scorer.

    Attributes:
        figure: the scorer's headline; chance: what it comes to for an explanation that says nothing.
        puzzles: one entry for each that was tried.
        coverage: share of the planned examples that were answered.
    """

    backend: str
    scorer: str
    figure: str
    chance: float
    prompt: str = ""
    seed: int = 0
    puzzles: tuple[PuzzleScores, ...]
    coverage: float = Field(ge=0, le=1)

    @property
    def n_first(self) -> int:
        """Puzzles whose true explanation scored above every false one."""
        return sum(one.true_is_first for one in self.puzzles)

    @property
    def mean_true(self) -> float | None:
        """Mean figure of the true explanations; None without any."""
        return _mean([one.true for one in self.puzzles])

    @property
    def mean_false(self) -> float | None:
        """Mean figure of the false explanations; None without any."""
        return _mean([score for one in self.puzzles for score in one.false])

    @property
    def gain(self) -> Score:
        """By how much the true explanation stands above the mean of the false ones, a mean over puzzles that have both,
        with its bootstrap 95 % interval over puzzles."""
        gains = [
            one.true.value - float(np.mean([score.value for score in one.false if score.value is not None]))
            if one.true.value is not None and one.best_false is not None
            else np.nan
            for one in self.puzzles
        ]
        known = ~np.isnan(gains)
        return mean_score(np.nan_to_num(gains), known.astype(float), len(gains), self.seed)


def _mean(scores: Sequence[Score]) -> float | None:
    known = [score.value for score in scores if score.value is not None]
    return float(np.mean(known)) if known else None


def check_judge(
    backend: Backend,
    scorers: Sequence[BaseScorer],
    *,
    chosen: Sequence[Puzzle] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[JudgeCheck]:
    """Score every explanation of the puzzles with each scorer: one result a scorer.

    Args:
        backend: the judge; with a `CachedBackend` around it, a run that was stopped goes on.
        scorers: such as Detection(); their controls are not asked, the false explanations take their place.
        chosen: the puzzles; None for all of `puzzles()`.
        seed: of the examples drawn.
        progress: show a bar on stderr.

    Raises RequestError for a scorer that does not read texts (attention pairs, causal), BackendError for a judge that
    lacks what a scorer needs, or that answers no more.
    """
    tried = puzzles() if chosen is None else tuple(chosen)
    return [
        _check_of(
            scorer,
            backend,
            tried,
            carry_out(backend, plans, progress=progress, description=scorer.name),
            seed,
        )
        for scorer, plans in zip(scorers, _plans(backend, scorers, tried, seed), strict=True)
    ]


def estimate_check(
    backend: Backend,
    scorers: Sequence[BaseScorer],
    *,
    chosen: Sequence[Puzzle] | None = None,
    seed: int = 0,
    price: Price | None = None,
) -> Estimate:
    """What `check_judge` would ask: calls, tokens and cost."""
    tried = puzzles() if chosen is None else tuple(chosen)
    plans = [plan for some in _plans(backend, scorers, tried, seed) for plan in some]
    cached = backend.has if isinstance(backend, CachedBackend) else None
    return estimate(requests_of(plans, backend), price=price, is_cached=cached)


def _plans(
    backend: Backend, scorers: Sequence[BaseScorer], tried: Sequence[Puzzle], seed: int
) -> list[list[Plan[ScorerResult]]]:
    if not tried or not scorers:
        raise RequestError(f"{len(tried)} puzzles and {len(scorers)} scorers: name at least one of each")
    return [
        [
            replace(scorer, controls=False).plan(puzzle.evidence(), sentence, backend, seed=seed)
            for puzzle in tried
            for sentence in puzzle.explanations
        ]
        for scorer in scorers
    ]


def _check_of(
    scorer: BaseScorer, backend: Backend, tried: Sequence[Puzzle], results: Sequence[ScorerResult], seed: int
) -> JudgeCheck:
    left = iter(results)
    found = []
    for puzzle in tried:
        true, *false = (next(left).score for _ in puzzle.explanations)
        found.append(
            PuzzleScores(puzzle=puzzle.name, sentences=puzzle.explanations, true=true, false=tuple(false))
        )
    first = results[0]
    return JudgeCheck(
        backend=described(backend),
        scorer=scorer.name,
        figure=first.headline,
        chance=first.chance,
        prompt=first.prompt,
        seed=seed,
        puzzles=tuple(found),
        coverage=float(np.mean([result.score.coverage for result in results])),
    )
