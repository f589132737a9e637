"""Units beside each other: which fire together.

Read off the uniform sample, which is shared by all units of a source. Co-activation is Pearson's correlation
over tokens, and the Jaccard index of the tokens where each fires (above FIRING_SHARE of its range; Delphi's
co-occurrence).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.windows import TextWindows

__all__ = ["FIRING_SHARE", "Sampled", "nearest_units"]

FIRING_SHARE = 0.25  # a unit fires above this share of the way from its smallest (at least 0) to its largest

_TOKENS = 8_192  # of the sample that co-activation is computed on
_AT_ONCE = 256  # units compared with all others together

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Sampled:
    """The uniform sample: activations of units at tokens, and its windows.

    `matrix` is `[token, unit]` of the training windows (at most _TOKENS tokens), dense or sparse (COO);
    `largest` `[window, unit]` the largest activation of every window of the sample, float16; `tokens` and
    `present` `[window, length]`; `split` `[window]`; `lowest` (at least 0) and `highest` `[unit]` over the whole
    corpus, and `threshold` `[unit]`, above which each unit counts as firing. `tensors` are those of the harvest.
    """

    matrix: Tensor
    largest: NDArray[np.float16]
    tokens: NDArray[np.int32]
    present: NDArray[np.bool_]
    split: NDArray[np.int32]
    lowest: NDArray[np.float32]
    highest: NDArray[np.float32]
    threshold: NDArray[np.float32]
    tensors: Arrays

    @classmethod
    def of(
        cls,
        tensors: Arrays,
        windows: TextWindows,
        rows: NDArray[np.int32],
        sparse: bool,
    ) -> Sampled:
        """From the tensors of a harvest."""
        lowest, highest = (np.maximum(tensors["moments"][:, place], 0).astype(np.float32) for place in (4, 5))
        split = windows.split[rows]
        present = windows.present[rows]
        tokens = windows.columns["token"][rows, windows.context : windows.context + windows.length]
        train = np.flatnonzero(split == 0)
        step = max(1, -(-len(train) * windows.length // _TOKENS))
        chosen = train[::step]
        if sparse:
            matrix, largest = _from_sparse(tensors, chosen, len(rows), windows.length, len(highest))
        else:
            held = tensors["random.activations"]  # [unit, window, length]
            hidden = np.where(present, 0, -np.inf).astype(np.float16)
            largest = np.stack([(unit + hidden).max(-1) for unit in held], 1)
            picked = np.asarray(held[:, chosen][:, present[chosen]], dtype=np.float32)
            matrix = torch.from_numpy(np.ascontiguousarray(picked.T))
        threshold = lowest + FIRING_SHARE * (highest - lowest)
        return cls(matrix, largest, tokens, present, split, lowest, highest, threshold, tensors)

    def activations(self, windows: slice, first: int, last: int) -> tuple[Tensor, Tensor | None]:
        """Activations, and partners where units have them, of some windows and a range of units
        `[window, length, last - first]`."""
        if "random.begin" in self.tensors:
            return self._dense(windows, first, last), None
        own, partners = (self.tensors.get(f"random.{name}") for name in ("activations", "partners"))
        assert own is not None, "a sample is sparse or dense"
        whole = (slice(first, last), windows)
        return (
            torch.from_numpy(own[whole]).permute(1, 2, 0),
            None if partners is None else torch.from_numpy(partners[whole]).permute(1, 2, 0),
        )

    def _dense(self, windows: slice, first: int, last: int) -> Tensor:
        begin, end = (int(self.tensors["random.begin"][place]) for place in (first, last))
        window, position, value = (
            self.tensors[f"random.{name}"][begin:end] for name in ("window", "position", "value")
        )
        counts = np.diff(self.tensors["random.begin"][first : last + 1])
        start, stop, _ = windows.indices(len(self.largest))
        inside = (window >= start) & (window < stop)
        unit = np.repeat(np.arange(last - first), counts)[inside]
        dense = torch.zeros(stop - start, self.tokens.shape[1], last - first, dtype=torch.float16)
        dense.numpy()[window[inside] - start, position[inside], unit] = value[inside]
        return dense


def nearest_units(sampled: Sampled, written: Tensor | None, count: int) -> Arrays:
    """The most co-active units of each: `nearest.unit` `[unit, count]` (columns, -1: none), their
    `nearest.pearson`, `nearest.jaccard`, and, where units write a direction, its `nearest.cosine`.

    A unit that is constant on the sample correlates with nothing; its nearest are those of most similar
    direction, with a correlation of 0.
    """
    n_units = sampled.matrix.shape[1]
    count = min(count, n_units - 1)
    rows = None if written is None else torch.nn.functional.normalize(written.float(), dim=-1)
    compare = _Comparison(sampled)
    columns: dict[str, list[Tensor]] = {name: [] for name in ("unit", "pearson", "jaccard", "cosine")}
    for first in range(0, n_units if count else 0, _AT_ONCE):
        own = torch.arange(first, min(first + _AT_ONCE, n_units))
        pearson, jaccard = compare.with_all(own)
        cosine = torch.zeros_like(pearson) if rows is None else rows[own] @ rows.T
        # Correlation decides; where there is none, likeness of direction, which counts for less than any.
        ranked = torch.where(compare.varies[own][:, None] & compare.varies, pearson, 1e-3 * cosine)
        ranked[torch.arange(len(own)), own] = -torch.inf
        unit = ranked.topk(count, dim=1).indices
        columns["unit"].append(unit)
        for name, values in (("pearson", pearson), ("jaccard", jaccard), ("cosine", cosine)):
            columns[name].append(values.gather(1, unit))
    if not count:
        return {}
    joined = {f"nearest.{name}": torch.cat(parts).numpy() for name, parts in columns.items()}
    if rows is None:
        joined.pop("nearest.cosine")
    joined["nearest.unit"] = joined["nearest.unit"].astype(np.int32)
    return joined


class _Comparison:
    """Correlation and Jaccard index of some units with all."""

    def __init__(self, sampled: Sampled) -> None:
        matrix = sampled.matrix
        n = max(matrix.shape[0], 1)
        threshold = torch.from_numpy(sampled.threshold)
        self.n = n
        if matrix.is_sparse:
            matrix = matrix.coalesce()
            place, values = matrix.indices(), matrix.values()
            firing = (values > threshold[place[1]]).float()
            self.mean = torch.zeros(matrix.shape[1]).index_add(0, place[1], values) / n
            square = torch.zeros(matrix.shape[1]).index_add(0, place[1], values**2) / n
            self.fires = torch.sparse_coo_tensor(
                place, firing, matrix.shape, check_invariants=False
            ).coalesce()
            self.values = matrix
            self.n_fires = torch.zeros(matrix.shape[1]).index_add(0, place[1], firing)
        else:
            # Centred first: sums of products of large means would cancel.
            self.mean = torch.zeros(matrix.shape[1])
            self.fires = (matrix > threshold).float()
            self.values = matrix - matrix.mean(0)
            square = self.values.square().mean(0)
            self.n_fires = self.fires.sum(0)
        variance = (square - self.mean**2).clamp(min=0)
        self.varies = variance > 1e-12
        self.deviation = variance.clamp(min=1e-12).sqrt()

    def with_all(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """Pearson and Jaccard `[own, unit]`."""
        covariance = self._products(self.values, own) / self.n - self.mean[own][:, None] * self.mean
        pearson = covariance / (self.deviation[own][:, None] * self.deviation)
        pearson = torch.where(self.varies[own][:, None] & self.varies, pearson, 0).clamp(-1, 1)
        both = self._products(self.fires, own)
        either = self.n_fires[own][:, None] + self.n_fires - both
        return pearson, both / either.clamp(min=1)

    @staticmethod
    def _products(matrix: Tensor, own: Tensor) -> Tensor:
        if matrix.is_sparse:
            return torch.sparse.mm(matrix.T, matrix.index_select(1, own).to_dense()).T
        return matrix[:, own].T @ matrix


def _from_sparse(
    tensors: Arrays, chosen: NDArray[np.int64], n_windows: int, length: int, n_units: int
) -> tuple[Tensor, NDArray[np.float16]]:
    """The training matrix (COO) and the largest activations of sparse columns."""
    units = np.repeat(np.arange(n_units), np.diff(tensors["random.begin"]))
    window, value = tensors["random.window"], tensors["random.value"]
    largest = np.zeros((n_windows, n_units), dtype=np.float16)
    np.maximum.at(largest, (window, units), value)
    place = np.full(n_windows, -1, dtype=np.int64)
    place[chosen] = np.arange(len(chosen))
    inside = place[window] >= 0
    token = place[window[inside]] * length + tensors["random.position"][inside]
    matrix = torch.sparse_coo_tensor(
        torch.from_numpy(np.stack([token, units[inside]])),
        torch.from_numpy(value[inside].astype(np.float32)),
        (max(len(chosen) * length, 1), n_units),
        check_invariants=False,
    )
    return matrix.coalesce(), largest
