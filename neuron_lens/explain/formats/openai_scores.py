"""OpenAI's splits and scores of simulations, by its formulas and under its names.

With y the true activations (unnormalised) and p the predicted ones, over all tokens of all texts together:

    ev_correlation_score          the Pearson correlation of y and p
    rsquared_score                1 - mean((y - p)²) / mean(y²)     against zero, not against the mean
    absolute_dev_explained_score  1 - mean|y - p| / mean|y|

The scores of several texts are computed anew over all their tokens, they are no average. Two traps: the last
two compare magnitudes, so they mean nothing for simulations on a scale of 0 to 10 that were not calibrated;
and because rsquared_score is held against zero, a calibrated prediction without any information scores well
above 0. Other tools use these names for other formulas (Transluce's rsquared_score is centred on the mean).
Source: Bills et al., "Language models can explain neurons in language models" (OpenAI, 2023), and its code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.openai_records import (
    ActivationRecord,
    NeuronRecord,
    ScoredSequenceSimulation,
    ScoredSimulation,
    SequenceSimulation,
)

__all__ = [
    "absolute_dev_explained_score",
    "aggregate",
    "ev_correlation_score",
    "interleaved_split",
    "rsquared_score",
    "score_sequence",
    "split_records",
]

Item = TypeVar("Item")

_TOP_SPLITS = ("train", "calibration", "valid", "test")
_RANDOM_SPLITS = ("calibration", "valid", "test")


def ev_correlation_score(true: ArrayLike, predicted: ArrayLike) -> float | None:
    """The Pearson correlation of two lists `[token]`; None where one of them does not vary."""
    y, p = _pair(true, predicted)
    if not len(y) or np.ptp(y) == 0 or np.ptp(p) == 0:
        return None
    with np.errstate(invalid="ignore", divide="ignore"):
        return _finite(np.corrcoef(y, p)[0, 1])


def rsquared_score(true: ArrayLike, predicted: ArrayLike) -> float | None:
    """1 - mean((y - p)²) / mean(y²) of two lists `[token]`; None where y is zero throughout."""
    y, p = _pair(true, predicted)
    return _share_explained(np.square(y - p), np.square(y))


def absolute_dev_explained_score(true: ArrayLike, predicted: ArrayLike) -> float | None:
    """1 - mean|y - p| / mean|y| of two lists `[token]`; None where y is zero throughout."""
    y, p = _pair(true, predicted)
    return _share_explained(np.abs(y - p), np.abs(y))


def score_sequence(
    simulation: SequenceSimulation, true_activations: Sequence[float]
) -> ScoredSequenceSimulation:
    """A simulation of one text with its scores. Raises RequestError when the lengths differ."""
    return ScoredSequenceSimulation(
        simulation=simulation,
        true_activations=tuple(true_activations),
        **_scores(true_activations, _known(simulation.expected_activations)),
    )


def aggregate(scored: Sequence[ScoredSequenceSimulation]) -> ScoredSimulation:
    """Simulations of several texts with their scores over all tokens together."""
    true = [value for one in scored for value in _known(one.true_activations)]
    predicted = [value for one in scored for value in _known(one.simulation.expected_activations)]
    return ScoredSimulation(scored_sequence_simulations=tuple(scored), **_scores(true, predicted))


def interleaved_split(
    top: Sequence[Item], random: Sequence[Item], n_per_split: int | None = None
) -> dict[str, tuple[Item, ...]]:
    """OpenAI's split: "train", "calibration", "valid" and "test", no place in two of them.

    The top list (most active first) is dealt to all four in turn, the random list to the last three, and those
    three have as many of one as of the other. Without `n_per_split`, as many as both lists allow. Only places
    are disjoint: a text that is both in `top` and in `random` can still be in two splits.
    Raises RequestError when a list is too short.
    """
    most = min(len(top) // len(_TOP_SPLITS), len(random) // len(_RANDOM_SPLITS))
    n = most if n_per_split is None else n_per_split
    if not 0 < n <= most:
        raise RequestError(
            f"{len(top)} top and {len(random)} random records give at most {most} records of each to a split, not "
            f"{n}; {n} need {len(_TOP_SPLITS) * max(n, 1)} and {len(_RANDOM_SPLITS) * max(n, 1)}"
        )
    dealt = _deal(top, _TOP_SPLITS, n)
    dealt_random = _deal(random, _RANDOM_SPLITS, n)
    return {name: part + dealt_random.get(name, ()) for name, part in dealt.items()}


def split_records(
    record: NeuronRecord, n_per_split: int | None = None
) -> dict[str, tuple[ActivationRecord, ...]]:
    """`interleaved_split` of a neuron's highest and random records."""
    return interleaved_split(record.most_positive_activation_records, record.random_sample, n_per_split)


def _deal(items: Sequence[Item], names: Sequence[str], n: int) -> dict[str, tuple[Item, ...]]:
    stride = len(names)
    return {name: tuple(items[first : n * stride : stride]) for first, name in enumerate(names)}


def _scores(true: Sequence[float], predicted: Sequence[float]) -> Mapping[str, Any]:
    return {
        "ev_correlation_score": ev_correlation_score(true, predicted),
        "rsquared_score": rsquared_score(true, predicted),
        "absolute_dev_explained_score": absolute_dev_explained_score(true, predicted),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    if None in values:
        raise RequestError(
            "a simulation with missing values (null) cannot be scored: leave it out, a missing prediction is no zero"
        )
    return [value for value in values if value is not None]


def _pair(true: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    y, p = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if y.shape != p.shape or y.ndim != 1:
        raise RequestError(
            f"{y.size} true and {p.size} predicted activations were given; expected two lists of one length"
        )
    return y, p


def _share_explained(error: NDArray[np.float64], scale: NDArray[np.float64]) -> float | None:
    return _finite(1 - error.mean() / scale.mean()) if scale.any() else None


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
