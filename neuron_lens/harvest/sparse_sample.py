"""A uniform sample of windows whose units are silent almost everywhere: only what is above zero is held.

A window's entry is three columns, unit, position and value: 8 bytes for an active latent at a token, where a
dense window of a wide dictionary takes two bytes for every latent, active or not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.harvest.keepers import State, WindowBatch, entering_slots

__all__ = ["SparseSample"]


class SparseSample:
    """`UniformSample` for sparse units: the `count` windows of smallest hash, `entries` for each of them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self.place = torch.full((count,), -1, dtype=torch.long)
        self.priority = torch.full((count,), torch.iinfo(torch.long).max, dtype=torch.long)
        self.entries: list[tuple[Tensor, Tensor, Tensor]] = [_nothing() for _ in range(count)]

    def update(self, batch: WindowBatch, windows: Tensor | None = None) -> None:
        """Take a batch in, or some of its windows."""
        windows = torch.arange(len(batch.place)) if windows is None else windows
        slots, entering = entering_slots(self.place, self.priority, batch.priority[windows], self.count)
        entering = windows[entering]
        self.place[slots] = batch.place[entering]
        self.priority[slots] = batch.priority[entering]
        for slot, window in zip(slots.tolist(), entering.tolist(), strict=True):
            held = batch.whole(torch.tensor([window]), batch.activations)[0]  # [length, unit]
            position, unit = held.nonzero(as_tuple=True)
            values = held[position, unit].half().cpu()
            self.entries[slot] = (unit.int().cpu(), position.short().cpu(), values)

    def merge(self, other: SparseSample) -> None:
        """Take in what another sample of other windows holds."""
        held = (other.place >= 0).nonzero()[:, 0]
        slots, entering = entering_slots(self.place, self.priority, other.priority[held], self.count)
        self.place[slots] = other.place[held][entering]
        self.priority[slots] = other.priority[held][entering]
        for slot, source in zip(slots.tolist(), held[entering].tolist(), strict=True):
            self.entries[slot] = other.entries[source]

    def by_place(self) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Places `[n]` of what is held and its entries, by place."""
        held = (self.place >= 0).nonzero()[:, 0]
        held = held[self.place[held].argsort()]
        return self.place[held], [self.entries[slot] for slot in held.tolist()]

    def state(self) -> State:
        """Everything held; entries end to end."""
        units, positions, values = (
            torch.cat([entry[column] for entry in self.entries]) for column in range(3)
        )
        return {
            "place": self.place,
            "priority": self.priority,
            "sizes": torch.tensor([len(entry[0]) for entry in self.entries], dtype=torch.long),
            "units": units,
            "positions": positions,
            "values": values,
        }

    def load(self, state: State) -> None:
        """Take a state back."""
        self.place, self.priority = state["place"].clone(), state["priority"].clone()
        sizes = state["sizes"].tolist()
        # Copies: a view would keep the whole column alive for one window.
        columns = [
            [part.clone() for part in state[name].split(sizes)] for name in ("units", "positions", "values")
        ]
        self.entries = list(zip(*columns, strict=True))


def _nothing() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, dtype=torch.int16),
        torch.zeros(0, dtype=torch.float16),
    )
