"""Cuts the windows out of a batch of rows: where they lie, what they are called, which part they belong to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from neuron_lens.harvest.corpus import Row

__all__ = ["Cutter", "place_of", "places_of", "priority_of"]

_STRIDE = 2**32  # a place is document * stride + start


class Cutter:
    """The windows of a batch, the same for every site: `where` they are (row and first position), `mask`
    `[window, length]`, `place`, `priority` and `split` `[window]`; see `WindowBatch`."""

    def __init__(self, rows: Sequence[Row], length: int, seed: int, first: int) -> None:
        row_of, start, present, place, split = [], [], [], [], []
        for index, row in enumerate(rows):
            for begin in range(row.keep_from, len(row.ids), length):
                row_of.append(index)
                start.append(first + begin)
                present.append(min(length, len(row.ids) - begin))
                place.append(place_of(row.document, row.start + begin))
                split.append(row.split)
        self.where = torch.tensor(row_of), torch.tensor(start)
        self.mask = torch.arange(length) < torch.tensor(present)[:, None]
        self.place = torch.tensor(place)
        self.priority = torch.tensor([priority_of(one, seed) for one in place])
        self.split = torch.tensor(split)
        self.n_tokens = sum(present)

    def only(self, windows: Tensor) -> Self:
        """Some of the windows."""
        some = copy(self)
        some.where = self.where[0][windows], self.where[1][windows]
        some.mask, some.place = self.mask[windows], self.place[windows]
        some.priority, some.split = self.priority[windows], self.split[windows]
        some.n_tokens = int(some.mask.sum())
        return some

    def __call__(self, x: Tensor) -> Tensor:
        """The windows `[window, length, ...]` of a site's tensor `[batch, pos, ...]`, 0 where there is no token."""
        rows, begins = self.where
        columns = (begins[:, None] + torch.arange(self.mask.shape[1])).clamp(max=x.shape[1] - 1)
        # One index into all tokens: whole rows of memory are copied.
        place = (rows[:, None] * x.shape[1] + columns).to(x.device)
        cut = x.flatten(0, 1).index_select(0, place.flatten()).unflatten(0, place.shape)
        hidden = ~self.mask.to(x.device)
        return cut.masked_fill_(hidden.reshape(*hidden.shape, *[1] * (x.ndim - 2)), 0)


def place_of(document: int, start: int) -> int:
    """The identity of a window, rising with the corpus."""
    return document * _STRIDE + start


def places_of(place: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Documents and starts of places."""
    return place // _STRIDE, place % _STRIDE


def priority_of(place: int, seed: int) -> int:
    """A hash of a place: the windows of smallest hash are a uniform sample."""
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # fits a signed integer
