"""One unit explained: what was kept of it, dealt into train, validation and test; fitted, simulated, scored.

The parts are masks over one list of window rows, made from the windows' own split, so that a window is in
exactly one part. Numpy only; the causal figure comes from outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.features import FeatureSet
from neuron_lens.explain.result import Control, Explanation, Score, ScoredWindow, SplitCounts
from neuron_lens.explain.scores import Predictions, best_threshold, score_all
from neuron_lens.explain.sentence import describe
from neuron_lens.explain.token_statistics import Examples, FittedPredicate, fit_predicate
from neuron_lens.records import Histogram, QuantileStratum, TokenWindow, Unit, UnitStatistics
from neuron_lens.windows import SPLITS, TextWindows

if TYPE_CHECKING:
    from neuron_lens.harvest.shard import UnitActivations

__all__ = ["ExplainedUnit", "UnitWindows", "explain_windows"]

# A unit fires above this share of its range on the training windows, from 0 or, where it is always above 0
# (the norm of what a head writes), from its smallest activation.
FIRING_SHARE = 0.25
BINS = 48
SHOWN_TOP, SHOWN_QUANTILE, SHOWN_RANDOM = 6, 5, 5
STRATA, SHOWN_IN_STRATUM = 5, 2
NEAR_REASONS = ("similar", "same_token")  # as a harvest codes them
_EXPLAINER = "token_statistics"


@dataclass(frozen=True, eq=False)
class UnitWindows:
    """Distinct windows of one unit: `rows` of the source's windows, `activations` `[window, length]`, and
    which of them belong to the uniform sample, to the unit's own top list, and to the sample of those it
    fires in (units silent almost everywhere). `partners` of heads say how many tokens back the source token lies
    `[window, length]`; `bins` are the edges between which all tokens of the corpus were counted, and the counts.
    Near misses stand beside these windows, which they may be among: `near_rows`, `near_reasons`, and their
    `near_activations` and `near_partners` as above."""

    windows: TextWindows
    rows: NDArray[np.int32]
    activations: NDArray[np.float32]
    random: NDArray[np.bool_]
    top: NDArray[np.bool_]
    moments: NDArray[np.float64]  # mean, variance, third and fourth central moment, minimum, maximum
    n_tokens: int
    fired: NDArray[np.bool_]
    near_rows: NDArray[np.int32]
    near_activations: NDArray[np.float32]
    near_reasons: NDArray[np.int32]
    bins: tuple[NDArray[np.float64], NDArray[np.int64]]
    partners: NDArray[np.int16] | None = None
    near_partners: NDArray[np.int16] | None = None

    @classmethod
    def of(cls, windows: TextWindows, kept: UnitActivations, n_tokens: int) -> UnitWindows:
        """Join the uniform sample and the unit's own lists; a window in several appears once."""
        lists = (kept.random_rows, kept.top_rows, kept.fired_rows, kept.near_rows)
        every, first = np.unique(np.concatenate(lists), return_index=True)
        activations = np.concatenate([kept.random, kept.top, kept.fired, kept.near])[first]
        partners = None if kept.partners is None else kept.partners[first]
        own = first < sum(map(len, lists[:3]))
        # A near miss that is also in another list has the activations it has there: read twice, they differ by rounding.
        near = np.searchsorted(every, kept.near_rows)
        rows = every[own]
        return cls(
            windows=windows,
            rows=rows,
            activations=activations[own],
            random=np.isin(rows, kept.random_rows),
            top=np.isin(rows, kept.top_rows),
            moments=kept.moments,
            n_tokens=n_tokens,
            fired=np.isin(rows, kept.fired_rows),
            near_rows=kept.near_rows,
            near_activations=activations[near],
            near_reasons=kept.near_reasons,
            bins=(kept.histogram_edges, kept.histogram),
            partners=None if partners is None else partners[own],
            near_partners=None if partners is None else partners[near],
        )

    @property
    def split(self) -> NDArray[np.int32]:
        """The part each window belongs to, an index of SPLITS."""
        return self.windows.split[self.rows]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """True where a window has a token, `[window, length]`."""
        return self.windows.present[self.rows]

    def part(self, name: str) -> UnitWindows:
        """The windows of one part: "train", "validation" or "test"."""
        return self.only(self.split == SPLITS.index(name))

    def only(self, chosen: NDArray[np.bool_]) -> UnitWindows:
        """Some of the windows."""
        return replace(
            self,
            rows=self.rows[chosen],
            activations=self.activations[chosen],
            random=self.random[chosen],
            top=self.top[chosen],
            fired=self.fired[chosen],
            partners=None if self.partners is None else self.partners[chosen],
        )

    def examples(self) -> Examples:
        """The tokens as the explainer takes them."""
        return Examples(self.rows, self.mask, self.activations)

    def largest(self) -> NDArray[np.float32]:
        """The largest activation of every window."""
        return np.asarray(np.where(self.mask, self.activations, -np.inf).max(1))

    def records(self, order: NDArray[np.int64]) -> tuple[TokenWindow, ...]:
        """Some windows as records."""
        return _records(self.windows, self.rows, self.activations, self.partners, order)

    def near_misses(self, part: str, reason: str | None = None) -> tuple[TokenWindow, ...]:
        """Windows of a part in which the unit is silent though it might have fired: a most similar unit fires
        there ("similar"), or a token stands there on which it fires most elsewhere ("same_token")."""
        inside = self.windows.split[self.near_rows] == SPLITS.index(part)
        if reason is not None:
            inside &= self.near_reasons == NEAR_REASONS.index(reason)
        return _records(
            self.windows, self.near_rows, self.near_activations, self.near_partners, np.flatnonzero(inside)
        )

    def density(self, threshold: float) -> float:
        """The share of all tokens of the corpus above a threshold.

        Tokens above the bin the threshold lies in are counted; of those inside it, the uniform sample says
        which share is above.
        """
        edges, counts = self.bins
        place = int(np.searchsorted(edges, threshold, side="right"))
        low = edges[place - 1] if place else -np.inf
        high = edges[place] if place < len(edges) else np.inf
        sampled = self.activations[self.random[:, None] & self.mask]
        inside = sampled[(sampled >= low) & (sampled < high)]
        share = float((inside > threshold).mean()) if len(inside) else 0.0
        return float((counts[place + 1 :].sum() + share * counts[place]) / max(self.n_tokens, 1))


def _records(
    windows: TextWindows,
    rows: NDArray[np.int32],
    activations: NDArray[np.float32],
    partners: NDArray[np.int16] | None,
    order: NDArray[np.int64],
) -> tuple[TokenWindow, ...]:
    return tuple(
        windows.record(int(rows[i]), activations[i], partners=None if partners is None else partners[i])
        for i in order
    )


@dataclass(frozen=True, eq=False)
class ExplainedUnit:
    """What is known of a unit before it is scored: its windows, the fit, and when it counts as firing."""

    unit: Unit
    held: UnitWindows
    fitted: FittedPredicate
    explanation: Explanation
    firing_threshold: float

    def predictions(self, by: ExplainedUnit | None = None) -> Predictions:
        """This unit's test windows with the predictions of its own explanation, or of another unit's."""
        test = self.held.part("test")
        predicted = (by or self).fitted.predict(test.rows)
        return Predictions(
            true=test.activations.astype(np.float64),
            predicted=np.array(np.broadcast_to(predicted, test.activations.shape)),
            mask=test.mask,
            given=np.ones(len(test.rows), dtype=bool),
            random=test.random,
        )

    def simulated(self, window: TokenWindow) -> tuple[float, ...]:
        """What the explanation predicts at each token of a window, as it is scored.

        Of any window of the group of units, those of others too. Raises RequestError for one that was not kept.
        """
        rows = self.held.windows.rows_of([window.document_index], [window.start])
        predicted = np.broadcast_to(self.fitted.predict(rows), (1, self.held.windows.length))
        return tuple(predicted[0, : len(window.tokens)].tolist())

    def scores(self, seed: int) -> dict[str, Score]:
        """The explanation's scores on the test windows."""
        return score_all(self.predictions(), self.firing_threshold, self.explanation.firing_threshold, seed)

    def controls(self, other: ExplainedUnit, seed: int) -> tuple[Control, ...]:
        """The same scores for another unit's explanation, and for this one's predictions dealt to other
        tokens."""
        anothers = self.predictions(by=other)
        own = self.predictions()
        shuffled = own.predicted.copy()
        shuffled[own.mask] = np.random.default_rng(seed).permutation(own.predicted[own.mask])
        dealt = Predictions(own.true, shuffled, own.mask, own.given, own.random)
        return (
            Control(
                name="another_unit",
                description=f"the explanation of {other.unit}",
                sentence=other.explanation.sentence,
                scores=score_all(anothers, self.firing_threshold, other.explanation.firing_threshold, seed),
            ),
            Control(
                name="shuffled",
                description="this explanation's predictions, dealt to other tokens at random",
                sentence=None,
                scores=score_all(dealt, self.firing_threshold, self.explanation.firing_threshold, seed),
            ),
        )

    def statistics(self) -> UnitStatistics:
        """Moments and density over all tokens; histogram over the uniform sample."""
        mean, variance, third, fourth, low, high = (float(value) for value in self.held.moments)
        sample = self.held.only(self.held.random)
        values = sample.activations[sample.mask].astype(np.float64)
        # A constant unit still gets a histogram: one that is one bin wide.
        span = (low, high) if high > low else (low - 0.5, low + 0.5)
        counts, edges = np.histogram(np.clip(values, *span), bins=BINS, range=span)
        varies = variance > 1e-12
        return UnitStatistics(
            n_tokens=self.held.n_tokens,
            mean=_rounded(mean),
            variance=_rounded(variance),
            skewness=_rounded(third / variance**1.5) if varies else None,
            kurtosis=_rounded(fourth / variance**2) if varies else None,
            minimum=_rounded(low),
            maximum=_rounded(high),
            firing_threshold=self.firing_threshold,
            density=self.held.density(self.firing_threshold),
            histogram=Histogram(
                edges=tuple(_rounded(e) for e in edges), counts=tuple(int(c) for c in counts)
            ),
        )

    def splits(self) -> SplitCounts:
        """How many windows each part holds."""
        sizes = np.bincount(self.held.split, minlength=len(SPLITS))
        return SplitCounts(**{name: int(size) for name, size in zip(SPLITS, sizes, strict=True)})

    def train_top(self) -> tuple[TokenWindow, ...]:
        """The training windows with the largest activations, largest first."""
        top = self.held.part("train")
        return top.records(np.argsort(-top.largest(), kind="stable")[:SHOWN_TOP])

    def strata(self) -> tuple[QuantileStratum, ...]:
        """Training windows by the size of their largest activation, in equal counts.

        Those of the uniform sample; of a unit silent almost everywhere also those of the sample it fires in.
        """
        train = self.held.part("train")
        train = train.only(train.random | train.fired)
        largest = train.largest()
        order = np.argsort(largest, kind="stable")
        bounds = np.linspace(0, len(order), STRATA + 1).astype(int)
        strata = []
        for index, (begin, end) in enumerate(pairwise(bounds)):
            if begin == end:
                continue
            high = largest[order[min(end, len(order) - 1)]]
            spread = np.linspace(begin, end - 1, min(SHOWN_IN_STRATUM, end - begin)).astype(int)
            strata.append(
                QuantileStratum(
                    index=index,
                    low=_rounded(float(largest[order[begin]])),
                    high=_rounded(float(high)),
                    windows=train.records(order[spread]),
                )
            )
        return tuple(strata)

    def shown_tests(self) -> tuple[ScoredWindow, ...]:
        """Some test windows with what was predicted: the top, across the quantiles, and at random."""
        test = self.held.part("test")
        predicted = self.predictions().predicted
        largest = test.largest()
        falling = np.argsort(-largest, kind="stable")
        chosen: dict[int, str] = {int(i): "top" for i in falling[:SHOWN_TOP]}
        rest = [int(i) for i in falling[::-1] if int(i) not in chosen and test.random[i]]
        for place in np.linspace(0, len(rest) - 1, min(SHOWN_QUANTILE, len(rest))).astype(int):
            chosen.setdefault(rest[place], "quantile")
        for i in sorted(rest)[: SHOWN_RANDOM + SHOWN_QUANTILE]:
            if sum(stratum == "random" for stratum in chosen.values()) < SHOWN_RANDOM:
                chosen.setdefault(i, "random")
        windows = []
        for i, stratum in chosen.items():
            (window,) = test.records(np.array([i]))
            simulated = tuple(round(float(value), 4) for value in predicted[i][: len(window.tokens)])
            windows.append(ScoredWindow(window=window, simulated=simulated, stratum=stratum))
        return tuple(windows)


def explain_windows(
    unit: Unit, held: UnitWindows, features: FeatureSet, logits: NDArray[np.floating[Any]] | None
) -> ExplainedUnit:
    """Fit the token-statistics explainer on train and validation. `logits` `[d_vocab]`: the unit's
    output, if known."""
    train, validation = held.part("train"), held.part("validation")
    fitted = fit_predicate(features.of_unit(logits), train.examples(), validation.examples())
    largest = float(train.examples().values.max(initial=0.0))
    smallest = max(float(train.examples().values.min(initial=largest)), 0.0)
    firing_threshold = max(_rounded(smallest + FIRING_SHARE * (largest - smallest)), 0.0)
    predicted = np.broadcast_to(fitted.predict(validation.rows), validation.mask.shape)[validation.mask]
    true = validation.examples().values
    predicate = fitted.written()
    explanation = Explanation(
        explainer=_EXPLAINER,
        sentence=describe(predicate, largest, fitted.validation_correlation),
        predicate=predicate,
        firing_threshold=best_threshold(true, predicted, firing_threshold) if len(true) else None,
    )
    return ExplainedUnit(unit, held, fitted, explanation, firing_threshold)


def _rounded(value: float) -> float:
    """Six significant digits: what is written is what is meant."""
    return float(f"{value:.6g}")
