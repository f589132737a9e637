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

from neuron_lens.files.mapped import release_pages
from neuron_lens.windows import TextWindows

__all__ = ["FIRING_SHARE", "Sampled"]

FIRING_SHARE = 0.25  # a unit fires above this share of the way from its smallest (at least 0) to its largest

_TOKENS = 8_192  # of the sample that co-activation is computed on
_AT_ONCE = 64  # units whose sample is in memory together

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Sampled:
    """The uniform sample: activations of units at tokens, and its windows.

    `matrix` is `[token, unit]` of the training windows (at most _TOKENS tokens), float16 or sparse (COO, float32);
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
        sample = windows.select(rows)
        tokens = sample.columns["token"][:, windows.context : windows.context + windows.length]
        train = np.flatnonzero(sample.split == 0)
        step = max(1, -(-len(train) * windows.length // _TOKENS))
        chosen = train[::step]
        if sparse:
            matrix, largest = _from_sparse(tensors, chosen, len(rows), windows.length, len(highest))
        else:
            matrix, largest = _from_dense(tensors["random.activations"], chosen, sample.present)
        threshold = lowest + FIRING_SHARE * (highest - lowest)
        return cls(matrix, largest, tokens, sample.present, sample.split, lowest, highest, threshold, tensors)

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


def _from_dense(
    held: NDArray[np.float16], chosen: NDArray[np.int64], present: NDArray[np.bool_]
) -> tuple[Tensor, NDArray[np.float16]]:
    """The training matrix and the largest activations of a sample `[unit, window, length]`, some units at a time."""
    n_units, n_windows, _ = held.shape
    inside, absent = torch.from_numpy(present[chosen]), torch.from_numpy(~present)
    matrix = torch.empty(int(inside.sum()), n_units, dtype=torch.float16)
    largest = np.empty((n_windows, n_units), dtype=np.float16)
    for first in range(0, n_units, _AT_ONCE):
        own = torch.from_numpy(np.array(held[first : first + _AT_ONCE]))
        matrix[:, first : first + len(own)] = own[:, chosen][:, inside].T
        largest[:, first : first + len(own)] = own.masked_fill_(absent, -torch.inf).amax(-1).T.numpy()
        release_pages(held)
    return matrix, largest


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
