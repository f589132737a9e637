"""What is kept of a source, unit by unit: the tensors of a harvest.

Windows are kept a slot or a sampled window after the other, for all units; a harvest has them a unit after the other.
They are put in order a range of units or a few windows at a time, into a scratch file, and leave memory as they go.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.files.mapped import release_pages
from neuron_lens.harvest.cutter import places_of
from neuron_lens.harvest.keepers import TopWindows, UniformSample
from neuron_lens.harvest.kept import SourceKeepers
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.harvest.sparse_sample import SparseSample
from neuron_lens.harvest.statistics import BIN_EDGES
from neuron_lens.windows import TextWindows

__all__ = ["figure_tensors", "kept_places", "list_tensors", "release", "sample_places", "sample_tensors"]

_WINDOWS_AT_ONCE = 64  # of the sample that are put in order of units together

Arrays = dict[str, NDArray[Any]]


def sample_places(kept: SourceKeepers) -> NDArray[np.int64]:
    """Where the windows of the uniform sample lie, in the order of its tensors."""
    samples = [sample.place[sample.place >= 0].sort().values for sample in kept.ranges[0].random]
    return np.asarray(torch.cat(samples).numpy())


def kept_places(kept: SourceKeepers) -> NDArray[np.int64]:
    """Where all kept windows lie, rising."""
    places = np.unique(sample_places(kept))
    for keepers in kept.ranges:
        for one in (*keepers.top, *keepers.fired):
            places = np.union1d(places, one.place.cpu().numpy())
    return places[places >= 0]


def list_tensors(name: str, kept: SourceKeepers, windows: TextWindows, scratch: ScratchFile) -> Arrays:
    """Rows, strongest tokens, activations (and partners) of the windows that `kept` lists under a name
    `[unit, slot, ...]`, and the part of each slot. The lists are empty then."""
    lists: list[TopWindows] = getattr(kept.ranges[0], name)
    if not lists:
        return {}
    split = [code for code, one in enumerate(lists) for _ in range(one.count)]
    size = (kept.bounds[-1][1], len(split))
    tensors: Arrays = {
        f"{name}.row": np.full(size, -1, dtype=np.int32),
        f"{name}.token": np.empty(size, dtype=np.int32),
        f"{name}.activations": scratch.array((*size, windows.length), np.float16),
        f"{name}.split": np.array(split, dtype=np.int32),
    }
    if lists[0].partners is not None:
        tensors[f"{name}.partners"] = scratch.array((*size, windows.length), np.int16)
    for (first, last), keepers in zip(kept.bounds, kept.ranges, strict=True):
        own = [keeper.sorted() for keeper in getattr(keepers, name)]
        setattr(keepers, name, [])
        places = torch.cat([one.place for one in own]).T.cpu().numpy()
        rows = tensors[f"{name}.row"][first:last]
        rows[places >= 0] = windows.rows_of(*places_of(places[places >= 0]))
        activations = _by_unit([one.activations for one in own])
        strongest = torch.from_numpy(activations).argmax(-1).numpy()
        tensors[f"{name}.token"][first:last] = windows.columns["token"][rows, windows.context + strongest]
        tensors[f"{name}.activations"][first:last] = activations
        partners = [one.partners for one in own if one.partners is not None]
        if partners:
            tensors[f"{name}.partners"][first:last] = _by_unit(partners)
        release(tensors)
        release_pages(windows.columns["token"])
    return tensors


def release(tensors: Arrays) -> None:
    """Let go of the pages of what is on disk."""
    for tensor in tensors.values():
        release_pages(tensor)


def _by_unit(slots: list[Tensor]) -> NDArray[Any]:
    """[slot, unit, length] tensors as one [unit, slot, length]."""
    return np.asarray(torch.cat(slots).transpose(0, 1).contiguous().cpu().numpy())


def sample_tensors(kept: SourceKeepers, length: int, scratch: ScratchFile) -> Arrays:
    """The uniform sample by unit: dense, or the columns of a sparse matrix with one row a unit."""
    if any(isinstance(sample, SparseSample) for sample in kept.ranges[0].random):
        return _sparse_tensors(kept)
    samples = [
        [sample for sample in keepers.random if isinstance(sample, UniformSample)] for keepers in kept.ranges
    ]
    n_windows = sum(int((sample.place >= 0).sum()) for sample in samples[0])
    dense: Arrays = {}
    for name, dtype in (("activations", np.float16), ("partners", np.int16)):
        if getattr(samples[0][0], name) is None:
            continue
        dense[f"random.{name}"] = out = scratch.array((kept.bounds[-1][1], n_windows, length), dtype)
        for (first, last), parts in zip(kept.bounds, samples, strict=True):
            begin = 0
            for sample in parts:
                held = getattr(sample, name)
                for slots in sample.slots().split(_WINDOWS_AT_ONCE):
                    own = held[slots.to(held.device)].permute(2, 0, 1).cpu().numpy()
                    out[first:last, begin : begin + len(slots)] = own
                    begin += len(slots)
                    release_pages(out)
    return dense


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


def figure_tensors(kept: SourceKeepers) -> Arrays:
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
