"""Calibrations: what they fit, what they refuse, and what they leave of the null."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.explain.calibration import calibrated, linear, percentile, scale

LEVELS = st.lists(st.integers(0, 10), min_size=2, max_size=40)


def test_scale_undoes_the_display_and_none_does_nothing() -> None:
    levels = np.array([0.0, 5.0, 10.0])
    assert scale(4.0).apply(levels).tolist() == [0.0, 2.0, 4.0]
    empty = np.array([])
    assert calibrated("none", 4.0, empty, empty).apply(levels).tolist() == [0.0, 5.0, 10.0]


@given(LEVELS, st.floats(0.1, 5), st.floats(-3, 3))
@settings(deadline=None)
def test_linear_finds_a_rising_line_and_refuses_a_falling_one(
    levels: list[int], slope: float, base: float
) -> None:
    predicted = np.array(levels, dtype=float)
    rising, falling = linear(predicted, base + slope * predicted), linear(predicted, base - slope * predicted)
    if np.ptp(predicted) == 0:
        assert rising.refused is not None and "do not vary" in rising.refused
        return
    assert rising.refused is None
    np.testing.assert_allclose(rising.apply(predicted), base + slope * predicted, atol=1e-8)
    assert falling.refused is not None and "turn its sign" in falling.refused
    assert np.isnan(falling.apply(predicted)).all()


@given(LEVELS, st.integers(0, 1000))
@settings(deadline=None)
def test_percentile_matching_rises_keeps_the_mean_and_gives_ties_their_own_mean(
    levels: list[int], seed: int
) -> None:
    predicted = np.array(levels, dtype=float)
    true = np.random.default_rng(seed).exponential(size=len(levels))
    matched = percentile(predicted, true).apply(predicted)
    order = np.argsort(predicted, kind="stable")
    assert (np.diff(matched[order]) >= -1e-12).all()
    assert matched.mean() == pytest.approx(true.mean())
    lowest = predicted == predicted.min()
    assert matched[lowest] == pytest.approx(np.sort(true)[: lowest.sum()].mean())


def test_many_tied_zeros_do_not_become_the_largest_silent_activation() -> None:
    predicted = np.array([0.0] * 9 + [10.0])
    true = np.array([0.0] * 8 + [3.0, 9.0])
    assert percentile(predicted, true).apply(np.array([0.0]))[0] == pytest.approx(3 / 9)
    assert percentile(np.array([]), np.array([])).refused is not None


def test_after_a_linear_fit_noise_still_explains_squares() -> None:
    """The trap the docstring names: OpenAI's r-squared compares with zero, so a fitted mean is worth something."""
    rng = np.random.default_rng(0)
    fitted = 0
    for _ in range(40):
        predicted, true = rng.integers(0, 11, 400).astype(float), rng.exponential(size=400)
        fit = linear(predicted, true)
        if fit.refused is None:
            fitted += 1
            error = true - fit.apply(predicted)
            assert 1 - (error**2).mean() / (true**2).mean() > 0.3
    assert 10 < fitted < 30  # noise falls as often as it rises
