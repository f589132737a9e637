"""From predicted levels (0 to 10) to activations: which line or curve, and what each does to a score.

    name         maps a level k to                          fitted on
    none         k                                          nothing
    scale        k / 10 x the largest training activation   nothing but that one number
    linear       a + b k, least squares                     validation windows
    percentile   the activation of the same rank            validation windows

Traps. Correlation does not depend on the choice as long as the map rises; it is always reported of the levels
themselves, because a fitted slope below zero would turn an explanation that is wrong (r = -0.46) into one that looks right
(r = +0.46): a linear fit that falls is refused. With "none", r-squared and explained absolute deviation compare levels
with activations and mean nothing unless the unit happens to range from 0 to 10. With "linear", predictions of pure noise
still explain part of the squares, because the fit finds the mean, and OpenAI's r-squared compares with zero, not with the
mean: its null is above 0. Percentile matching is ill-posed where predictions tie (most are 0): every tie here takes the
mean of the activations it stands for, not the largest. Fit on the windows that are scored and all of these flatter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.rendering import LEVELS

__all__ = ["FITTED", "Calibration", "CalibrationName", "calibrated", "linear", "percentile", "scale"]

CalibrationName = Literal["none", "scale", "linear", "percentile"]
FITTED: tuple[CalibrationName, ...] = ("linear", "percentile")

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Calibration:
    """A map from levels to activations, or, with `refused`, the reason why there is none."""

    name: CalibrationName
    apply: Callable[[Floats], Floats]
    refused: str | None = None


def calibrated(name: CalibrationName, largest: float, predicted: Floats, true: Floats) -> Calibration:
    """The calibration of that name; `predicted` and `true` (flat) are those of the validation tokens."""
    if name == "none":
        return Calibration("none", lambda levels: levels)
    if name == "scale":
        return scale(largest)
    return linear(predicted, true) if name == "linear" else percentile(predicted, true)


def scale(largest: float) -> Calibration:
    """Back from the 0 to 10 that activations are shown as."""
    return Calibration("scale", lambda levels: levels * (largest / LEVELS))


def linear(predicted: Floats, true: Floats) -> Calibration:
    """Least squares. Refused when there is nothing to fit, or the line does not rise."""
    if len(predicted) < 2 or np.ptp(predicted) == 0:
        return _refused("linear", f"{len(predicted)} validation tokens with predictions that do not vary")
    slope = float(np.cov(predicted, true, bias=True)[0, 1] / np.var(predicted))
    if slope <= 0:
        return _refused(
            "linear",
            f"the slope on validation is {slope:.3g}: the prediction runs against the activation, and calibrating it "
            "would turn its sign",
        )
    base = float(np.mean(true) - slope * np.mean(predicted))
    return Calibration("linear", lambda levels: base + slope * levels)


def percentile(predicted: Floats, true: Floats) -> Calibration:
    """The activation of the same rank, linear between; ties take the mean of theirs."""
    if not len(predicted):
        return _refused("percentile", "no validation tokens")
    levels, counts = np.unique(predicted, return_counts=True)
    ends = np.cumsum(counts)
    sums = np.concatenate([[0.0], np.cumsum(np.sort(true))])
    matched = (sums[ends] - sums[ends - counts]) / counts
    return Calibration("percentile", lambda given: np.interp(given, levels, matched))


def _refused(name: CalibrationName, reason: str) -> Calibration:
    return Calibration(
        name, lambda levels: np.full_like(levels, np.nan), f"{name} calibration refused: {reason}"
    )
