"""Scores against their definitions, intervals against repetition, and missing predictions that stay missing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.explain.scores import (
    Predictions,
    auc,
    balanced_accuracy,
    best_threshold,
    correlation,
    mean_score,
    score_all,
)

WINDOWS, LENGTH = 30, 8


def _predictions(seed: int, signal: float = 1.0, offset: float = 0.0) -> Predictions:
    random = np.random.default_rng(seed)
    true = random.normal(size=(WINDOWS, LENGTH)) + offset
    predicted = signal * true + random.normal(size=true.shape)
    mask = random.random(true.shape) < 0.9
    return Predictions(true, predicted, mask, np.ones(WINDOWS, dtype=bool), np.arange(WINDOWS) % 2 == 0)


@given(st.integers(0, 10_000), st.sampled_from([0.0, 1e4]))
@settings(max_examples=25, deadline=None)
def test_correlation_is_pearsons(seed: int, offset: float) -> None:
    predictions = _predictions(seed, offset=offset)
    expected = np.corrcoef(predictions.true[predictions.mask], predictions.predicted[predictions.mask])[0, 1]
    score = correlation(predictions, seed=0)
    assert score.value == pytest.approx(expected, abs=1e-5)
    assert score.n == predictions.mask.sum() and score.n_windows == WINDOWS and score.coverage == 1.0
    assert score.low is not None and score.high is not None and score.low < score.value < score.high


def test_auc_is_the_share_of_pairs_in_order() -> None:
    predictions = _predictions(1)
    predictions.predicted[:] = np.round(predictions.predicted)  # ties
    true, predicted = predictions.true[predictions.mask], predictions.predicted[predictions.mask]
    positive, negative = predicted[true > 0.5], predicted[true <= 0.5]
    difference = positive[:, None] - negative[None, :]
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert auc(predictions, 0.5, seed=0).value == pytest.approx(expected, abs=1e-6)


def test_balanced_accuracy_and_its_threshold() -> None:
    predictions = _predictions(2)
    true, predicted = predictions.true[predictions.mask], predictions.predicted[predictions.mask]

    def by_hand(threshold: float) -> float:
        said, fires = predicted > threshold, true > 0.5
        return float((said[fires].mean() + (~said[~fires]).mean()) / 2)

    threshold = best_threshold(true, predicted, 0.5)
    assert threshold is not None
    assert balanced_accuracy(predictions, 0.5, threshold, seed=0).value == pytest.approx(
        by_hand(threshold), abs=1e-6
    )
    assert all(by_hand(threshold) >= by_hand(other) for other in predicted)
    assert best_threshold(true, np.zeros_like(true), 0.5) is None
    assert best_threshold(true, predicted, true.max()) is None


def test_intervals_hold_chance_at_the_stated_rate() -> None:
    covered = []
    for seed in range(200):
        score = correlation(_predictions(seed, signal=0.0), seed=seed)
        assert score.low is not None and score.high is not None
        covered.append(score.low <= 0 <= score.high)
    # 95 % of 200 is 190; three standard deviations of a binomial are 9.
    assert 178 <= sum(covered) <= 200


def test_failed_predictions_are_missing_and_move_nothing() -> None:
    whole = _predictions(3)
    given = np.arange(WINDOWS) % 3 != 0
    spoiled = np.where(given[:, None], whole.predicted, 1e6)
    partial = Predictions(whole.true, spoiled, whole.mask, given, whole.random)
    for name, score in score_all(partial, 0.5, 0.3, seed=0).items():
        alone = score_all(whole.only(given), 0.5, 0.3, seed=0)[name]
        assert (score.value, score.low, score.high) == (alone.value, alone.low, alone.high)
        assert score.coverage == pytest.approx(2 / 3, abs=0.04) and alone.coverage == 1.0
    hardly = Predictions(whole.true, spoiled, whole.mask, np.arange(WINDOWS) < 10, whole.random)
    assert all(score.value is None for score in score_all(hardly, 0.5, 0.3, seed=0).values())


def test_what_does_not_vary_has_no_correlation() -> None:
    whole = _predictions(4)
    constant = Predictions(whole.true, np.full_like(whole.true, 0.1), whole.mask, whole.given, whole.random)
    assert correlation(constant, seed=0).value is None
    assert auc(constant, 0.5, seed=0).value == 0.5
    none_fires = auc(whole, float(whole.true.max()), seed=0)
    assert none_fires.value is None and none_fires.n > 0


def test_a_mean_over_windows_weights_tokens() -> None:
    values, weights = np.array([1.0, 5.0, 99.0]), np.array([3.0, 1.0, 0.0])
    score = mean_score(values, weights, planned=3, seed=0)
    assert score.value == pytest.approx(2.0) and score.n == 4
    assert score.n_windows == 2 and score.coverage == pytest.approx(2 / 3)
    assert mean_score(values, np.zeros(3), planned=3, seed=0).value is None
