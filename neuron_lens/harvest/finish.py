"""From keepers to a harvest on disk: the text of all kept windows, and the units beside each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.cutter import places_of
from neuron_lens.harvest.keepers import TopWindows, UniformSample
from neuron_lens.harvest.kept import SourceKeepers
from neuron_lens.harvest.near_misses import Likeness, NearMisses
from neuron_lens.harvest.neighbours import Sampled, nearest_units
from neuron_lens.harvest.rereading import wanted_places
from neuron_lens.harvest.second_pass import Rereading
from neuron_lens.harvest.settings import HarvestSettings
from neuron_lens.harvest.shard import LayerHarvest
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.harvest.sparse_sample import SparseSample
from neuron_lens.harvest.statistics import BIN_EDGES
from neuron_lens.harvest.window_text import gather_windows
from neuron_lens.windows import TextWindows

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["UnfinishedHarvest", "write_kept"]

_WINDOWS_AT_ONCE = 64  # of the sample that are put in order of units together

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class UnfinishedHarvest:
    """A harvest on disk as far as the first pass goes: what is missing are its near misses, and the manifest."""

    folder: Path
    reading: Rereading
    facts: dict[str, Any]

    def write_near(self) -> None:
        """Put the near misses on disk."""
        LayerHarvest.write_near(self.folder, self.reading.near.tensors())

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
    tops = _lists(kept, "top")
    fired = _lists(kept, "fired")
    sampled_places = torch.cat(
        [sample.place[sample.place >= 0].sort().values for sample in kept.ranges[0].random]
    )
    random_places = sampled_places.numpy()
    held = [random_places, *(one.place.cpu().numpy().ravel() for one in (*tops, *fired))]
    places = np.unique(np.concatenate(held))
    documents, starts = places_of(places[places >= 0])
    windows, unlexed = gather_windows(
        corpus,
        model.tokenizer,
        settings.shape,
        np.stack([documents, starts], 1),
        _token_texts(model),
        settings.seed,
    )
    random_rows = windows.rows_of(*places_of(random_places))
    sparse, tensors = _random_tensors(kept)
    tensors |= {"unit.index": np.array(source.indices, dtype=np.int32), "random.row": random_rows}
    tensors |= _list_tensors("top", tops, windows) | _list_tensors("fired", fired, windows)
    tensors |= _figures(kept)
    sampled = Sampled.of(tensors, windows, random_rows, sparse)
    written = source.written()
    neighbours = nearest_units(
        sampled, None if written is None else written.detach().cpu(), settings.neighbours
    )
    tensors |= neighbours
    own_places = places[places >= 0]
    likeness = Likeness.of(sampled, neighbours, tensors)
    near = NearMisses(
        likeness, own_places, kept.bounds, settings.near, settings.shape.length, source.has_partners
    )
    near.take_sample(sampled, random_places, settings.seed)
    budget = int(settings.reread * n_tokens)
    wanted = wanted_places(likeness, tensors, windows, own_places, settings.near, budget)
    facts = {
        "n_tokens": n_tokens,
        "n_documents": corpus.n_documents,
        "n_unlexed_documents": unlexed,
        "kind": source.kind,
        "is_sparse": source.is_sparse,
    }
    LayerHarvest.write(folder, windows, tensors)
    return UnfinishedHarvest(folder, Rereading(source, near, wanted), facts)


def _lists(kept: SourceKeepers, name: str) -> list[TopWindows]:
    """The lists of all units, a keeper a part, sorted."""
    parts = [[keeper.sorted() for keeper in getattr(keepers, name)] for keepers in kept.ranges]
    return [_joined(list(same)) for same in zip(*parts, strict=True)]


def _joined(parts: list[TopWindows]) -> TopWindows:
    """The lists of neighbouring ranges of units as one."""
    whole = parts[0]
    if len(parts) > 1:
        whole.score = torch.cat([part.score for part in parts], 1)
        whole.place = torch.cat([part.place for part in parts], 1)
        whole.activations = torch.cat([part.activations for part in parts], 1)
        if whole.partners is not None:
            whole.partners = torch.cat([part.partners for part in parts if part.partners is not None], 1)
    return whole


def _list_tensors(name: str, lists: list[TopWindows], windows: TextWindows) -> Arrays:
    """Rows, activations (and partners) of listed windows `[unit, slot, ...]`, and the part of each slot."""
    if not lists:
        return {}
    places = torch.cat([one.place for one in lists]).T.cpu().numpy()
    rows = np.full(places.shape, -1, dtype=np.int32)
    rows[places >= 0] = windows.rows_of(*places_of(places[places >= 0]))
    split = [code for code, one in enumerate(lists) for _ in range(one.count)]
    activations = _by_unit([one.activations for one in lists])
    strongest = torch.from_numpy(activations).argmax(-1).numpy()
    tensors = {
        f"{name}.row": rows,
        f"{name}.token": windows.columns["token"][rows, windows.context + strongest],
        f"{name}.activations": activations,
        f"{name}.split": np.array(split, dtype=np.int32),
    }
    partners = [one.partners for one in lists if one.partners is not None]
    return tensors | ({f"{name}.partners": _by_unit(partners)} if partners else {})


def _by_unit(slots: list[Tensor]) -> NDArray[Any]:
    """[slot, unit, length] tensors as one [unit, slot, length]."""
    return np.asarray(torch.cat(slots).transpose(0, 1).contiguous().cpu().numpy())


def _random_tensors(kept: SourceKeepers) -> tuple[bool, Arrays]:
    """The uniform sample by unit: dense, or the columns of a sparse matrix with one row a unit."""
    if any(isinstance(sample, SparseSample) for sample in kept.ranges[0].random):
        return True, _sparse_tensors(kept)
    samples = [
        [sample for sample in keepers.random if isinstance(sample, UniformSample)] for keepers in kept.ranges
    ]
    n_windows = sum(int((sample.place >= 0).sum()) for sample in samples[0])
    n_units, length = kept.bounds[-1][1], kept.ranges[0].top[0].activations.shape[-1]
    dense: Arrays = {}
    for name, dtype in (("activations", np.float16), ("partners", np.int16)):
        if getattr(samples[0][0], name) is None:
            continue
        dense[f"random.{name}"] = out = np.empty((n_units, n_windows, length), dtype=dtype)
        for (first, last), parts in zip(kept.bounds, samples, strict=True):
            begin = 0
            for sample in parts:
                held = getattr(sample, name)
                for slots in sample.slots().split(_WINDOWS_AT_ONCE):
                    own = held[slots.to(held.device)].permute(2, 0, 1).cpu().numpy()
                    out[first:last, begin : begin + len(slots)] = own
                    begin += len(slots)
    return False, dense


def _sparse_tensors(kept: SourceKeepers) -> Arrays:
    columns: list[list[Tensor]] = [[], [], [], []]  # unit, window, position, value
    for (first, _), keepers in zip(kept.bounds, kept.ranges, strict=True):
        begin = 0
        for sample in keepers.random:
            assert isinstance(sample, SparseSample), "all samples of a source are of one kind"
            _, entries = sample.by_place()
            for slot, entry in enumerate(entries, start=begin):
                columns[0].append(entry[0] + first)
                columns[1].append(torch.full_like(entry[0], slot))
                columns[2].append(entry[1])
                columns[3].append(entry[2])
            begin += len(entries)
    unit, window, position, value = (torch.cat(parts) for parts in columns)
    order = unit.argsort(stable=True)
    n_units = kept.bounds[-1][1]
    counts = torch.bincount(unit.long(), minlength=n_units)
    return {
        "random.begin": np.concatenate([[0], counts.cumsum(0).numpy()]).astype(np.int64),
        "random.window": window[order].int().numpy(),
        "random.position": position[order].numpy(),
        "random.value": value[order].numpy(),
    }


def _figures(kept: SourceKeepers) -> Arrays:
    """Moments and histograms of every unit."""
    moments = [keepers.moments for keepers in kept.ranges]
    stacked = [
        torch.cat([one.central(), one.low.double()[None], one.high.double()[None]]).T.cpu() for one in moments
    ]
    counts = torch.cat([keepers.histogram.counts.cpu() for keepers in kept.ranges])
    return {
        "moments": torch.cat(stacked).contiguous().numpy(),
        "histogram": counts.numpy(),
        "histogram.edge": BIN_EDGES,
    }


def _token_texts(model: Transformer) -> list[str]:
    """The text of every id of the model's vocabulary; ids beyond the tokenizer's are empty."""
    size = model.tokenizer.vocab_size
    known = [model.tokenizer.token_str(token) for token in range(min(size, model.config.d_vocab))]
    return known + [""] * (model.config.d_vocab - len(known))
