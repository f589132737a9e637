"""From keepers to a harvest on disk: the text of all kept windows, and the units beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.cutter import places_of
from neuron_lens.harvest.kept import SourceKeepers
from neuron_lens.harvest.kept_tensors import (
    figure_tensors,
    kept_places,
    list_tensors,
    release,
    sample_places,
    sample_tensors,
)
from neuron_lens.harvest.near_misses import Likeness, NearMisses
from neuron_lens.harvest.nearest import nearest_units
from neuron_lens.harvest.neighbours import Sampled
from neuron_lens.harvest.rereading import wanted_places
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.harvest.second_pass import Rereading
from neuron_lens.harvest.settings import HarvestSettings
from neuron_lens.harvest.shard import LayerHarvest
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.harvest.window_text import gather_windows

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["UnfinishedHarvest", "write_kept"]


@dataclass(frozen=True, eq=False)
class UnfinishedHarvest:
    """A harvest on disk as far as the first pass goes: what is missing are its near misses, and the manifest."""

    folder: Path
    reading: Rereading
    facts: dict[str, Any]

    def write_near(self) -> None:
        """Put the near misses on disk."""
        LayerHarvest.write_near(self.folder, self.reading.near.tensors(ScratchFile(self.folder)))

    def complete(self, key: dict[str, Any]) -> LayerHarvest:
        """Write the manifest: now it is a harvest."""
        return LayerHarvest.complete(self.folder, key, self.facts)


def write_kept(
    folder: Path,
    source: UnitSource,
    kept: SourceKeepers,
    model: Transformer,
    corpus: Corpus,
    settings: HarvestSettings,
    n_tokens: int,
) -> UnfinishedHarvest:
    """Put one source's keepers on disk, with the text of all their windows."""
    scratch, bounds, places = ScratchFile(folder), kept.bounds, kept_places(kept)
    windows, unlexed = gather_windows(
        corpus,
        model.tokenizer,
        settings.shape,
        np.stack(places_of(places), 1),
        _token_texts(model),
        settings.seed,
        scratch,
    )
    random_places = sample_places(kept)
    random_rows = windows.rows_of(*places_of(random_places))
    tensors = {"unit.index": np.array(source.indices, dtype=np.int32), "random.row": random_rows}
    tensors |= sample_tensors(kept, settings.shape.length, scratch)
    tensors |= list_tensors("top", kept, windows, scratch) | list_tensors("fired", kept, windows, scratch)
    tensors |= figure_tensors(kept)
    del kept  # the sample in order of windows: as much as the one in order of units
    sampled = Sampled.of(tensors, windows, random_rows, source.is_sparse)
    written = source.written()
    neighbours = nearest_units(
        sampled, None if written is None else written.detach().cpu(), settings.neighbours
    )
    tensors |= neighbours
    likeness = Likeness.of(sampled, neighbours, tensors)
    release(tensors)
    near = NearMisses(likeness, places, bounds, settings.near, settings.shape.length, source.has_partners)
    near.take_sample(sampled, random_places, settings.seed)
    budget = int(settings.reread * n_tokens)
    wanted = wanted_places(near, tensors, windows, places, settings.near, budget)
    facts = {
        "n_tokens": n_tokens,
        "n_documents": corpus.n_documents,
        "n_unlexed_documents": unlexed,
        "kind": source.kind,
        "is_sparse": source.is_sparse,
    }
    LayerHarvest.write(folder, windows, tensors)
    return UnfinishedHarvest(folder, Rereading(source, near, wanted), facts)


def _token_texts(model: Transformer) -> list[str]:
    """The text of every id of the model's vocabulary; ids beyond the tokenizer's are empty."""
    size = model.tokenizer.vocab_size
    known = [model.tokenizer.token_str(token) for token in range(min(size, model.config.d_vocab))]
    return known + [""] * (model.config.d_vocab - len(known))
