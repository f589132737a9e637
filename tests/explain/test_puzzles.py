"""Planted units: every scorer, with a judge that applies what it reads, prefers the true explanation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from neuron_lens.errors import RequestError
from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.puzzles import Puzzle, puzzle_named, puzzles, tokens_of
from neuron_lens.explain.scorers import (
    BaseScorer,
    Causal,
    Detection,
    Embedding,
    Fuzzing,
    GradedDetection,
    GradedFuzzing,
    Intruder,
    Simulation,
    Surprisal,
)
from neuron_lens.explain.simulators import AllAtOnceSimulator, TextSimulator

from .judge import RuleEmbedder, planted_continuations, planted_effects, rule_judge

PUZZLES = puzzles()
UNITS = tuple(puzzle.evidence().unit for puzzle in PUZZLES)
SCORERS: dict[str, BaseScorer] = {
    "detection": Detection(batch=10),
    "fuzzing": Fuzzing(batch=10),
    "graded detection": GradedDetection(n_firing=15, n_silent=15),
    "graded fuzzing": GradedFuzzing(n_firing=15, n_silent=15),
    "intruder": Intruder(n_trials=12),
    "simulation all at once": Simulation(simulator=AllAtOnceSimulator(), n_firing=8, n_silent=6),
    "simulation by text": Simulation(simulator=TextSimulator(), calibration="linear", n_firing=8, n_silent=6),
    "surprisal": Surprisal(n_firing=15, n_silent=15),
    "embedding": Embedding(embedder=RuleEmbedder()),
    "causal by answers": Causal(batch=10, form="answers", effects=planted_effects, random_units=UNITS),
    "causal by likelihood": Causal(continuations=planted_continuations, random_units=UNITS),
}


def test_there_are_enough_puzzles_and_each_is_what_it_says() -> None:
    assert len(PUZZLES) >= 20 and len({p.explanation for p in PUZZLES}) == len(PUZZLES)
    for puzzle in PUZZLES:
        assert len(set(puzzle.false_explanations) - {puzzle.explanation}) >= 2
        evidence = puzzle.evidence()
        for _, part in evidence.parts():
            assert len(part.firing(evidence.firing_threshold)) >= 8 and part.near_misses
            for window in part.windows:
                fires = [value > evidence.firing_threshold for value in window.activations]
                assert fires == puzzle.rule.fires(window.tokens)
                assert tokens_of("".join(window.tokens)) == window.tokens
    assert puzzle_named("years").rule.fires(tokens_of("in 1989, 12 men")) == [
        False,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(RequestError, match="did you mean 'years'"):
        puzzle_named("yeers")


def test_no_text_is_seen_twice() -> None:
    texts = [window.tokens for _, part in PUZZLES[0].evidence().parts() for window in part.windows]
    assert len(set(texts)) == len(texts) > 300


def test_evidence_is_the_same_every_time_and_differs_by_seed() -> None:
    puzzle = puzzle_named("animals")
    assert puzzle.evidence(3) == Puzzle(puzzle.index, puzzle.rule, puzzle.false_rules).evidence(3)
    assert puzzle.evidence(3) != puzzle.evidence(4)


@pytest.mark.parametrize("name", SCORERS)
def test_the_true_explanation_stands_above_every_false_one(name: str) -> None:
    scorer, judge = SCORERS[name], rule_judge()
    alone = replace(scorer, controls=False)
    plans = [
        (scorer if one == puzzle.explanation else alone).plan(
            puzzle.evidence(), one, judge, seed=0, others=PUZZLES[puzzle.index - 1].explanations
        )
        for puzzle in PUZZLES
        for one in puzzle.explanations
    ]
    results = iter(carry_out(judge, plans))
    for puzzle in PUZZLES:
        true, *false = [next(results) for _ in puzzle.explanations]
        values = [one.score.value for one in false]
        assert true.score.value is not None and true.score.low is not None
        # None: a prediction that is the same everywhere has no correlation, and ranks below all.
        assert all(value is None or value < true.score.value for value in values), (puzzle.name, values)
        assert any(value is not None for value in values)
        assert all(one.score.coverage == 1.0 for one in false)
        assert true.score.low > true.chance and true.score.coverage == 1.0 and not true.missing
        for control in true.controls:
            worth = control.scores[true.headline]  # None: it predicts the same everywhere
            assert worth.n > 0 and (worth.value is None or worth.value < true.score.value)
        assert len(true.quantiles) == (0 if "quantiles" in true.absent else 5)
