"""A second, short pass of the model: over windows in which units are most active, to see which others are silent.

A window on a unit's top list is a near miss of a similar unit if that one is silent there, and what the first pass
kept does not say so. Every source names the windows its units would most like to know of, within a share of the
corpus; the rows that hold them are read again as they were read first, each once for all sources, up to the last such
window: attention looks back only, so that activations are those of the first pass, at rounding. What a source takes
depends on itself alone, not on which others are harvested with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.files.mapped import release_pages
from neuron_lens.harvest.corpus import Corpus, Row, TextTokenizer, WindowShape, cut
from neuron_lens.harvest.cutter import places_of
from neuron_lens.harvest.near_misses import NearMisses
from neuron_lens.windows import SPLITS, TextWindows

__all__ = ["rows_again", "wanted_places"]

_AT_ONCE = 256  # units whose wishes are collected together
_ROWS_AT_ONCE = 2**14  # windows whose tokens are looked at together
_SEARCHED = 2**17  # windows of a part that tokens are sought in, at most
_WISHES = 4  # for every near miss that is kept: in many windows of similar units the unit fires, too

Arrays = dict[str, NDArray[Any]]


def wanted_places(
    near: NearMisses,
    tensors: Arrays,
    windows: TextWindows,
    places: NDArray[np.int64],
    counts: tuple[int, int, int],
    n_tokens: int,
) -> NDArray[np.int64]:
    """Places of the windows to be judged again, rising, in rows of at most `n_tokens` tokens to be read.

    Rows are taken in order of how much they are wished for, by token. Within them every kept window is judged that
    ends before the last one wished for; those of the uniform sample are known already.

    Args:
        near: the near misses found in the sample.
        tensors: the lists of the harvest, rows counting in `windows`, which lie at `places`.
        counts: how many near misses of each unit are kept, in every part.
    """
    if not n_tokens:
        return places[:0]
    wishes = _Wishes(near, tensors, windows, counts)
    for code in range(len(SPLITS)):
        wishes.for_similar(code)
        wishes.for_tokens(code)
    end = windows.context_position + windows.present.sum(1)
    rows = np.stack([windows.document, windows.start - windows.context_position], 1)
    row_of = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    value = np.bincount(row_of, wishes.value)
    length = np.zeros(len(value), dtype=np.int64)
    wished = wishes.value > 0
    np.maximum.at(length, row_of[wished], end[wished])
    order = np.argsort(-value / np.maximum(length, 1), kind="stable")
    order = order[value[order] > 0]
    chosen = np.zeros(len(value), dtype=bool)
    chosen[order[np.cumsum(length[order]) <= n_tokens]] = True
    return np.asarray(places[chosen[row_of] & (end <= length[row_of]) & ~wishes.in_sample])


class _Wishes:
    """How much each kept window is wished for, `value` `[window]`.

    Every unit whose lists it could better has a first wish, of 1 times the chance that it is silent there, a second
    of 1/2 of that, a third of 1/3, for each reason and part.
    """

    def __init__(
        self, near: NearMisses, tensors: Arrays, windows: TextWindows, counts: tuple[int, int, int]
    ) -> None:
        self._near, self._likeness, self._tensors = near, near.likeness, tensors
        self._counts, self._windows = counts, windows
        self._largest = _largest_of(tensors["top.activations"])
        self.value = np.zeros(len(windows))
        self.in_sample = np.zeros(len(windows), dtype=bool)
        self.in_sample[tensors["random.row"]] = True

    def for_similar(self, code: int) -> None:
        """For the windows of a part in which similar units are most active."""
        nearest, weight = self._likeness.nearest.numpy(), self._likeness.weight.numpy()
        slots = np.flatnonzero(self._tensors["top.split"] == code)
        listed = self._tensors["top.row"][:, slots]
        share = self._largest[:, slots] / np.maximum(self._likeness.scale.numpy(), 1e-6)[:, None]
        worst, chance = self._near.worst("similar")[code], self._near.chance("similar")
        for first in range(0, len(nearest), _AT_ONCE):
            own = slice(first, first + _AT_ONCE)
            row = listed[nearest[own]].reshape(len(nearest[own]), -1)  # [unit, similar unit and slot]
            strength = (weight[own][:, :, None] * share[nearest[own]]).reshape(row.shape)
            strength[strength <= np.maximum(worst[own], 0)[:, None]] = 0
            self._wish(own, code, row, strength, chance[own])

    def for_tokens(self, code: int) -> None:
        """For any windows of a part that hold units' own tokens, of units that have too few such near misses."""
        tokens = self._likeness.tokens.numpy()
        worst, chance = self._near.worst("same_token")[code], self._near.chance("same_token")
        depth = _WISHES * self._counts[code]
        pairs = self._pairs(code, np.unique(tokens[tokens >= 0]))
        for first in range(0, len(tokens), _AT_ONCE):
            own = slice(first, first + _AT_ONCE)
            wanted = np.where((worst[own] == -np.inf)[:, None], tokens[own], -1)
            begin, end = (np.searchsorted(pairs[:, 0], wanted, side=side) for side in ("left", "right"))
            entry = begin[:, :, None] + np.arange(depth)
            there = (entry < end[:, :, None]) & (wanted >= 0)[:, :, None]
            row = np.where(there, pairs[np.where(there, entry, 0), 1] if len(pairs) else -1, -1)
            row = row.reshape(len(row), -1)
            self._wish(own, code, row, (row >= 0).astype(np.float32), chance[own])

    def _pairs(self, code: int, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens and windows of a part, outside the sample, that hold them, `[pair, 2]` by rising token: of one token in
        no order."""
        windows = self._windows
        inside = np.flatnonzero((windows.split == code) & ~self.in_sample)
        rows = inside[:: max(1, -(-len(inside) // _SEARCHED))]
        found = [np.zeros(0, dtype=np.int64)]
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            own = rows[first : first + _ROWS_AT_ONCE]
            ids = windows.columns["token"][own, windows.context : windows.context + windows.length]
            place, position = np.isin(ids, wanted).nonzero()
            found.append(np.unique(ids[place, position].astype(np.int64) * len(windows) + own[place]))
            release_pages(windows.columns["token"])
        pairs = np.stack(np.divmod(np.concatenate(found), max(len(windows), 1)), 1)
        pairs = pairs[np.random.default_rng(code).permutation(len(pairs))]  # any, not the corpus's first
        return np.asarray(pairs[np.argsort(pairs[:, 0], kind="stable")])

    def _wish(
        self,
        own: slice,
        code: int,
        row: NDArray[Any],
        strength: NDArray[np.float32],
        chance: NDArray[np.float32],
    ) -> None:
        """Units' wishes for windows `row` `[unit, n]` (-1: none), the strongest first; 0 is none."""
        strength[(row < 0) | self.in_sample[row]] = 0
        slots = self._tensors["top.split"] == code
        fires = self._largest[own] > self._likeness.threshold.numpy()[own, None]
        known = np.where(fires, self._tensors["top.row"][own], -1)[:, slots]
        strength[(row[:, :, None] == known[:, None]).any(-1)] = 0
        order = np.argsort(-strength, axis=1, kind="stable")[:, : _WISHES * self._counts[code]]
        there = np.take_along_axis(strength, order, 1) > 0
        value = chance[:, None] / (1 + np.arange(order.shape[1]))
        np.add.at(self.value, np.take_along_axis(row, order, 1)[there], value[there])


def _largest_of(activations: NDArray[np.float16]) -> NDArray[np.float32]:
    """The largest of the last axis, some units at a time."""
    largest = np.empty(activations.shape[:-1], dtype=np.float32)
    for first in range(0, len(activations), _AT_ONCE):
        own = slice(first, first + _AT_ONCE)
        largest[own] = activations[own].max(-1)
        release_pages(activations)
    return largest


def rows_again(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    shape: WindowShape,
    seed: int,
    wanted: Iterable[NDArray[np.int64]],
    begin: tuple[int, int] = (0, 0),
) -> Iterator[Row]:
    """The rows that keep wanted windows, as the first pass read them, each up to its last wanted window; from row
    `begin` on (document, start)."""
    documents, starts = places_of(np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *wanted])))
    by_document: dict[int, list[int]] = {}
    for document, start in zip(documents.tolist(), starts.tolist(), strict=True):
        by_document.setdefault(document, []).append(start)
    for index, document in enumerate(corpus):
        if index not in by_document or index < begin[0]:
            continue
        ids = np.asarray(tokenizer.encode(document.text, bos=False), dtype=np.int32)
        for row in cut(index, ids, shape, seed):
            kept = range(row.start + row.keep_from, row.start + len(row.ids))
            last = max((start for start in by_document[index] if start in kept), default=None)
            if last is not None and (index, row.start) >= begin:
                end = last + shape.length - row.start
                yield Row(index, row.start, row.keep_from, row.ids[:end], row.split)
