"""The most co-active units of every unit, by what the uniform sample says of all pairs.

Of units that are silent almost everywhere only the pairs that fire together are looked at: there are as many as a token
has active units, squared, and not as many as there are units, squared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.harvest.neighbours import Sampled

__all__ = ["nearest_units"]

_AT_ONCE = 256  # units compared with all others together, at most
_COMPARED = 2**24  # pairs of them, at most, but for very many units
_TOKENS_AT_ONCE = 256
_PAIRS = 2**20  # pairs of entries that are added up together

Arrays = dict[str, NDArray[Any]]


def nearest_units(sampled: Sampled, written: Tensor | None, count: int) -> Arrays:
    """The most co-active units of each: `nearest.unit` `[unit, count]` (columns), their `nearest.pearson`,
    `nearest.jaccard`, and, where units write a direction, its `nearest.cosine`.

    A unit that is constant on the sample correlates with nothing; its nearest are those of most similar
    direction, with a correlation of 0.
    """
    n_units = sampled.matrix.shape[1]
    count = min(count, n_units - 1)
    if not count:
        return {}
    rows = None if written is None else torch.nn.functional.normalize(written.float(), dim=-1)
    found = {
        "unit": torch.zeros(n_units, count, dtype=torch.int32),
        "pearson": torch.zeros(n_units, count),
        "jaccard": torch.zeros(n_units, count),
    }
    if rows is not None:
        found["cosine"] = torch.zeros(n_units, count)
    left = torch.arange(n_units)
    if sampled.matrix.is_sparse:
        sparse = _SparseComparison(sampled)
        left = torch.from_numpy(sparse.fill(found, rows, count))
        compare: _Comparison = sparse
        if rows is not None:
            for own in _at_once(left[~sparse.varies[left]], n_units):
                _fill_by_direction(found, sparse, rows, own, count)
            left = left[sparse.varies[left]]
    else:
        compare = _DenseComparison(sampled)
    for own in _at_once(left, n_units):
        _fill(found, compare, rows, own, count)
    return {f"nearest.{name}": column.numpy() for name, column in found.items()}


def _at_once(units: Tensor, n_units: int) -> Iterator[Tensor]:
    """As many of some units at a time as are compared with all together."""
    step = max(16, min(_AT_ONCE, _COMPARED // n_units))
    for first in range(0, len(units), step):
        yield units[first : first + step]


def _fill_by_direction(
    found: dict[str, Tensor], compare: _SparseComparison, rows: Tensor, own: Tensor, count: int
) -> None:
    """The nearest of some units that correlate with none: as `_fill`, with less work."""
    cosine = rows[own] @ rows.T
    cosine[torch.arange(len(own)), own] = -torch.inf
    found["cosine"][own], unit = cosine.topk(count, dim=1)
    found["unit"][own] = unit.int()
    found["jaccard"][own] = compare.jaccard(own, unit)


def _fill(
    found: dict[str, Tensor], compare: _Comparison, rows: Tensor | None, own: Tensor, count: int
) -> None:
    """The nearest of some units, out of all."""
    pearson, jaccard = compare.with_all(own)
    cosine = torch.zeros_like(pearson) if rows is None else rows[own] @ rows.T
    # Correlation decides; where there is none, likeness of direction, which counts for less than any.
    ranked = torch.where(compare.varies[own][:, None] & compare.varies, pearson, 1e-3 * cosine)
    ranked[torch.arange(len(own)), own] = -torch.inf
    unit = ranked.topk(count, dim=1).indices
    found["unit"][own] = unit.int()
    for name, values in (("pearson", pearson), ("jaccard", jaccard), ("cosine", cosine)):
        if name in found:
            found[name][own] = values.gather(1, unit)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Pairs of units that fire together, by `unit` and `other`, rising: sums of the products of their activations, and
    on how many tokens both fire."""

    unit: NDArray[np.int64]
    other: NDArray[np.int64]
    products: NDArray[np.float64]
    both: NDArray[np.float64]


class _Comparison:
    """Correlation and Jaccard index of some units with all; `varies` `[unit]`: whether there is any."""

    mean: Tensor
    deviation: Tensor
    varies: Tensor
    n_fires: Tensor

    def with_all(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Pearson and Jaccard `[own, unit]`."""
        raise NotImplementedError

    def _set_scale(self, mean: Tensor, square: Tensor, n_fires: Tensor) -> None:
        variance = (square - mean**2).clamp(min=0)
        self.mean, self.n_fires = mean, n_fires
        self.varies = variance > 1e-12
        self.deviation = variance.clamp(min=1e-12).sqrt()

    def _scaled(self, own: Tensor, products: Tensor, both: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """From sums of products and tokens where both fire `[own, unit]`."""
        covariance = products / n - self.mean[own][:, None] * self.mean
        pearson = covariance / (self.deviation[own][:, None] * self.deviation)
        pearson = torch.where(self.varies[own][:, None] & self.varies, pearson, 0).clamp(-1, 1)
        either = self.n_fires[own][:, None] + self.n_fires - both
        return pearson, both / either.clamp(min=1)


class _DenseComparison(_Comparison):
    def __init__(self, sampled: Sampled) -> None:
        self._matrix, self._threshold = sampled.matrix, torch.from_numpy(sampled.threshold)
        n_tokens, n_units = self._matrix.shape
        self._n = max(n_tokens, 1)
        self._centre = sum((part.sum(0) for part in self._parts()), torch.zeros(n_units)) / self._n
        square, n_fires = torch.zeros(n_units), torch.zeros(n_units)
        for part in self._parts():
            n_fires += (part > self._threshold).sum(0)
            square += part.sub_(self._centre).square_().sum(0)
        self._set_scale(torch.zeros(n_units), square / self._n, n_fires)

    def _parts(self) -> Iterator[Tensor]:
        """The sample a few tokens at a time, float32."""
        return (part.to(torch.float32, copy=True) for part in self._matrix.split(_TOKENS_AT_ONCE))

    def with_all(self, own: Tensor) -> tuple[Tensor, Tensor]:
        products, both = (torch.zeros(len(own), len(self._centre)) for _ in range(2))
        for part in self._parts():
            fires = (part > self._threshold).float()
            both.addmm_(fires[:, own].T, fires)
            # Centred first: sums of products of large means would cancel.
            part.sub_(self._centre)
            products.addmm_(part[:, own].T, part)
        return self._scaled(own, products, both, self._n)


class _SparseComparison(_Comparison):
    def __init__(self, sampled: Sampled) -> None:
        matrix = sampled.matrix.coalesce()
        place, values = matrix.indices(), matrix.values()
        n_tokens, self._n_units = matrix.shape
        self._n = max(n_tokens, 1)
        firing = (values > torch.from_numpy(sampled.threshold)[place[1]]).float()
        sums, squares, n_fires = (
            torch.zeros(self._n_units).index_add(0, place[1], of) for of in (values, values**2, firing)
        )
        self._set_scale(sums / self._n, squares / self._n, n_fires)
        # Entries by token, and which of them are each unit's.
        self._token, self._unit = place[0].numpy(), place[1].numpy()
        self._value, self._firing = values.numpy(), firing.numpy()
        self._of_token = np.searchsorted(self._token, np.arange(n_tokens + 1))
        self._order = np.argsort(self._unit, kind="stable")
        self._of_unit = np.searchsorted(self._unit[self._order], np.arange(self._n_units + 1))

    def fill(self, found: dict[str, Tensor], rows: Tensor | None, count: int) -> NDArray[np.int64]:
        """The nearest of all units that correlate with enough others; the units that are left, rising."""
        done = np.zeros(self._n_units, dtype=bool)
        for first, last in self._ranges():
            pairs = self._pairs(np.arange(first, last))
            own, other = torch.from_numpy(pairs.unit), torch.from_numpy(pairs.other)
            pearson, jaccard = self._of_pairs(own, other, pairs)
            order = np.lexsort((-pearson.numpy(), pairs.unit))
            order = order[pearson.numpy()[order] > 0]
            own_rising = pairs.unit[order]
            rank = np.arange(len(order)) - np.searchsorted(own_rising, own_rising)
            done[own_rising[rank == count - 1]] = True
            here = torch.from_numpy(order[(rank < count) & done[own_rising]])
            slots = own[here], torch.from_numpy(rank[(rank < count) & done[own_rising]])
            found["unit"][slots] = other[here].int()
            found["pearson"][slots], found["jaccard"][slots] = pearson[here], jaccard[here]
            if rows is not None:
                found["cosine"][slots] = (rows[own[here]] * rows[other[here]]).sum(-1)
        return np.flatnonzero(~done)

    def with_all(self, own: Tensor) -> tuple[Tensor, Tensor]:
        pairs = self._pairs(own.numpy())
        place = np.searchsorted(own.numpy(), pairs.unit), pairs.other
        products, both = torch.zeros(len(own), self._n_units), torch.zeros(len(own), self._n_units)
        products[place], both[place] = (
            torch.from_numpy(pairs.products).float(),
            torch.from_numpy(pairs.both).float(),
        )
        return self._scaled(own, products, both, self._n)

    def jaccard(self, own: Tensor, others: Tensor) -> Tensor:
        """Of some units, rising, with some others each `[own, other]`."""
        pairs = self._pairs(own.numpy())
        wanted = own[:, None].numpy() * self._n_units + others.numpy()
        there = pairs.unit * self._n_units + pairs.other
        place = np.searchsorted(there, wanted)
        both = np.append(pairs.both, 0.0)[np.where(np.append(there, -1)[place] == wanted, place, len(there))]
        firing = torch.from_numpy(both).float()
        return firing / (self.n_fires[own][:, None] + self.n_fires[others] - firing).clamp(min=1)

    def _of_pairs(self, own: Tensor, other: Tensor, pairs: _Pairs) -> tuple[Tensor, Tensor]:
        covariance = torch.from_numpy(pairs.products) / self._n - self.mean[own].double() * self.mean[other]
        pearson = covariance / (self.deviation[own].double() * self.deviation[other])
        pearson = torch.where(self.varies[own] & self.varies[other], pearson, 0).clamp(-1, 1)
        both = torch.from_numpy(pairs.both)
        return pearson.float(), (both / (self.n_fires[own] + self.n_fires[other] - both).clamp(min=1)).float()

    def _ranges(self) -> list[tuple[int, int]]:
        """Units in ranges of at most _PAIRS pairs of entries, or of one unit."""
        per_token = np.diff(self._of_token)
        sizes = np.concatenate([[0], np.cumsum(per_token[self._token[self._order]])])
        until = sizes[self._of_unit]  # of all units before
        bounds = [0]
        while bounds[-1] < self._n_units:
            end = int(np.searchsorted(until, until[bounds[-1]] + _PAIRS, side="right")) - 1
            bounds.append(max(end, bounds[-1] + 1))
        return list(pairwise(bounds))

    def _pairs(self, own: NDArray[np.int64]) -> _Pairs:
        """All pairs of some units, rising, with others that are active at a token they are."""
        entries = np.concatenate([self._order[self._of_unit[unit] : self._of_unit[unit + 1]] for unit in own])
        begin, end = self._of_token[self._token[entries]], self._of_token[self._token[entries] + 1]
        entry = np.repeat(entries, end - begin)
        offset = np.cumsum(end - begin) - (end - begin)
        other = np.arange(len(entry)) + np.repeat(begin - offset, end - begin)
        differ = self._unit[entry] != self._unit[other]
        entry, other = entry[differ], other[differ]
        key = self._unit[entry] * self._n_units + self._unit[other]
        order = np.argsort(key, kind="stable")
        key, entry, other = key[order], entry[order], other[order]
        starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]])) if len(key) else key
        products = self._value[entry].astype(np.float64) * self._value[other]
        both = (self._firing[entry] * self._firing[other]).astype(np.float64)
        if len(key):
            products, both = np.add.reduceat(products, starts), np.add.reduceat(both, starts)
        return _Pairs(key[starts] // self._n_units, key[starts] % self._n_units, products, both)
