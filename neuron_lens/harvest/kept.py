"""All keepers of one source: windows and figures of every unit, in ranges of units.

A wide source is taken in a range of units at a time, so that no batch of it is ever dense as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lens.harvest.cutter import Cutter
from neuron_lens.harvest.keepers import State, TopWindows, UniformSample, WindowBatch, fired_scores
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.harvest.settings import HarvestSettings
from neuron_lens.harvest.sources import Caught, UnitSource
from neuron_lens.harvest.sparse_sample import SparseSample
from neuron_lens.harvest.statistics import LogHistogram, Moments
from neuron_lens.windows import SPLITS

__all__ = ["RangeKeepers", "SourceKeepers"]

_UNITS_AT_ONCE = 4096
_BINS_AT_ONCE = 2**22  # activations that are counted together


class RangeKeepers:
    """Everything kept of a range of units, one keeper a part of the corpus where they hold windows."""

    def __init__(
        self,
        n_units: int,
        source: UnitSource,
        settings: HarvestSettings,
        device: torch.device,
        scratch: ScratchFile | None = None,
    ) -> None:
        length = settings.shape.length
        self.moments = Moments()
        self.histogram = LogHistogram(n_units, device)

        def lists(counts: tuple[int, int, int]) -> list[TopWindows]:
            return [TopWindows(count, n_units, length, device, source.has_partners) for count in counts]

        self.top = lists(settings.top)
        self.fired = lists(settings.fired) if source.is_sparse else []
        self.random: list[UniformSample] | list[SparseSample]
        if source.is_sparse:
            self.random = [SparseSample(count, device) for count in settings.random]
        else:
            self.random = [
                UniformSample(count, n_units, length, device, source.has_partners, scratch)
                for count in settings.random
            ]

    def update(self, batch: WindowBatch, split: Tensor) -> None:
        """Take a batch in; `split` `[window]` says which part each window belongs to."""
        largest = self._figures(batch)
        for code in range(len(SPLITS)):
            inside = split == code
            if not inside.any():
                continue
            elsewhere = ~inside.to(largest.device)[:, None]
            score = largest.masked_fill(elsewhere, -torch.inf)
            if self.fired:  # silence is no activation
                score = torch.where(score > 0, score, -torch.inf)
                self.fired[code].update(batch, fired_scores(batch, score))
            self.top[code].update(batch, score)
            self.random[code].update(batch, inside.nonzero()[:, 0])

    def _figures(self, batch: WindowBatch) -> Tensor:
        """Take the tokens in, a window at a time; the largest activation of each window `[window, unit]`."""
        (n, length), n_units = batch.mask.shape, batch.activations.shape[-1]
        largest = torch.empty(n, n_units, device=batch.activations.device)
        bins: list[Tensor] = []
        for window, values in enumerate(batch.tokens()):
            largest[window] = values.amax(0)
            self.moments.update(values, largest[window])
            bins.append(self.histogram.bins(values))
            if len(bins) * length * n_units >= _BINS_AT_ONCE or window == n - 1:
                self.histogram.update(torch.cat(bins))
                bins = []
        return largest

    def merge(self, other: RangeKeepers) -> None:
        """Take in what was kept of other documents."""
        for own, theirs in zip(self._keepers(), other._keepers(), strict=True):
            own[1].merge(theirs[1])

    def state(self) -> State:
        """Everything held, by name."""
        return {
            f"{name}.{key}": value
            for name, keeper in self._keepers()
            for key, value in keeper.state().items()
        }

    def load(self, state: State) -> None:
        """Take a state back."""
        for name, keeper in self._keepers():
            start = f"{name}."
            keeper.load(
                {key.removeprefix(start): held for key, held in state.items() if key.startswith(start)}
            )

    def _keepers(self) -> Iterator[tuple[str, Any]]:
        yield "moments", self.moments
        yield "histogram", self.histogram
        for name, keepers in (("top", self.top), ("fired", self.fired), ("random", self.random)):
            for code, keeper in enumerate(keepers):
                yield f"{name}{code}", keeper


class SourceKeepers:
    """Everything kept of one source; `ranges` are its units in order. With a `scratch` folder the uniform sample,
    which is most of it, is held there and not in memory."""

    def __init__(
        self,
        source: UnitSource,
        settings: HarvestSettings,
        device: torch.device,
        scratch: Path | None = None,
    ) -> None:
        n_units = len(source.indices)
        self.bounds = [
            (first, min(first + _UNITS_AT_ONCE, n_units)) for first in range(0, n_units, _UNITS_AT_ONCE)
        ]
        file = None if scratch is None or source.is_sparse else ScratchFile(scratch)
        self.ranges = [
            RangeKeepers(last - first, source, settings, device, file) for first, last in self.bounds
        ]

    def update(self, caught: Caught, cutter: Cutter) -> None:
        """Take what a source caught in a batch."""
        for (first, last), keepers in zip(self.bounds, self.ranges, strict=True):
            batch = WindowBatch(
                caught.columns(first, last),
                cutter.mask,
                cutter.place,
                cutter.priority,
                caught.partners(first, last),
                None if caught.is_cut else cutter.where,
            )
            keepers.update(batch, cutter.split)

    def merge(self, other: SourceKeepers) -> None:
        """Take in what was kept of other documents."""
        for own, theirs in zip(self.ranges, other.ranges, strict=True):
            own.merge(theirs)

    def state(self) -> State:
        """Everything held, by name."""
        return {
            f"{place}.{key}": value
            for place, keepers in enumerate(self.ranges)
            for key, value in keepers.state().items()
        }

    def load(self, state: Callable[[str], State]) -> None:
        """Take a state back, a range of units at a time: `state` gives the part of it whose names begin so, without
        that."""
        for place, keepers in enumerate(self.ranges):
            keepers.load(state(f"{place}."))
