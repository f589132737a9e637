"""OpenAI's scores against sums worked out by hand, and its split, of which no two parts share a place."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.openai_records import SequenceSimulation
from neuron_lens.explain.formats.openai_scores import (
    absolute_dev_explained_score,
    aggregate,
    ev_correlation_score,
    interleaved_split,
    rsquared_score,
    score_sequence,
)


def simulation(*values: float | None) -> SequenceSimulation:
    return SequenceSimulation(
        tokens=("t",) * len(values),
        expected_activations=values,
        activation_scale="neuron_activations",
        distribution_values=(),
        distribution_probabilities=(),
    )


def test_scores_worked_by_hand() -> None:
    true, predicted = [0.0, 1.0, 2.0, 5.0], [1.0, 1.0, 2.0, 4.0]
    # errors -1, 0, 0, 1: squares sum to 2 of 0 + 1 + 4 + 25 = 30; magnitudes to 2 of 0 + 1 + 2 + 5 = 8
    assert rsquared_score(true, predicted) == pytest.approx(1 - 2 / 30)
    assert absolute_dev_explained_score(true, predicted) == pytest.approx(1 - 2 / 8)
    # about the means 2 and 2: products 2 + 1 + 0 + 6 = 9, squares 4 + 1 + 0 + 9 = 14 and 1 + 1 + 0 + 4 = 6
    assert ev_correlation_score(true, predicted) == pytest.approx(9 / (14 * 6) ** 0.5)


def test_rsquared_is_held_against_zero_and_not_against_the_mean() -> None:
    true = [3.0, 5.0]
    assert rsquared_score(true, [4.0, 4.0]) == pytest.approx(1 - 2 / 34)  # about the mean this would be 0
    assert rsquared_score(true, [0.0, 0.0]) == 0
    assert absolute_dev_explained_score(true, [0.0, 0.0]) == 0


def test_what_is_undefined_is_none() -> None:
    assert ev_correlation_score([1.0, 2.0], [3.0, 3.0]) is None
    assert ev_correlation_score([], []) is None
    assert rsquared_score([0.0, 0.0], [1.0, 2.0]) is None
    assert absolute_dev_explained_score([0.0], [1.0]) is None


def test_scores_of_several_texts_are_pooled_and_no_average() -> None:
    one, two = (
        score_sequence(simulation(0.0, 1.0), [0.0, 1.0]),
        score_sequence(simulation(2.0, 1.0), [1.0, 2.0]),
    )
    both = aggregate([one, two])
    assert (one.ev_correlation_score, two.ev_correlation_score) == (pytest.approx(1), pytest.approx(-1))
    # all tokens: true 0 1 1 2, predicted 0 1 2 1, about the mean 1: products 1 + 0 + 0 + 0, squares 2 and 2
    assert both.ev_correlation_score == pytest.approx(1 / 2)
    assert both.rsquared_score == pytest.approx(1 - 2 / 6)
    assert both.absolute_dev_explained_score == pytest.approx(1 - 2 / 4)
    assert both.get_preferred_score() == both.ev_correlation_score


def test_missing_predictions_and_unequal_lengths_are_refused() -> None:
    with pytest.raises(RequestError, match="missing prediction is no zero"):
        score_sequence(simulation(None, 1.0), [0.0, 1.0])
    with pytest.raises(RequestError, match="3 true and 2 predicted"):
        score_sequence(simulation(0.0, 1.0), [0.0, 1.0, 2.0])


def test_the_split_of_five_is_the_published_one() -> None:
    top, random = [f"top{i}" for i in range(20)], [f"random{i}" for i in range(15)]
    split = interleaved_split(top, random, 5)
    assert split["train"] == tuple(f"top{i}" for i in (0, 4, 8, 12, 16))
    assert split["valid"] == (
        *(f"top{i}" for i in (2, 6, 10, 14, 18)),
        *(f"random{i}" for i in (1, 4, 7, 10, 13)),
    )


@given(st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(-1, 12))
def test_no_place_is_in_two_splits(n_top: int, n_random: int, n: int | None) -> None:
    top, random = [("top", i) for i in range(n_top)], [("random", i) for i in range(n_random)]
    most = min(n_top // 4, n_random // 3)
    if (n is None and not most) or (n is not None and not 0 < n <= most):
        with pytest.raises(RequestError, match=f"at most {most} records"):
            interleaved_split(top, random, n)
        return
    split = interleaved_split(top, random, n)
    places = [place for part in split.values() for place in part]
    assert len(places) == len(set(places))
    size = most if n is None else n
    for name, part in split.items():
        kinds = [kind for kind, _ in part]
        assert (kinds.count("top"), kinds.count("random")) == (size, 0 if name == "train" else size)
