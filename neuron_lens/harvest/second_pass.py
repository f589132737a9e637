"""The second, short pass of a harvest: rows that some sources want read again, for their near misses.

Held on disk like the first: after as many tokens as make a shard what is kept is written, and a killed pass goes on
there. See `rereading` for which rows these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from neuron_lens.harvest.batches import row_batches
from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.cutter import Cutter
from neuron_lens.harvest.near_misses import NearMisses
from neuron_lens.harvest.part import HarvestPart, Progress
from neuron_lens.harvest.rereading import rows_again
from neuron_lens.harvest.settings import HarvestSettings, model_inputs
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.hooks import TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Rereading", "read_again"]


@dataclass(frozen=True, eq=False)
class Rereading:
    """One source, its near misses so far, and the places of the windows it wants to be judged again, rising."""

    source: UnitSource
    near: NearMisses
    wanted: NDArray[np.int64]


@torch.inference_mode()
def read_again(
    model: Transformer,
    corpus: Corpus,
    readings: Sequence[Rereading],
    settings: HarvestSettings,
    folder: Path,
    key: dict[str, Any],
    progress: bool,
) -> None:
    """Let the near misses of all sources take in the windows they want; `folder` is for what a killed pass leaves."""
    readings = [reading for reading in readings if len(reading.wanted)]
    if not readings:
        return
    part = HarvestPart.open(folder)
    if part is not None and part.key == key:
        _load(part, readings)
        at = part.progress
    else:
        at = _progress(corpus, (0, 0), 0)
    hooks = TransformerHooks()
    for reading in readings:
        reading.source.attach(hooks)
    stop = max(reading.source.layer for reading in readings) + 1
    wanted = [reading.wanted for reading in readings]
    begin = at.next_document, at.next_start
    rows = rows_again(corpus, model.tokenizer, settings.shape, settings.seed, wanted, begin)
    written = n_tokens = at.n_tokens
    with tqdm(
        initial=n_tokens, unit=" tokens", unit_scale=True, desc="near misses", disable=not progress
    ) as bar:
        for batch, following in row_batches(rows, settings.batch_rows):
            tokens, pad, first = model_inputs(model, [row.ids for row in batch])
            model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=stop)
            _judge(readings, Cutter(batch, settings.shape.length, settings.seed, first), tokens)
            n_read = sum(len(row.ids) for row in batch)
            n_tokens += n_read
            bar.update(n_read)
            if following is not None and n_tokens - written >= settings.shard_tokens:
                _save(
                    folder, key, readings, _progress(corpus, (following.document, following.start), n_tokens)
                )
                written = n_tokens


def _judge(readings: Sequence[Rereading], cutter: Cutter, tokens: torch.Tensor) -> None:
    """Hand every source the windows it wants out of a batch."""
    ids = cutter(tokens.cpu()).masked_fill(~cutter.mask, -1)
    for reading in readings:
        windows = torch.from_numpy(np.isin(cutter.place.numpy(), reading.wanted)).nonzero()[:, 0]
        if len(windows):
            own = cutter.only(windows)
            reading.near.take(reading.source.take(own), own, ids[windows])
        else:
            reading.source.forget()


def _progress(corpus: Corpus, following: tuple[int, int], n_tokens: int) -> Progress:
    return Progress(
        first_document=0,
        last_document=corpus.n_documents,
        next_document=following[0],
        next_start=following[1],
        n_tokens=n_tokens,
        is_complete=False,
    )


def _save(folder: Path, key: dict[str, Any], readings: Sequence[Rereading], progress: Progress) -> None:
    state = {
        f"{place}/{name}": held
        for place, reading in enumerate(readings)
        for name, held in reading.near.state().items()
    }
    HarvestPart.write(folder, key, progress, state)


def _load(part: HarvestPart, readings: Sequence[Rereading]) -> None:
    state = part.state()
    for place, reading in enumerate(readings):
        start = f"{place}/"
        reading.near.load(
            {key.removeprefix(start): held for key, held in state.items() if key.startswith(start)}
        )
