"""How well a prediction of activations does, with bootstrap intervals over windows. Numpy only.

The window is what is resampled, because tokens of one window are not independent. Every score is a function
of additive or sortable quantities of windows, so that a thousand resamples cost one matrix product. A window
without a prediction is missing: it lowers the coverage and enters no figure. A score of what does not vary is
None.

Intervals are percentile intervals, widened as Hesterberg ("What Teachers Should Know About the Bootstrap", 2015,
section 4.2: the expanded percentile interval) says, because plain ones are too narrow for few windows. Below about
eight windows these are still too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.result import Score

__all__ = [
    "MINIMUM_COVERAGE",
    "Predictions",
    "auc",
    "balanced_accuracy",
    "best_threshold",
    "correlation",
    "from_sums",
    "mean_score",
    "score_all",
    "share_score",
    "wilson",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

MINIMUM_COVERAGE = 0.5  # below this share of windows with a prediction, there is no score
RESAMPLES = 1000
AUC_RESAMPLES = 200
_DECIMALS = 6


@dataclass(frozen=True, eq=False)
class Predictions:
    """True and predicted activations `[window, length]`; `mask` is True where there is a token.

    `given` `[window]` is False for windows whose prediction failed; `random` marks those of the random
    sample.
    """

    true: Floats
    predicted: Floats
    mask: Bools
    given: Bools
    random: Bools

    def only(self, windows: Bools) -> Predictions:
        """The predictions of some windows."""
        return Predictions(
            self.true[windows],
            self.predicted[windows],
            self.mask[windows],
            self.given[windows],
            self.random[windows],
        )


def score_all(
    predictions: Predictions, firing_threshold: float, predicted_threshold: float | None, seed: int
) -> dict[str, Score]:
    """All scores of one prediction, by name; see UnitResult.scores."""
    return {
        "correlation": correlation(predictions, seed),
        "correlation_random": correlation(predictions.only(predictions.random), seed),
        "detection_accuracy": balanced_accuracy(predictions, firing_threshold, predicted_threshold, seed),
        "detection_auc": auc(predictions, firing_threshold, seed),
    }


def correlation(predictions: Predictions, seed: int) -> Score:
    """Pearson correlation pooled over tokens; for a window, the sums that it is made of."""
    kept = predictions.only(predictions.given)
    # Centring first keeps the sums of squares from cancelling.
    true = np.where(kept.mask, kept.true - _mean(kept.true, kept.mask), 0.0)
    predicted = np.where(kept.mask, kept.predicted - _mean(kept.predicted, kept.mask), 0.0)
    sums = np.stack(
        [
            kept.mask.sum(1),
            true.sum(1),
            predicted.sum(1),
            (true * true).sum(1),
            (predicted * predicted).sum(1),
            (true * predicted).sum(1),
        ],
        axis=1,
    ).astype(np.float64)
    return _bootstrap(predictions, sums, _pearson, seed)


def _pearson(sums: Floats) -> Floats:
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        covariance = xy - x * y / n
        spread = (xx - x * x / n) * (yy - y * y / n)
        # What is constant up to rounding has no correlation.
        return np.where(
            spread > 1e-18 * np.maximum(xx * yy, 1e-300), covariance / np.sqrt(np.abs(spread)), np.nan
        )


def balanced_accuracy(
    predictions: Predictions, firing_threshold: float, predicted_threshold: float | None, seed: int
) -> Score:
    """Mean of the shares of firing and of silent tokens that are told right; 0.5 is chance.

    A token fires above `firing_threshold`, and is said to above `predicted_threshold` (None: no score).
    """
    kept = predictions.only(predictions.given)
    if predicted_threshold is None:
        return _no_score(predictions)
    fires = (kept.true > firing_threshold) & kept.mask
    silent = ~fires & kept.mask
    said = kept.predicted > predicted_threshold
    sums = np.stack([(fires & said).sum(1), fires.sum(1), (silent & ~said).sum(1), silent.sum(1)], axis=1)
    return _bootstrap(predictions, sums.astype(np.float64), _balanced, seed)


def _balanced(sums: Floats) -> Floats:
    hits, fires, rejections, silent = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((fires > 0) & (silent > 0), (hits / fires + rejections / silent) / 2, np.nan)


def best_threshold(true: Floats, predicted: Floats, firing_threshold: float) -> float | None:
    """The predicted activation that separates firing from silent tokens best (balanced accuracy); flat
    arrays.

    None when all tokens fire, none does, or the prediction never varies.
    """
    fires = true > firing_threshold
    if fires.all() or not fires.any() or predicted.min() == predicted.max():
        return None
    levels, place = np.unique(predicted, return_inverse=True)
    hits = np.cumsum(np.bincount(place, fires, minlength=len(levels))[::-1])[::-1] / fires.sum()
    false = np.cumsum(np.bincount(place, ~fires, minlength=len(levels))[::-1])[::-1] / (~fires).sum()
    # Saying "fires" from levels[i] on; the threshold lies between two levels.
    best = int(np.argmax((hits - false)[1:])) + 1
    return float((levels[best - 1] + levels[best]) / 2)


def auc(predictions: Predictions, firing_threshold: float, seed: int) -> Score:
    """Area under the ROC curve of the prediction for "fires at this token"; ties count half."""
    kept = predictions.only(predictions.given)
    window = np.broadcast_to(np.arange(len(kept.true))[:, None], kept.mask.shape)[kept.mask]
    fires = (kept.true > firing_threshold)[kept.mask]
    _, place = np.unique(kept.predicted[kept.mask], return_inverse=True)
    order = np.argsort(place, kind="stable")
    place, fires, window = place[order], fires[order], window[order]
    begins = np.flatnonzero(np.diff(place, prepend=-1))

    def areas(weights: Floats) -> Floats:
        if not len(begins):
            return np.full(len(weights), np.nan)
        by_token = weights[:, window]
        positive = np.add.reduceat(by_token * fires, begins, axis=1)
        negative = np.add.reduceat(by_token * ~fires, begins, axis=1)
        below = np.cumsum(negative, axis=1) - negative
        total = positive.sum(1) * negative.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 0, (positive * (below + negative / 2)).sum(1) / total, np.nan)

    return _interval(predictions, areas, AUC_RESAMPLES, seed)


def mean_score(values: Floats, weights: Floats, planned: int, seed: int) -> Score:
    """A weighted mean of per-window means `values` `[window]`; `weights` are the tokens each rests on."""
    used = weights > 0
    sums = np.stack([np.where(used, values, 0.0) * weights, weights], axis=1)
    tokens = Predictions(sums, sums, np.ones(sums.shape, dtype=bool), used, used)
    score = (
        _bootstrap(tokens, sums[used], lambda s: s[..., 0] / s[..., 1], seed)
        if used.any()
        else _no_score(tokens)
    )
    return score.model_copy(update={"n": int(weights.sum()), "coverage": _share(int(used.sum()), planned)})


def from_sums(
    sums: Floats,
    figure: Callable[[Floats], Floats],
    *,
    given: Bools,
    n: int | None = None,
    seed: int,
    decimals: int = _DECIMALS,
) -> Score:
    """A figure of sums over windows, with its interval.

    `sums` `[window, quantity]`; windows that are not `given` do not enter. `figure` takes summed quantities
    `[resample, quantity]` and gives `[resample]`, NaN where there is none. `n`: what the figure rests on (default: the
    windows). `decimals` are kept: more of a figure that is small by nature.
    """
    kept = sums[given]
    n = int(given.sum()) if n is None else n
    return _interval_of(
        lambda weights: figure(weights @ kept),
        given=given,
        n=n,
        resamples=RESAMPLES,
        seed=seed,
        decimals=decimals,
    )


def share_score(right: Bools, given: Bools) -> Score:
    """The share of given windows that are right, with Wilson's interval (1927).

    Not the bootstrap: for few windows with a share near 0 or 1 that covers the truth too rarely, and for none or all
    right it has no width.
    """
    n, planned = int(given.sum()), len(given)
    coverage = _share(n, planned)
    if n < 2 or coverage < MINIMUM_COVERAGE:
        return Score(value=None, low=None, high=None, n=n, n_windows=n, coverage=coverage)
    low, high = wilson(int(right[given].sum()), n)
    return Score(
        value=round(float(right[given].mean()), 6), low=round(low, 6), high=round(high, 6),
        n=n, n_windows=n, coverage=coverage,
    )  # fmt: skip


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `n` (at least 1)."""
    share, z = right / n, _Z
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def _bootstrap(
    predictions: Predictions, sums: Floats, figure: Callable[[Floats], Floats], seed: int
) -> Score:
    return _interval(predictions, lambda weights: figure(weights @ sums), RESAMPLES, seed)


def _interval(
    predictions: Predictions, figure: Callable[[Floats], Floats], resamples: int, seed: int
) -> Score:
    """Value and interval of a figure of window weights `[resample, window]`."""
    n = int(predictions.mask[predictions.given].sum())
    return _interval_of(figure, given=predictions.given, n=n, resamples=resamples, seed=seed)


def _interval_of(
    figure: Callable[[Floats], Floats],
    *,
    given: Bools,
    n: int,
    resamples: int,
    seed: int,
    decimals: int = _DECIMALS,
) -> Score:
    n_windows = int(given.sum())
    coverage = _share(n_windows, len(given))
    none = Score(value=None, low=None, high=None, n=n, n_windows=n_windows, coverage=coverage)
    if n_windows < 2 or coverage < MINIMUM_COVERAGE:
        return none
    value = float(figure(np.ones((1, n_windows)))[0])
    resampled = figure(_resample_weights(n_windows, resamples, seed))
    resampled = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or len(resampled) < resamples / 2:
        return none
    tail = _tail(n_windows)
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Score(
        value=round(value, decimals), low=round(float(low), decimals), high=round(float(high), decimals),
        n=n, n_windows=n_windows, coverage=coverage,
    )  # fmt: skip


_Z = 1.959964  # 97.5 % quantile of the normal distribution


@lru_cache
def _tail(n: int) -> float:
    """The share of resamples below the interval: that of the normal distribution below -t sqrt(n / (n - 1)).

    t is Student's 97.5 % quantile for n - 1 degrees of freedom (Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5).
    """
    z, free = _Z, max(n - 1, 1)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return 0.5 * math.erfc(t * math.sqrt(n / free) / math.sqrt(2))


@lru_cache(maxsize=16)
def _resample_weights(n_windows: int, resamples: int, seed: int) -> Floats:
    """How often each resample draws each window, `[resample, window]`; not to be written to."""
    random = np.random.default_rng(seed)
    counts = random.multinomial(n_windows, np.full(n_windows, 1 / n_windows), size=resamples)
    weights = counts.astype(np.float64)
    weights.flags.writeable = False
    return weights


def _no_score(predictions: Predictions) -> Score:
    given = int(predictions.given.sum())
    n = int(predictions.mask[predictions.given].sum())
    return Score(
        value=None, low=None, high=None, n=n, n_windows=given, coverage=_share(given, len(predictions.given))
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _mean(values: Floats, mask: Bools) -> float:
    return float(values[mask].mean()) if mask.any() else 0.0
