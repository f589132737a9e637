"""What is kept of a stream of activations, for all units of a layer at once, in bounded memory.

Each keeper takes batches of windows `[window, length, unit]`; what it holds depends on the number of
units and of kept windows, never on the number of tokens. Every choice is a function of the windows'
contents and places alone, so that the order of batches does not matter and two keepers of the same stream
cut in two can be merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "TopWindows", "UniformSample", "WindowBatch"]


@dataclass(frozen=True, eq=False)
class WindowBatch:
    """Windows of one batch: `activations` `[window, length, unit]`, `mask` `[window, length]` True where
    there is a token, and for every window its identity `place` (one integer) and a hash `priority` of
    it."""

    activations: Tensor
    mask: Tensor
    place: Tensor
    priority: Tensor

    def select(self, windows: Tensor) -> WindowBatch:
        """Some of the windows."""
        return WindowBatch(
            self.activations[windows], self.mask[windows], self.place[windows], self.priority[windows]
        )


class Moments:
    """Number, extremes and the first four power sums of each unit's activation, about a fixed point.

    The point is the mean of the first batch: sums about it do not cancel. Sums are float64.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift = torch.zeros(0)
        self.sums = torch.zeros(0)
        self.low = torch.zeros(0)
        self.high = torch.zeros(0)

    def update(self, batch: WindowBatch) -> None:
        """Take a batch's tokens in."""
        values = batch.activations.flatten(0, 1)
        if not batch.mask.all():
            values = values[batch.mask.flatten()]
        values = values.float()
        if self.n == 0:
            self.shift = values.mean(0)
            self.sums = torch.zeros(4, values.shape[1], dtype=torch.float64, device=values.device)
            self.low, self.high = (
                torch.full_like(self.shift, torch.inf),
                torch.full_like(self.shift, -torch.inf),
            )
        self.n += len(values)
        low, high = values.aminmax(dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        centred = values - self.shift
        square = centred * centred
        self.sums[0] += centred.sum(0)
        self.sums[1] += square.sum(0)
        self.sums[2] += (square * centred).sum(0)
        self.sums[3] += square.square_().sum(0)

    def central(self) -> Tensor:
        """Mean, variance, third and fourth central moment, `[4, unit]`, float64."""
        a1, a2, a3, a4 = self.sums / max(self.n, 1)
        variance = (a2 - a1**2).clamp(min=0)
        third = a3 - 3 * a1 * a2 + 2 * a1**3
        fourth = a4 - 4 * a1 * a3 + 6 * a1**2 * a2 - 3 * a1**4
        return torch.stack([self.shift.double() + a1, variance, third, fourth.clamp(min=0)])


class TopWindows:
    """For each unit, the `count` windows with the largest activation.

    `score` and `place` are `[count, unit]` in falling order (places -1 while there are fewer windows),
    `activations` `[count, unit, length]` in float16.
    """

    def __init__(self, count: int, n_units: int, length: int, device: torch.device) -> None:
        self.count = count
        self.score = torch.full((count, n_units), -torch.inf, device=device)
        self.place = torch.full((count, n_units), -1, dtype=torch.long, device=device)
        self.activations = torch.zeros(count, n_units, length, dtype=torch.float16, device=device)

    def update(self, batch: WindowBatch, largest: Tensor) -> None:
        """Take a batch in; `largest` `[window, unit]` is every window's largest activation."""
        if not len(largest):
            return
        # Windows that enter no unit's list are the rule once the lists are full: leave them out of the sort.
        entering = (largest > self.score[-1]).any(1).nonzero()[:, 0]
        if not len(entering):
            return
        candidates = largest[entering].to(self.score.dtype)
        self.score, order = torch.cat([self.score, candidates]).topk(self.count, dim=0)
        places = batch.place.to(order.device)[entering][:, None].expand(-1, order.shape[1])
        self.place = torch.cat([self.place, places]).gather(0, order)
        old = order.clamp(max=self.count - 1)
        self.activations = self.activations.gather(
            0, old[:, :, None].expand(-1, -1, self.activations.shape[2])
        )
        slot, unit = (order >= self.count).nonzero(as_tuple=True)
        window = entering[order[slot, unit] - self.count]
        self.activations[slot, unit] = batch.activations[window, :, unit].half()


class UniformSample:
    """The `count` windows of smallest hash, which is a uniform sample without replacement, shared by all
    units.

    `place` and `priority` are `[count]`, `activations` `[count, length, unit]` in float16.
    """

    def __init__(self, count: int, n_units: int, length: int, device: torch.device) -> None:
        self.count = count
        self.place = torch.full((count,), -1, dtype=torch.long)
        self.priority = torch.full((count,), torch.iinfo(torch.long).max, dtype=torch.long)
        self.activations = torch.zeros(count, length, n_units, dtype=torch.float16, device=device)

    def update(self, batch: WindowBatch) -> None:
        """Take a batch in."""
        order = torch.cat([self.priority, batch.priority]).argsort(stable=True)[: self.count]
        entering = order[order >= self.count] - self.count
        leaving = torch.ones(self.count, dtype=torch.bool)
        leaving[order[order < self.count]] = False
        slots = leaving.nonzero()[:, 0]
        self.place[slots] = batch.place[entering]
        self.priority[slots] = batch.priority[entering]
        device = self.activations.device
        self.activations[slots.to(device)] = batch.activations[entering.to(device)].half()

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Places `[n]` and activations `[n, length, unit]` of what is held, by place."""
        held = (self.place >= 0).nonzero()[:, 0]
        held = held[self.place[held].argsort()]
        return self.place[held], self.activations[held.to(self.activations.device)]
