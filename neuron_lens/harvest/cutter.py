"""Cuts the windows out of a batch of rows: where they lie, what they are called, which part they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_lens.harvest.corpus import Row

__all__ = ["Cutter", "places_of"]

_STRIDE = 2**32  # a place is document * stride + start


class Cutter:
    """The windows of a batch: `mask` `[window, length]`, `place`, `priority` and `split` `[window]`, the same for
    every site."""

    def __init__(self, rows: Sequence[Row], length: int, seed: int, first: int) -> None:
        row_of, start, present, place, split = [], [], [], [], []
        for index, row in enumerate(rows):
            for begin in range(row.keep_from, len(row.ids), length):
                row_of.append(index)
                start.append(first + begin)
                present.append(min(length, len(row.ids) - begin))
                place.append(row.document * _STRIDE + row.start + begin)
                split.append(row.split)
        self._row_of = torch.tensor(row_of)
        self._columns = torch.tensor(start)[:, None] + torch.arange(length)
        self.mask = torch.arange(length) < torch.tensor(present)[:, None]
        self._short = (~self.mask.all(1)).nonzero()[:, 0]
        self.place = torch.tensor(place)
        self.priority = torch.tensor([_priority(one, seed) for one in place])
        self.split = torch.tensor(split)
        self.n_tokens = sum(present)

    def __call__(self, x: Tensor) -> Tensor:
        """The windows `[window, length, ...]` of a site's tensor `[batch, pos, ...]`, 0 where there is no token."""
        columns = self._columns.clamp(max=x.shape[1] - 1)
        cut = x[self._row_of[:, None].to(x.device), columns.to(x.device)]
        if len(self._short):
            hidden = ~self.mask[self._short].to(x.device)
            short = self._short.to(x.device)
            cut[short] = cut[short].masked_fill(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), 0)
        return cut


def places_of(place: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Documents and starts of places."""
    return place // _STRIDE, place % _STRIDE


def _priority(place: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # fits a signed integer
