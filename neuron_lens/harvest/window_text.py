"""The text of kept windows: documents are read once more, annotated whole, and what is needed of them is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.files.mapped import release_pages
from neuron_lens.harvest.annotate import COLUMN_NAMES, annotate, column_types
from neuron_lens.harvest.corpus import Corpus, TextTokenizer, WindowShape, split_of
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.windows import ABSENT, Column, IntArray, TextWindows

__all__ = ["gather_windows"]

_AT_ONCE = 1024  # windows that are cut out of a document together
_RELEASED_AFTER = 2**12  # windows


def gather_windows(
    corpus: Corpus,
    tokenizer: TextTokenizer,
    shape: WindowShape,
    kept: NDArray[np.int64],
    token_texts: Sequence[str],
    seed: int = 0,
    scratch: ScratchFile | None = None,
) -> tuple[TextWindows, int]:
    """Windows with all their columns; and how many of their documents did not lex.

    Args:
        kept: document and start of each window `[window, 2]`, rising, none twice.
        scratch: holds the columns, instead of memory.
    """
    size = (len(kept), shape.row_length + 1)
    array = np.empty if scratch is None else scratch.array
    columns: dict[str, Column] = {
        name: array(size, dtype) for name, dtype in column_types(len(token_texts)).items()
    }
    places = {
        name: np.empty(len(kept), dtype=np.int32) for name in ("character_start", "context_position", "split")
    }
    names: dict[int, str] = {}
    unlexed = done = released = 0
    for index, document in enumerate(corpus):
        if done == len(kept):
            break
        end = int(np.searchsorted(kept[:, 0], index, side="right"))
        if end == done:
            continue
        names[index] = document.name
        ids, spans = tokenizer.offsets(document.text, bos=False)
        annotated, known = annotate(document.text, np.asarray(ids, dtype=np.int32), spans)
        unlexed += not known
        starts = kept[done:end, 1]
        row_starts = _row_starts(starts, shape)
        places["character_start"][done:end] = [spans[start][0] for start in starts]
        places["context_position"][done:end] = starts - row_starts
        places["split"][done:end] = [split_of(index, start, seed) for start in row_starts.tolist()]
        for begin in range(0, len(starts), _AT_ONCE):
            some = slice(begin, begin + _AT_ONCE)
            here = slice(done + begin, min(done + begin + _AT_ONCE, end))
            _cut(
                annotated,
                starts[some],
                row_starts[some],
                shape,
                {name: own[here] for name, own in columns.items()},
            )
        done = end
        if done - released >= _RELEASED_AFTER:
            released = done
            for column in columns.values():
                release_pages(column)
    windows = TextWindows(
        length=shape.length,
        context=shape.row_length - shape.length,
        documents=names,
        token_texts=tuple(token_texts),
        names=COLUMN_NAMES,
        document=kept[:, 0].astype(np.int32),
        start=kept[:, 1].astype(np.int32),
        columns=columns,
        **places,
    )
    return windows, unlexed


def _row_starts(starts: NDArray[np.int64], shape: WindowShape) -> NDArray[np.int64]:
    """Where the rows begin that keep the windows at `starts`."""
    stride = shape.row_length - shape.context
    return np.where(starts < shape.row_length, 0, (starts - shape.context) // stride * stride)


def _cut(
    annotated: dict[str, IntArray],
    starts: NDArray[np.int64],
    row_starts: NDArray[np.int64],
    shape: WindowShape,
    into: dict[str, NDArray[Any]],
) -> None:
    """Left context (from the row's begin), window, and the token after it; ABSENT where there is none."""
    context = shape.row_length - shape.length
    place = starts[:, None] - context + np.arange(context + shape.length + 1)
    n_tokens = len(annotated["token"])
    inside = (place >= row_starts[:, None]) & (place < n_tokens)
    place = place.clip(0, n_tokens - 1)
    for name, column in annotated.items():
        into[name][:] = np.where(inside, column[place], ABSENT)
