"""What is kept of a stream of activations, for many units at once, in bounded memory: windows.

Each keeper takes batches of windows `[window, length, unit]`; what it holds depends on the number of
units and of kept windows, never on the number of tokens. Every choice is a function of the windows'
contents and places alone, so that the order of batches does not matter and two keepers of the same stream
cut in two can be merged. `state` is everything a keeper holds, as tensors; `load` takes it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lens.harvest.scratch import ScratchFile, ScratchRows

__all__ = ["State", "TopWindows", "UniformSample", "WindowBatch", "fired_scores", "uniform_of"]

State = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Windows of one batch, cut or still in the rows the model read, so that nothing need be copied.

    `activations` `[window, length, unit]`, or with `where` `[row, pos, unit]`; `where` is the row and the first
    position of every window. `mask` `[window, length]` is True where there is a token (the first ones of a
    window), `place` the identity of every window (one integer) and `priority` a hash of it; `partners` are like
    activations, int16, for units that have them.
    """

    activations: Tensor
    mask: Tensor
    place: Tensor
    priority: Tensor
    partners: Tensor | None = None
    where: tuple[Tensor, Tensor] | None = None

    def tokens(self) -> Iterator[Tensor]:
        """The tokens of each window `[token, unit]`, float32."""
        present = self.mask.sum(1).tolist()
        if self.where is None:
            places = [(window, 0) for window in range(len(present))]
        else:
            places = list(zip(self.where[0].tolist(), self.where[1].tolist(), strict=True))
        for (row, begin), count in zip(places, present, strict=True):
            yield self.activations[row, begin : begin + count].float()

    def whole(self, windows: Tensor, of: Tensor) -> Tensor:
        """Some windows of activations or partners `[n, length, unit]`, 0 where there is no token."""
        rows, positions = self._index(windows, of.device)
        return self._blanked(of[rows, positions], windows)

    def pick(self, windows: Tensor, units: Tensor, of: Tensor) -> Tensor:
        """One unit of each of some windows of activations or partners `[n, length]`, 0 where there is no token."""
        windows = windows.to(self.mask.device)
        rows, positions = self._index(windows, of.device)
        return self._blanked(of[rows, positions, units[:, None]], windows)

    def _blanked(self, values: Tensor, windows: Tensor) -> Tensor:
        """0 where a window `[n, length, ...]` has no token: only a document's last window is that short."""
        hidden = ~self.mask[windows]
        if not hidden.any():
            return values
        return values.masked_fill(
            hidden.to(values.device).reshape(*hidden.shape, *[1] * (values.ndim - 2)), 0
        )

    def _index(self, windows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and positions of the tokens of some windows, each `[n, length]`."""
        steps = torch.arange(self.mask.shape[1])
        if self.where is None:
            rows, begins = windows, torch.zeros_like(windows)
        else:
            rows, begins = self.where[0][windows], self.where[1][windows]
        last = self.activations.shape[1] - 1
        positions = (begins[:, None] + steps).clamp(max=last)
        return rows[:, None].to(device), positions.to(device)


def uniform_of(batch: WindowBatch) -> Tensor:
    """A number from 0 to 1 for every window `[window]`, drawn uniformly, the same whenever it is met."""
    return (1.0 - batch.priority.double() / 2.0**63).float()


def fired_scores(batch: WindowBatch, largest: Tensor) -> Tensor:
    """Scores whose top is a uniform sample of the windows in which a unit fires (is above 0) `[window, unit]`."""
    drawn = uniform_of(batch).to(largest.device)[:, None].expand_as(largest)
    return torch.where(largest > 0, drawn, -torch.inf)


class TopWindows:
    """For each unit, the `count` windows of the largest score; of equal ones those that come first in the
    corpus.

    `score` and `place` are `[count, unit]` in no order (-inf and -1 while there are fewer windows),
    `activations` `[count, unit, length]` in float16, `partners` the same in int16 or None. A window's slot
    never changes: only what leaves is written over.
    """

    def __init__(
        self, count: int, n_units: int, length: int, device: torch.device, has_partners: bool = False
    ) -> None:
        self.count = count
        self.score = torch.full((count, n_units), -torch.inf, device=device)
        self.place = torch.full((count, n_units), -1, dtype=torch.long, device=device)
        self.activations = torch.zeros(count, n_units, length, dtype=torch.float16, device=device)
        self.partners = torch.zeros_like(self.activations, dtype=torch.int16) if has_partners else None

    def update(self, batch: WindowBatch, score: Tensor) -> None:
        """Take a batch in; `score` `[window, unit]` says what is kept (-inf: nothing is)."""
        if not len(score) or not self.count:
            return
        # Once the lists are full, few windows enter few units' lists: only those are sorted.
        beating = (score >= self.score.amin(0)) & (score > -torch.inf)
        windows, units = beating.any(1).nonzero()[:, 0], beating.any(0).nonzero()[:, 0]
        if not len(windows):
            return
        candidates = torch.where(beating[windows][:, units], score[windows][:, units], -torch.inf)
        places = batch.place.to(score.device)[windows][:, None].expand_as(candidates)
        unit, slot, candidate = self._exchange(units, candidates, places)
        window = windows[candidate]
        own = (slot, units[unit])
        self.score[own], self.place[own] = candidates[candidate, unit], places[candidate, unit]
        self.activations[own] = batch.pick(window, units[unit], batch.activations).half()
        if self.partners is not None:
            assert batch.partners is not None, "units with partners bring them in every batch"
            self.partners[own] = batch.pick(window, units[unit], batch.partners)

    def _exchange(self, units: Tensor, candidates: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which candidates go into which slots: places among `units`, slots, places among candidates."""
        scores = torch.cat([self.score[:, units], candidates])
        ordered = torch.cat([self.place[:, units], places]).argsort(dim=0)
        falling = scores.gather(0, ordered).argsort(dim=0, descending=True, stable=True)
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept.scatter_(0, ordered.gather(0, falling[: self.count]), True)
        kept &= scores > -torch.inf
        # Of each unit as many slots are left as candidates come in; slots that were empty are left first.
        free = ~kept[: self.count]
        unit, candidate = kept[self.count :].T.nonzero(as_tuple=True)
        coming = kept[self.count :].sum(0)
        nth = free.cumsum(0)  # the how-manieth free slot of its unit each free slot is, from 1
        leaving = (free & (nth <= coming)).T.nonzero()[:, 1]
        return unit, leaving, candidate

    def merge(self, other: TopWindows) -> None:
        """Take in what another keeper of other windows holds."""
        for slot in range(other.count):
            self._merge_one(other, slot)

    def _merge_one(self, other: TopWindows, slot: int) -> None:
        units = (other.score[slot] > -torch.inf).nonzero()[:, 0]
        if not len(units) or not self.count:
            return
        unit, leaving, _ = self._exchange(
            units, other.score[slot, units][None], other.place[slot, units][None]
        )
        own, theirs = (leaving, units[unit]), (slot, units[unit])
        self.score[own], self.place[own] = other.score[theirs], other.place[theirs]
        self.activations[own] = other.activations[theirs]
        if self.partners is not None and other.partners is not None:
            self.partners[own] = other.partners[theirs]

    def sorted(self) -> TopWindows:
        """The same windows in falling order of score, those of equal score in order of the corpus."""
        ordered = self.place.argsort(dim=0)
        order = ordered.gather(0, self.score.gather(0, ordered).argsort(dim=0, descending=True, stable=True))
        wide = order[:, :, None].expand_as(self.activations)
        fallen = TopWindows(self.count, 0, 0, self.score.device)
        fallen.score, fallen.place = self.score.gather(0, order), self.place.gather(0, order)
        fallen.activations = self.activations.gather(0, wide)
        fallen.partners = None if self.partners is None else self.partners.gather(0, wide)
        return fallen

    def state(self) -> State:
        """Everything held."""
        held = {"score": self.score, "place": self.place, "activations": self.activations}
        return held if self.partners is None else {**held, "partners": self.partners}

    def load(self, state: State) -> None:
        """Take a state back: a copy, since it may lie in a file as a whole."""
        self.score.copy_(state["score"])
        self.place.copy_(state["place"])
        self.activations.copy_(state["activations"])
        if self.partners is not None:
            self.partners.copy_(state["partners"])


class UniformSample:
    """The `count` windows of smallest hash, which is a uniform sample without replacement, shared by all
    units.

    `place` and `priority` are `[count]`, `activations` `[count, length, unit]` in float16, `partners` the
    same in int16 or None. With a scratch file the activations are in it.
    """

    activations: Tensor | ScratchRows

    def __init__(
        self,
        count: int,
        n_units: int,
        length: int,
        device: torch.device,
        has_partners: bool = False,
        scratch: ScratchFile | None = None,
    ) -> None:
        self.count = count
        self.place = torch.full((count,), -1, dtype=torch.long)
        self.priority = torch.full((count,), torch.iinfo(torch.long).max, dtype=torch.long)
        if scratch is not None:
            self.activations = scratch.rows(count, length, n_units)
        else:
            self.activations = torch.zeros(count, length, n_units, dtype=torch.float16, device=device)
        self.partners = (
            torch.zeros(count, length, n_units, dtype=torch.int16, device=device) if has_partners else None
        )

    def update(self, batch: WindowBatch, windows: Tensor | None = None) -> None:
        """Take a batch in, or some of its windows."""
        windows = torch.arange(len(batch.place)) if windows is None else windows
        slots, entering = entering_slots(self.place, self.priority, batch.priority[windows], self.count)
        if not len(slots):
            return
        entering = windows[entering]
        self.place[slots] = batch.place[entering]
        self.priority[slots] = batch.priority[entering]
        device = self.activations.device
        self.activations[slots.to(device)] = batch.whole(entering, batch.activations).half()
        if self.partners is not None:
            assert batch.partners is not None, "units with partners bring them in every batch"
            self.partners[slots.to(self.partners.device)] = batch.whole(entering, batch.partners)

    def merge(self, other: UniformSample) -> None:
        """Take in what another sample of other windows holds."""
        held = (other.place >= 0).nonzero()[:, 0]
        device = other.activations.device
        self.update(
            WindowBatch(
                other.activations[held.to(device)],
                torch.ones(len(held), other.activations.shape[1], dtype=torch.bool),
                other.place[held],
                other.priority[held],
                None if other.partners is None else other.partners[held.to(other.partners.device)],
            )
        )

    def slots(self) -> Tensor:
        """The slots that hold a window, in order of the windows' places."""
        held = (self.place >= 0).nonzero()[:, 0]
        return held[self.place[held].argsort()]

    def sorted(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Places `[n]`, activations and partners `[n, length, unit]` of what is held, by place."""
        held = self.slots()
        own = self.activations[held.to(self.activations.device)]
        partners = None if self.partners is None else self.partners[held.to(self.partners.device)]
        return self.place[held], own, partners

    def state(self) -> State:
        """Everything held."""
        own = self.activations if isinstance(self.activations, Tensor) else self.activations.mapped()
        held = {"place": self.place, "priority": self.priority, "activations": own}
        return held if self.partners is None else {**held, "partners": self.partners}

    def load(self, state: State) -> None:
        """Take a state back: a copy, since it may lie in a file as a whole."""
        self.place, self.priority = state["place"].clone(), state["priority"].clone()
        self.activations[torch.arange(self.count)] = state["activations"]
        if self.partners is not None:
            self.partners.copy_(state["partners"])


def entering_slots(place: Tensor, priority: Tensor, coming: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Which slots of a sample are written over by which of the windows that come, by their hashes."""
    order = torch.cat([priority, coming]).argsort(stable=True)[:count]
    entering = order[order >= count] - count
    leaving = torch.ones(count, dtype=torch.bool)
    leaving[order[order < count]] = False
    return leaving.nonzero()[:, 0], entering
