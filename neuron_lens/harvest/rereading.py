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

from neuron_lens.harvest.corpus import Corpus, Row, TextTokenizer, WindowShape, cut
from neuron_lens.harvest.cutter import places_of
from neuron_lens.harvest.near_misses import Likeness
from neuron_lens.windows import SPLITS, TextWindows

__all__ = ["rows_again", "wanted_places"]

_AT_ONCE = 256  # units whose wishes are collected together
_WISHES = 4  # for every near miss that is kept: in many windows of similar units the unit fires, too

Arrays = dict[str, NDArray[Any]]


def wanted_places(
    likeness: Likeness,
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
        tensors: the lists of the harvest, rows counting in `windows`, which lie at `places`.
        counts: how many near misses of each unit are kept, in every part.
    """
    in_sample = np.zeros(len(windows), dtype=bool)
    in_sample[tensors["random.row"]] = True
    wished = _wishes(likeness, tensors, in_sample, counts)
    row_start = windows.start - windows.context_position
    end = windows.context_position + windows.present.sum(1)
    rows = np.stack([windows.document, row_start], 1)
    _, row_of = np.unique(rows, axis=0, return_inverse=True)
    row_of = row_of.reshape(-1)
    value = np.bincount(row_of, wished)
    length = np.zeros(len(value), dtype=np.int64)
    np.maximum.at(length, row_of[wished > 0], end[wished > 0])
    order = np.argsort(-value / np.maximum(length, 1), kind="stable")
    order = order[value[order] > 0]
    chosen = np.zeros(len(value), dtype=bool)
    chosen[order[np.cumsum(length[order]) <= n_tokens]] = True
    return places[chosen[row_of] & (end <= length[row_of]) & ~in_sample]


def _wishes(
    likeness: Likeness, tensors: Arrays, in_sample: NDArray[np.bool_], counts: tuple[int, int, int]
) -> NDArray[np.float64]:
    """How much each kept window is wished for `[window]`: by a unit 1 for the one in which a similar unit fires most,
    1/2 for the next, 1/3, and so on."""
    nearest, weight = likeness.nearest.numpy(), likeness.weight.numpy()
    listed, largest = tensors["top.row"], tensors["top.activations"].max(-1).astype(np.float32)
    share = np.where(listed >= 0, largest / np.maximum(likeness.scale.numpy(), 1e-6)[:, None], 0)
    fires = (listed >= 0) & (largest > likeness.threshold.numpy()[:, None])
    wished = np.zeros(len(in_sample))
    for code in range(len(SPLITS)):
        slots = tensors["top.split"] == code
        depth = _WISHES * counts[code]
        for first in range(0, len(nearest) if depth and slots.any() else 0, _AT_ONCE):
            own = slice(first, first + _AT_ONCE)
            row = listed[nearest[own]][:, :, slots]  # [unit, similar unit, slot]
            strength = weight[own][:, :, None] * share[nearest[own]][:, :, slots]
            strength[(row < 0) | in_sample[row]] = 0
            row, strength = row.reshape(len(row), -1), strength.reshape(len(row), -1)
            own_rows = np.where(fires[own], listed[own], -1)[:, slots]
            strength[(row[:, :, None] == own_rows[:, None]).any(-1)] = 0  # known to fire there
            order = np.argsort(-strength, axis=1, kind="stable")[:, :depth]
            there = np.take_along_axis(strength, order, 1) > 0
            ranks = np.broadcast_to(1.0 / (1 + np.arange(order.shape[1])), order.shape)
            np.add.at(wished, np.take_along_axis(row, order, 1)[there], ranks[there])
    return wished


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
