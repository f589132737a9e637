"""What a judge said beside what is true, and the figures made of it. Numpy only.

A judgement that failed is missing: it enters no figure, and lowers the coverage. Where every example is told alike (all
right, none right), the bootstrap draws the same figure every time and its interval has no width; it is then made of the
Wilson intervals of the shares the figure comes from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.examples import Example
from neuron_lens.explain.scores import Predictions, auc, balanced_accuracy, from_sums, share_score, wilson

__all__ = [
    "Outcome",
    "binary_figures",
    "judgements",
    "judgements_of",
    "precision_at_density",
    "precision_of_sums",
    "ranking_figures",
    "without_value",
]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Outcome:
    """True and predicted values `[example, length]` (length 1 for a judgement of a whole text).

    `present` is True where there is something to predict, `mask` where there is a prediction of it too; `given`
    `[example]` is False where the judge's answer is missing; `fires` and `natural` `[example]` and `stratum` (None
    outside all) are as in `Example`.
    """

    true: Floats
    predicted: Floats
    present: Bools
    mask: Bools
    given: Bools
    fires: Bools
    natural: Bools
    stratum: tuple[int | None, ...]

    @property
    def predictions(self) -> Predictions:
        """As `explain.scores` takes them."""
        return Predictions(self.true, self.predicted, self.mask, self.given, self.natural)

    def only(self, chosen: Bools) -> Self:
        """Some of the examples."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {
            name: value[chosen] for name, value in values.items() if isinstance(value, np.ndarray)
        }
        stratum = tuple(s for s, keep in zip(self.stratum, chosen, strict=True) if keep)
        return replace(self, **kept, stratum=stratum)

    def of_stratum(self, index: int) -> Self:
        """The firing examples of one stratum, with all silent ones."""
        return self.only(np.array([s == index for s in self.stratum], dtype=bool) | ~self.fires)

    def shuffled(self, seed: int) -> Self:
        """The same predictions, dealt to other places at random: what they are worth by chance."""
        there = self.mask & self.given[:, None]
        dealt = self.predicted.copy()
        dealt[there] = np.random.default_rng([seed, 7]).permutation(self.predicted[there])
        return replace(self, predicted=dealt)


def judgements(
    answers: Sequence[float | None],
    *,
    fires: Sequence[bool],
    natural: Sequence[bool],
    stratum: Sequence[int | None] | None = None,
    true: Sequence[float] | None = None,
) -> Outcome:
    """One answer for each example, None where it is missing; `true` defaults to whether the unit fires."""
    truth = np.array(fires if true is None else true, dtype=np.float64)
    there = np.ones((len(answers), 1), dtype=bool)
    return Outcome(
        true=truth[:, None],
        predicted=np.array([0.0 if a is None else float(a) for a in answers], dtype=np.float64)[:, None],
        present=there,
        mask=there,
        given=np.array([answer is not None for answer in answers], dtype=bool),
        fires=np.array(fires, dtype=bool),
        natural=np.array(natural, dtype=bool),
        stratum=tuple(stratum) if stratum is not None else (None,) * len(answers),
    )


def judgements_of(
    examples: Sequence[Example], answers: Sequence[float | None], true: Sequence[float] | None = None
) -> Outcome:
    """`judgements` of windows."""
    return judgements(
        answers,
        fires=[example.fires for example in examples],
        natural=[example.natural for example in examples],
        stratum=[example.stratum for example in examples],
        true=true,
    )


def binary_figures(outcome: Outcome, density: float | None, seed: int) -> dict[str, Score]:
    """Figures of judgements that say yes (above 0.5) or no.

    balanced_accuracy: mean of the shares of true and of false examples told right; chance is 0.5.
    precision: the share of what it says yes to that is true, on the balanced set.
    precision_at_density: the same where truth is as rare as in the corpus; see `precision_at_density`.
    recall, false_positive_rate: shares of the true and of the false examples that get a yes (Wilson's intervals).
    """
    yes, positive = outcome.predicted[:, 0] > 0.5, outcome.true[:, 0] > 0.5
    accuracy = balanced_accuracy(outcome.predictions, 0.5, 0.5, seed)
    hits, false = int((yes & positive & outcome.given).sum()), int((yes & ~positive & outcome.given).sum())
    n_true, n_false = int((positive & outcome.given).sum()), int((~positive & outcome.given).sum())
    return {
        "balanced_accuracy": _with_width(
            accuracy, lambda: _mean_of_shares(hits, n_true, n_false - false, n_false)
        ),
        **_precisions(outcome, yes, density, seed),
        "recall": share_score(yes[positive], outcome.given[positive]),
        "false_positive_rate": share_score(yes[~positive], outcome.given[~positive]),
    }


def ranking_figures(outcome: Outcome, density: float | None, seed: int) -> dict[str, Score]:
    """Figures of judgements that are more or less.

    auc: area under the ROC curve; chance is 0.5.
    precision, precision_at_density: as in `binary_figures`, where the highest predictions count as yes, as many as
    there are true examples.
    """
    given = outcome.given
    n_true = int((outcome.true[given, 0] > 0.5).sum())
    falling = np.sort(outcome.predicted[given, 0])[::-1]
    # Halfway between the last yes and the first no; ties with the first no are no.
    at = float((falling[n_true - 1] + falling[n_true]) / 2) if 0 < n_true < len(falling) else -np.inf
    fewer = min(n_true, len(falling) - n_true)
    area = auc(outcome.predictions, 0.5, seed)
    return {
        # All pairs in order: as good as that many independent pairs as there are examples of the rarer sort.
        "auc": _with_width(area, lambda: wilson(round((area.value or 0.0) * fewer), fewer)),
        **_precisions(outcome, outcome.predicted[:, 0] > at, density, seed),
    }


def _precisions(outcome: Outcome, yes: Bools, density: float | None, seed: int) -> dict[str, Score]:
    said, positive = yes.astype(np.float64), outcome.true[:, 0] > 0.5
    counts = np.stack([said * positive, said], axis=1)
    hits, n_said = (int(total) for total in counts[outcome.given].sum(0))
    precision = from_sums(counts, ratio, given=outcome.given, seed=seed)
    return {
        "precision": _with_width(precision, lambda: wilson(hits, n_said)),
        "precision_at_density": precision_at_density(said * positive, said, positive, outcome, density, seed),
    }


def precision_at_density(
    hits: Floats, said: Floats, positive: Bools, outcome: Outcome, density: float | None, seed: int
) -> Score:
    """The precision where positive examples are the share `density` of all, from natural examples alone.

    `hits` and `said` `[example]` count true and all yes answers. Positive examples weigh d / n+ and the others
    (1 - d) / n-, so that for judgements of whole texts it is r d / (r d + f (1 - d)), with recall r and false positive
    rate f. None without a density, or without natural examples of either sort. Where no false example got a yes, the
    lower end takes Wilson's upper limit for f: at a density of one in a thousand, none of 25 is no proof.
    """
    true, false = (
        (positive & outcome.natural).astype(np.float64),
        (~positive & outcome.natural).astype(np.float64),
    )
    sums = np.stack([hits * true, said * true, true, hits * false, said * false, false], axis=1)
    n = int((outcome.natural & outcome.given).sum())
    return precision_of_sums(sums, outcome.given, density, n=n, seed=seed)


def precision_of_sums(sums: Floats, given: Bools, density: float | None, *, n: int, seed: int) -> Score:
    """`precision_at_density` of counts `[example, 6]`: true yes answers, yes answers and examples among the positive
    ones, then the same three among the others. `n`: examples it rests on."""

    def precision(sums: Floats) -> Floats:
        hits_true, said_true, n_true, hits_false, said_false, n_false = np.moveaxis(sums, -1, 0)
        d = density or 0.0
        with np.errstate(invalid="ignore", divide="ignore"):
            found = d * hits_true / n_true + (1 - d) * hits_false / n_false
            return np.asarray(found / (d * said_true / n_true + (1 - d) * said_false / n_false))

    score = from_sums(sums, precision, given=given, n=n, seed=seed)
    if density is None or score.value is None:
        return without_value(score)
    hits_true, said_true, n_true, _, said_false, n_false = sums[given].sum(0)
    if said_false > 0:
        return score
    could_be = density * said_true / n_true + (1 - density) * wilson(0, int(n_false))[1]
    low = min(score.value, float(density * hits_true / n_true / could_be))
    return score.model_copy(update={"low": round(min(low, score.low if score.low is not None else low), 6)})


def _with_width(score: Score, interval: Callable[[], tuple[float, float]]) -> Score:
    """The score, with another interval where its own has no width."""
    if score.value is None or score.low != score.high:
        return score
    low, high = interval()
    ends = round(min(low, score.value), 6), round(max(high, score.value), 6)
    return score.model_copy(update={"low": ends[0], "high": ends[1]})


def _mean_of_shares(a: int, n_a: int, b: int, n_b: int) -> tuple[float, float]:
    """The interval of the mean of two independent shares, from Wilson's of each (MOVER: Zou & Donner 2008)."""
    (low_a, high_a), (low_b, high_b) = wilson(a, n_a), wilson(b, n_b)
    share_a, share_b = a / n_a, b / n_b
    middle = (share_a + share_b) / 2
    below = math.hypot(share_a - low_a, share_b - low_b) / 2
    above = math.hypot(high_a - share_a, high_b - share_b) / 2
    return middle - below, middle + above


def ratio(sums: Floats) -> Floats:
    """The first quantity by the second; NaN where that is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1], np.nan)


def without_value(score: Score) -> Score:
    """The same evidence, and no figure."""
    return score.model_copy(update={"value": None, "low": None, "high": None})
