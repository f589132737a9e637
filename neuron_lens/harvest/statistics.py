"""Figures over every token of a stream, for many units at once: moments, extremes, a histogram.

Sums, not windows: memory is a few numbers a unit.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.harvest.keepers import State

__all__ = ["BIN_EDGES", "LogHistogram", "Moments"]

_LOWEST, _HIGHEST = -10, 10  # octaves: bins from 2**-10 to 2**10
_PER_OCTAVE = 4
_N_BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 2
_SHIFT = 21  # leaves the exponent and two bits of the fraction of a float32
_FIRST = ((_LOWEST + 127) << 2) - 1  # what the shift makes of the float just below 2**-10

# The inner edges of the bins, rising: the first bin is everything below 2**-10 (and below zero), the last
# everything from 2**10.
BIN_EDGES: NDArray[np.float64] = np.array(
    [
        2.0**octave * (1 + step / _PER_OCTAVE)
        for octave in range(_LOWEST, _HIGHEST)
        for step in range(_PER_OCTAVE)
    ]
    + [2.0**_HIGHEST]
)


class Moments:
    """Number, extremes and the first four power sums of each unit's activation, about a fixed point.

    The point is the mean of the first window: sums about it do not cancel. Sums are float64.
    """

    def __init__(self) -> None:
        self.n = 0
        self.shift = torch.zeros(0)
        self.sums = torch.zeros(0, dtype=torch.float64)
        self.low = torch.zeros(0)
        self.high = torch.zeros(0)

    def update(self, values: Tensor, highest: Tensor | None = None) -> None:
        """Take tokens in `[token, unit]`, float32; a window at a time, so that they stay in the cache. `highest`
        `[unit]` is their largest, where it is known already."""
        if self.n == 0:
            self.shift = values.mean(0)
            self.sums = torch.zeros(4, values.shape[1], dtype=torch.float64, device=values.device)
            self.low, self.high = (
                torch.full_like(self.shift, torch.inf),
                torch.full_like(self.shift, -torch.inf),
            )
        self.n += len(values)
        self.low = torch.minimum(self.low, values.amin(0))
        self.high = torch.maximum(self.high, values.amax(0) if highest is None else highest)
        centred = values - self.shift
        square = centred * centred
        self.sums[0] += centred.sum(0)
        self.sums[1] += square.sum(0)
        self.sums[2] += centred.mul_(square).sum(0)
        self.sums[3] += square.square_().sum(0)

    def merge(self, other: Moments) -> None:
        """Add another's tokens: its sums are moved to this one's point."""
        if other.n == 0:
            return
        if self.n == 0:
            self.load(other.state())
            return
        move = other.shift.double() - self.shift.double()
        a1, a2, a3, a4 = other.sums
        self.sums[0] += a1 + other.n * move
        self.sums[1] += a2 + 2 * move * a1 + other.n * move**2
        self.sums[2] += a3 + 3 * move * a2 + 3 * move**2 * a1 + other.n * move**3
        self.sums[3] += a4 + 4 * move * a3 + 6 * move**2 * a2 + 4 * move**3 * a1 + other.n * move**4
        self.n += other.n
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def central(self) -> Tensor:
        """Mean, variance, third and fourth central moment, `[4, unit]`, float64."""
        a1, a2, a3, a4 = self.sums / max(self.n, 1)
        variance = (a2 - a1**2).clamp(min=0)
        third = a3 - 3 * a1 * a2 + 2 * a1**3
        fourth = a4 - 4 * a1 * a3 + 6 * a1**2 * a2 - 3 * a1**4
        return torch.stack([self.shift.double() + a1, variance, third, fourth.clamp(min=0)])

    def state(self) -> State:
        """Everything held."""
        own = {"shift": self.shift, "sums": self.sums, "low": self.low, "high": self.high}
        return {"n": torch.tensor(self.n), **own}

    def load(self, state: State) -> None:
        """Take a state back."""
        self.n = int(state["n"])
        self.shift, self.sums = state["shift"].clone(), state["sums"].clone()
        self.low, self.high = state["low"].clone(), state["high"].clone()


class LogHistogram:
    """How many tokens fall between BIN_EDGES, for each unit: `counts` `[unit, bin]`, int64.

    Four bins an octave, found by the float's own bits: the exponent and two bits of the fraction.
    """

    def __init__(self, n_units: int, device: torch.device) -> None:
        self.counts = torch.zeros(n_units, _N_BINS, dtype=torch.int64, device=device)
        self._offset = torch.arange(n_units, device=device, dtype=torch.int32) * _N_BINS - _FIRST

    def bins(self, values: Tensor) -> Tensor:
        """Where tokens `[token, unit]`, float32, are counted: the place in `counts`, flat."""
        bins = (values.view(torch.int32) >> _SHIFT).clamp_(_FIRST, _FIRST + _N_BINS - 1)
        return bins.add_(self._offset).flatten()

    def update(self, bins: Tensor) -> None:
        """Take tokens in by their places: many at once, since each time costs as much as there are bins."""
        self.counts += torch.bincount(bins, minlength=self.counts.numel()).view_as(self.counts)

    def merge(self, other: LogHistogram) -> None:
        """Add another's tokens."""
        self.counts += other.counts

    def state(self) -> State:
        """Everything held."""
        return {"counts": self.counts}

    def load(self, state: State) -> None:
        """Take a state back."""
        self.counts.copy_(state["counts"])
