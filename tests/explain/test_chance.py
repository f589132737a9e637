"""What an explanation that says nothing gets: chance, inside its interval as often as stated."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.puzzles import puzzles
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers import (
    BaseScorer,
    Causal,
    CausalLikelihood,
    Detection,
    Embedding,
    Fuzzing,
    GradedDetection,
    GradedFuzzing,
    Intruder,
    Simulation,
    Surprisal,
)
from neuron_lens.explain.scorers.outcome import Outcome, binary_figures, judgements, ranking_figures
from neuron_lens.explain.scores import from_sums, share_score
from neuron_lens.explain.simulators import TextSimulator

from .judge import planted_continuations, planted_effects, rule_judge

REPEATS = 100
NOMINAL = 0.95


def covers(score: Score, chance: float) -> bool:
    assert score.low is not None and score.high is not None
    return score.low <= chance <= score.high


def held_to_the_rate(scores: list[Score], chance: float) -> None:
    """The share of intervals that hold chance is at least nominal, and the mean is chance, minus noise."""
    share = np.mean([covers(score, chance) for score in scores])
    assert share >= NOMINAL - 3 * np.sqrt(NOMINAL * (1 - NOMINAL) / len(scores)), share
    values = np.array([score.value for score in scores], dtype=float)
    assert abs(values.mean() - chance) < 3.5 * values.std() / np.sqrt(len(values))


class RandomEmbedder:
    name, instructed = "random", False

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(self, texts: list[str]) -> NDArray[np.float64]:
        return self.rng.normal(size=(len(texts), 8))


UNITS = tuple(puzzle.evidence().unit for puzzle in puzzles()[:5])
SCORERS: dict[str, BaseScorer] = {
    "detection": Detection(controls=False, batch=10),
    "fuzzing": Fuzzing(controls=False, batch=10),
    "graded detection": GradedDetection(controls=False),
    "graded fuzzing": GradedFuzzing(controls=False),
    "intruder": Intruder(controls=False),
    "simulation": Simulation(simulator=TextSimulator(), controls=False, n_firing=8, n_silent=8),
    "surprisal": Surprisal(controls=False, n_firing=10, n_silent=10),
    "causal by answers": Causal(batch=10, controls=False, effects=planted_effects, random_units=UNITS),
    "causal by likelihood": CausalLikelihood(
        controls=False, continuations=planted_continuations, random_units=UNITS
    ),
}


@pytest.mark.parametrize("name", SCORERS)
def test_a_null_explanation_scores_chance_and_its_interval_says_so(name: str) -> None:
    scorer = SCORERS[name]
    scores = []
    for repeat in range(REPEATS):
        puzzle = puzzles()[repeat % len(puzzles())]
        judge = rule_judge(salt=repeat)
        plan = scorer.plan(puzzle.evidence(), f"whatever it was, number {repeat}", judge, seed=repeat)
        scores.append(carry_out(judge, [plan])[0].score)
    held_to_the_rate(scores, scorer.chance)


def test_an_embedder_that_knows_nothing_scores_chance() -> None:
    scores = [
        Embedding(embedder=RandomEmbedder(repeat), controls=False)
        .score(puzzles()[repeat % len(puzzles())].evidence(), "anything", None, seed=repeat)
        .score
        for repeat in range(REPEATS)
    ]
    held_to_the_rate(scores, 0.5)


def _null(rng: np.random.Generator, n: int, yes: float) -> Outcome:
    fires = rng.permutation([True, False] * n)
    return judgements(
        [float(value) for value in rng.random(2 * n) < yes], fires=list(fires), natural=[True] * (2 * n)
    )


@pytest.mark.parametrize(("n", "yes"), [(10, 0.5), (25, 0.5), (25, 0.9)])
def test_figures_of_blind_yes_and_no_hold_their_truth(n: int, yes: float) -> None:
    """Blind answers: accuracy 1/2, precision the share of truth, at density the density, recall the share of yes."""
    rng = np.random.default_rng(n)
    density = 0.1
    figures = [binary_figures(_null(rng, n, yes), density, seed) for seed in range(200)]
    noise = 3 * np.sqrt(NOMINAL * (1 - NOMINAL) / 200)
    truth = {
        "balanced_accuracy": 0.5,
        "precision": 0.5,
        "precision_at_density": density,
        "recall": yes,
        "false_positive_rate": yes,
    }
    for name, value in truth.items():
        known = [one[name] for one in figures if one[name].value is not None]
        assert len(known) > 180
        assert np.mean([covers(score, value) for score in known]) >= NOMINAL - noise - 0.01, name


def test_a_blind_ranking_holds_its_truth() -> None:
    rng = np.random.default_rng(5)
    figures = []
    for seed in range(200):
        fires = list(rng.permutation([True, False] * 20))
        outcome = judgements(list(rng.normal(size=40)), fires=fires, natural=[True] * 40)
        figures.append(ranking_figures(outcome, 0.1, seed))
    held_to_the_rate([one["auc"] for one in figures], 0.5)
    assert np.mean([covers(one["precision"], 0.5) for one in figures]) >= 0.9


@pytest.mark.parametrize("n", [8, 12, 30])
def test_intervals_of_a_mean_are_wide_enough_for_few_windows(n: int) -> None:
    rng = np.random.default_rng(n)
    scores = [
        from_sums(
            np.stack([rng.normal(size=n), np.ones(n)], axis=1),
            lambda sums: sums[..., 0] / sums[..., 1],
            given=np.ones(n, dtype=bool),
            seed=seed,
        )
        for seed in range(600)
    ]
    assert np.mean([covers(score, 0.0) for score in scores]) >= NOMINAL - 3 * np.sqrt(0.05 * 0.95 / 600)


def test_a_share_holds_its_truth_even_near_the_edge() -> None:
    rng = np.random.default_rng(0)
    for n, truth in ((10, 0.2), (20, 0.2), (20, 0.95), (40, 0.5)):
        scores = [share_score(rng.random(n) < truth, np.ones(n, dtype=bool)) for _ in range(600)]
        assert np.mean([covers(score, truth) for score in scores]) >= 0.92
    none_right = share_score(np.zeros(10, dtype=bool), np.ones(10, dtype=bool))
    assert none_right.value == 0.0 and none_right.high is not None and none_right.high > 0.2
