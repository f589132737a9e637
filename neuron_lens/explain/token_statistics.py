"""The built-in explainer: readable tables of the text's features, fitted to the activations.

An explanation is a sum of at most a few tables. Each table is one feature (the token, the token before,
the lexical class, ...) with the mean effect of each of its values: the sum of the residual over the
tokens with that value, divided by their number plus a constant (shrinkage: what was seen once is not
believed). Tables are added one at a time, the feature and the shrinkage being those that predict the
validation windows best, then fitted again in turn (backfitting, Breiman & Friedman 1985), cut to the
entries that matter, and said in one sentence. What is simulated and scored is the predicate exactly as it
is written down, with its cut tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.features import CodedFeature
from neuron_lens.explain.result import Predicate, Table, TableEntry

__all__ = ["Examples", "FittedPredicate", "FittedTable", "fit_predicate"]

Floats = NDArray[np.float64]

MAX_TABLES = 3
MAX_ENTRIES = 128  # written down of a table: the longest that can still be read
_SHRINKAGE = (1.0, 4.0, 16.0, 64.0)
_KEPT_SHARE = 0.995  # of a table's explained variance that its written entries hold
_MIN_GAIN = 0.01  # of the validation variance, for one more table
_TOLERANCE = 0.02  # of the validation variance, given up for a simpler feature


@dataclass(frozen=True, eq=False)
class Examples:
    """Tokens of some windows with one unit's activations: `rows` of the feature set's windows, `mask` and
    `activations` `[row, length]`."""

    rows: NDArray[np.int32]
    mask: NDArray[np.bool_]
    activations: NDArray[np.float32]

    @property
    def values(self) -> Floats:
        """The activations of the tokens that are there, flat."""
        return np.asarray(self.activations[self.mask], dtype=np.float64)

    def codes(self, feature: CodedFeature) -> NDArray[np.int32]:
        """The feature's codes of the same tokens, flat."""
        return np.asarray(feature.codes[self.rows][self.mask])


@dataclass(frozen=True, eq=False)
class FittedTable:
    """Effects by code of one feature; zero for values that are not written down."""

    feature: CodedFeature
    effects: Floats
    counts: NDArray[np.int64]
    shrinkage: float
    share: float = 0.0


@dataclass(frozen=True, eq=False)
class FittedPredicate:
    """A predicate that can be evaluated on the windows of its feature set."""

    base: float
    floor: float
    tables: tuple[FittedTable, ...]
    validation_correlation: float

    def predict(self, rows: NDArray[np.int32]) -> Floats:
        """The predicted activation `[row, length]`; `[row, 1]` when it is the same everywhere."""
        first = self.tables[0].feature.codes[rows] if self.tables else None
        if first is None:
            return np.full((len(rows), 1), self.base)
        total: Floats = np.full(first.shape, self.base)
        for table in self.tables:
            total += table.effects[table.feature.codes[rows]]
        return np.asarray(np.maximum(total, self.floor), dtype=np.float64)

    def written(self) -> Predicate:
        """The predicate as a record: what the sentence summarises and the simulation uses."""
        tables = []
        for table in self.tables:
            codes = np.flatnonzero(table.effects)
            codes = codes[
                np.argsort(-np.abs(table.effects[codes]) * np.sqrt(table.counts[codes]), kind="stable")
            ]
            entries = tuple(
                TableEntry(
                    key=table.feature.label(int(code)),
                    value=float(table.effects[code]),
                    n=int(table.counts[code]),
                )
                for code in codes
            )
            tables.append(
                Table(
                    feature=table.feature.name, title=table.feature.title, entries=entries, share=table.share
                )
            )
        return Predicate(base=self.base, floor=self.floor, tables=tuple(tables))


@dataclass(frozen=True, eq=False)
class _Part:
    """One feature on the training and validation tokens."""

    feature: CodedFeature
    train: NDArray[np.int32]
    validation: NDArray[np.int32]


def fit_predicate(
    features: Sequence[CodedFeature], train: Examples, validation: Examples, max_tables: int = MAX_TABLES
) -> FittedPredicate:
    """Fit on train, choose on validation. Effects are rounded to what is written down."""
    y, y_validation = train.values, validation.values
    base = float(y.mean()) if len(y) else 0.0
    floor = float(y.min()) if len(y) else 0.0
    residual, residual_validation = y - base, y_validation - base
    total = float(np.mean(residual_validation**2))
    tables: list[tuple[_Part, FittedTable]] = []
    parts = [_Part(feature, train.codes(feature), validation.codes(feature)) for feature in features]
    while len(tables) < max_tables and total > 0:
        before = float(np.mean(residual_validation**2))
        part, table = _simplest(
            [_best_shrinkage(part, residual, residual_validation) for part in parts],
            total * len(y_validation),
        )
        after = float(np.mean((residual_validation - table.effects[part.validation]) ** 2))
        # The first table is always written down: a poor explanation has a score too, and it says so.
        if tables and before - after < _MIN_GAIN * total:
            break
        residual = residual - table.effects[part.train]
        residual_validation = residual_validation - table.effects[part.validation]
        tables.append((part, table))
    tables = _backfit(tables, y - base)
    cut = [_cut(table, y - base) for _, table in tables]
    base, cut_tables = _recentre(base, [part for part, _ in tables], cut, y)
    fitted = FittedPredicate(round(base, 5), round(floor, 5), tuple(cut_tables), 0.0)
    return replace(fitted, validation_correlation=_correlation(_flat(fitted, validation), y_validation))


def _flat(fitted: FittedPredicate, examples: Examples) -> Floats:
    predicted = np.broadcast_to(fitted.predict(examples.rows), examples.mask.shape)
    return np.asarray(predicted[examples.mask])


def _correlation(a: Floats, b: Floats) -> float:
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _means(codes: NDArray[np.int32], n_keys: int, residual: Floats) -> tuple[Floats, NDArray[np.int64]]:
    """Sum of the residual and number of tokens, by code."""
    sums = np.bincount(codes, residual, minlength=n_keys)
    return np.asarray(sums, dtype=np.float64), np.asarray(
        np.bincount(codes, minlength=n_keys), dtype=np.int64
    )


def _simplest(tried: Sequence[tuple[_Part, FittedTable, float]], total: float) -> tuple[_Part, FittedTable]:
    """The first feature that comes close to the best one: features are listed from simple to complex.

    `total` is the validation sum of squares; close is within _TOLERANCE of it.
    """
    best = min(change for _, _, change in tried)
    return next((part, table) for part, table, change in tried if change <= best + _TOLERANCE * total)


def _best_shrinkage(
    part: _Part, residual: Floats, residual_validation: Floats
) -> tuple[_Part, FittedTable, float]:
    """The feature's table with the shrinkage that leaves the smallest validation error, and that error."""
    sums, counts = _means(part.train, part.feature.n_keys, residual)
    # Only sums by code are needed to compare: error = sum r^2 - 2 e.s + n e^2.
    sums_validation, counts_validation = _means(part.validation, part.feature.n_keys, residual_validation)
    best: tuple[float, float, Floats] | None = None
    for shrinkage in _SHRINKAGE:
        effects = _heaviest(sums / (counts + shrinkage), counts)
        change = float(effects @ (counts_validation * effects - 2 * sums_validation))
        if best is None or change < best[0]:
            best = (change, shrinkage, effects)
    assert best is not None, "there is at least one shrinkage to try"
    return part, FittedTable(part.feature, best[2], counts, best[1]), best[0]


def _backfit(
    tables: list[tuple[_Part, FittedTable]], target: Floats, sweeps: int = 2
) -> list[tuple[_Part, FittedTable]]:
    """Fit every table again to what the others leave."""
    if len(tables) < 2:
        return tables
    fitted = list(tables)
    residual = target - sum(table.effects[part.train] for part, table in fitted)
    for _ in range(sweeps):
        for place, (part, table) in enumerate(fitted):
            own = residual + table.effects[part.train]
            sums, counts = _means(part.train, part.feature.n_keys, own)
            effects = np.where(table.effects != 0, sums / (counts + table.shrinkage), 0.0)
            residual = own - effects[part.train]
            fitted[place] = (part, replace(table, effects=effects))
    return fitted


def _heaviest(effects: Floats, counts: NDArray[np.int64]) -> Floats:
    """The MAX_ENTRIES effects that explain most of the training variance; the others are 0."""
    if len(effects) <= MAX_ENTRIES:
        return effects
    kept = np.argpartition(counts * effects**2, -MAX_ENTRIES)[-MAX_ENTRIES:]
    heaviest = np.zeros_like(effects)
    heaviest[kept] = effects[kept]
    return heaviest


def _cut(table: FittedTable, target: Floats) -> FittedTable:
    """Leave out entries that hardly matter, and round the rest to what is written down."""
    weight = table.counts * table.effects**2
    order = np.argsort(-weight, kind="stable")
    held = np.cumsum(weight[order])
    enough = int(np.searchsorted(held, _KEPT_SHARE * held[-1])) + 1 if len(held) and held[-1] > 0 else 0
    effects = np.zeros_like(table.effects)
    effects[order[:enough]] = np.round(table.effects[order[:enough]], 5)
    variance = float(np.mean(target**2))
    share = float(held[-1]) / len(target) / variance if variance > 0 and len(held) else 0.0
    return replace(table, effects=effects, share=round(share, 4))


def _recentre(
    base: float, parts: list[_Part], tables: list[FittedTable], y: Floats
) -> tuple[float, list[FittedTable]]:
    """The base that makes the cut tables right on average."""
    if not tables:
        return base, tables
    predicted = sum(table.effects[part.train] for part, table in zip(parts, tables, strict=True))
    return float(np.mean(y - predicted)), tables
