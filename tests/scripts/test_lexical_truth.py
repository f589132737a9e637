"""The ground truth script on cases worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import lexical_truth


def test_a_rule_is_as_good_as_both_its_sides() -> None:
    classes = np.array([0, 0, 0, 0, 1, 1, 2, 2], dtype=np.int32)
    exact = classes == 1
    assert lexical_truth.rule_accuracies(exact, classes, 4)[1] == 1.0
    half = np.array([0, 0, 0, 0, 1, 0, 0, 0], dtype=bool)  # fires on one of the two of class 1
    accuracies = lexical_truth.rule_accuracies(half, classes, 4)
    assert accuracies[1] == pytest.approx((1 + 6 / 7) / 2)
    assert accuracies[0] == pytest.approx((0 + 3 / 7) / 2)
    assert np.isnan(accuracies[3])
    assert np.isnan(lexical_truth.rule_accuracies(np.zeros(8, dtype=bool), classes, 4)).all()


def test_classes_are_named_by_whole_words() -> None:
    assert lexical_truth.names_class("Fires strongly on a token of class opening bracket.", "opening bracket")
    assert not lexical_truth.names_class("Fires on the filename.", "name")


def test_rank_correlation_sees_order_only_and_leaves_out_what_is_missing() -> None:
    a, b = np.array([1.0, 2.0, 3.0, np.nan]), np.array([10.0, 200.0, 201.0, 0.0])
    assert lexical_truth.rank_correlation(a, b) == pytest.approx(1.0)
    assert lexical_truth.rank_correlation(a, -b) == pytest.approx(-1.0)
    assert np.isnan(lexical_truth.rank_correlation(a[:2], b[:2]))


def test_firing_starts_a_quarter_into_the_range() -> None:
    assert lexical_truth.threshold(np.array([-1.0, 4.0], dtype=np.float32)) == 1.0
    assert lexical_truth.threshold(np.array([2.0, 6.0], dtype=np.float32)) == 3.0
