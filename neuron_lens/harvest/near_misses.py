"""Near misses of every unit of a source: windows in which it is silent though it might have fired.

Two reasons make one. "similar": a most similar unit fires there; the better the higher that one's activation, as a
share of its largest, times how alike they are. "same_token": a token stands there on which the unit fires most
elsewhere; the better the more of its strongest windows have it. The best of each part and reason are kept, out of the
uniform sample and of windows the model reads a second time (`rereading`): in both the activations of all units are
known, so that silence is seen and never supposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.files.mapped import release_pages
from neuron_lens.harvest.cutter import Cutter, priority_of
from neuron_lens.harvest.keepers import State, TopWindows, WindowBatch, uniform_of
from neuron_lens.harvest.kept_tensors import release
from neuron_lens.harvest.neighbours import FIRING_SHARE, Sampled
from neuron_lens.harvest.scratch import ScratchFile
from neuron_lens.harvest.sources import Caught
from neuron_lens.windows import SPLITS

__all__ = ["NEAR_REASONS", "Likeness", "NearMisses"]

NEAR_REASONS = ("similar", "same_token")

_AT_ONCE = 64  # windows of the sample that are looked at together
_TOP_LISTED = 4  # windows of the train list whose most firing tokens count as the unit's own
_BY_DIRECTION = 1e-3  # how much a cosine counts beside a correlation: less than any

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Likeness:
    """What tells near misses, by unit: its `nearest` units `[unit, n]` and the `weight` of each (0: not alike), its
    own `tokens` `[unit, k]` (-1: none), and of every unit the `scale` (largest activation) and the `threshold`,
    above which it fires, `[unit]`."""

    nearest: Tensor
    weight: Tensor
    tokens: Tensor
    scale: Tensor
    threshold: Tensor

    @classmethod
    def of(cls, sampled: Sampled, neighbours: Arrays, tensors: Arrays) -> Likeness:
        """From the units beside each other and the lists of a harvest.

        A unit fires above FIRING_SHARE of its range in training windows, as explanations are fitted to these.
        """
        n_units = len(sampled.highest)
        nearest = neighbours.get("nearest.unit", np.zeros((n_units, 0), dtype=np.int32))
        weight = neighbours.get("nearest.pearson", np.zeros(nearest.shape, dtype=np.float32))
        if "nearest.cosine" in neighbours:
            weight = np.where(weight > 0, weight, _BY_DIRECTION * neighbours["nearest.cosine"])
        listed = np.flatnonzero(tensors["top.split"] == 0)
        rows = tensors["top.row"][:, listed[:_TOP_LISTED]]
        tokens = np.where(rows >= 0, tensors["top.token"][:, listed[:_TOP_LISTED]], -1)
        highest = sampled.highest
        if len(listed):
            in_train = tensors["top.activations"][:, listed[0]].max(-1).astype(np.float32)
            highest = np.where(tensors["top.row"][:, listed[0]] >= 0, in_train, highest)
            release_pages(tensors["top.activations"])
        return cls(
            nearest=torch.from_numpy(nearest).long(),
            weight=torch.from_numpy(weight).float().clamp(min=0),
            tokens=torch.from_numpy(tokens).long(),
            scale=torch.from_numpy(sampled.highest),
            threshold=torch.from_numpy(sampled.lowest + FIRING_SHARE * (highest - sampled.lowest)),
        )

    def similar(self, largest: Tensor) -> Tensor:
        """How strongly similar units fire in windows, from everybody's largest activations there: `[window, unit]`."""
        share = largest / self.scale.clamp(min=1e-6)
        share = torch.where(share > FIRING_SHARE, share, 0.0)
        strength = torch.zeros_like(share)
        for nearest, weight in zip(self.nearest.T, self.weight.T, strict=True):
            strength = torch.maximum(strength, share[:, nearest] * weight)
        return strength

    def same_token(self, tokens: Tensor) -> Tensor:
        """How many of each unit's own tokens (of a token that counts twice: twice) stand in windows of `tokens`
        `[window, length]` (below 0: none): `[window, unit]`."""
        own = self.tokens.clamp(min=-1)
        n_ids = int(max(tokens.max().item(), own.max().item(), -1)) + 2
        there = torch.zeros(len(tokens), n_ids, dtype=torch.bool)
        there.scatter_(1, tokens.long() + 1, True)
        there[:, 0] = False  # no token is nobody's token
        return sum((there[:, each + 1].float() for each in own.T), torch.zeros(len(tokens), len(own)))

    def silent(self, largest: Tensor) -> Tensor:
        """Where a unit that fires at all does not, `[window, unit]`."""
        return (largest <= self.threshold) & (self.scale > 0)


class NearMisses:
    """The best near misses of each unit of one source, in ranges of units.

    Args:
        places: those of all kept windows, rising: only they have a text.
        bounds: the ranges of units.
        counts: how many are kept of each reason, in every part.
    """

    def __init__(
        self,
        likeness: Likeness,
        places: NDArray[np.int64],
        bounds: list[tuple[int, int]],
        counts: tuple[int, int, int],
        length: int,
        has_partners: bool,
    ) -> None:
        self.likeness, self._places, self._bounds = likeness, places, bounds
        n_units = len(likeness.scale)
        # Of the sample's windows with a reason to fire, by reason and unit: how many there are, and silent ones.
        self._met = torch.zeros(len(NEAR_REASONS), n_units)
        self._found = torch.zeros(len(NEAR_REASONS), n_units)
        self._best = [  # of each range, reason and part
            [
                [
                    TopWindows(count, last - first, length, torch.device("cpu"), has_partners)
                    for count in counts
                ]
                for _ in NEAR_REASONS
            ]
            for first, last in bounds
        ]

    def take_sample(self, sampled: Sampled, places: NDArray[np.int64], seed: int) -> None:
        """Take in the uniform sample, whose windows lie at `places`."""
        priority = torch.tensor([priority_of(place, seed) for place in places.tolist()])
        for begin in range(0, len(places), _AT_ONCE):
            here = slice(begin, begin + _AT_ONCE)

            def batch(first: int, last: int, here: slice = here) -> WindowBatch:
                activations, partners = sampled.activations(here, first, last)
                mask, place = torch.from_numpy(sampled.present[here]), torch.from_numpy(places[here])
                return WindowBatch(activations, mask, place, priority[here], partners)

            largest = torch.from_numpy(sampled.largest[here].astype(np.float32))
            tokens = torch.from_numpy(np.where(sampled.present[here], sampled.tokens[here], -1))
            self._update(batch, largest, tokens, torch.from_numpy(sampled.split[here]), counted=True)
            release(sampled.tensors)

    def take(self, caught: Caught, cutter: Cutter, tokens: Tensor) -> None:
        """Take in windows that the model read again, and their `tokens` `[window, length]` (-1: none). None of them may
        have been taken in before."""
        where = None if caught.is_cut else cutter.where

        def batch(first: int, last: int) -> WindowBatch:
            # What is kept is float16, and has to be silent as such.
            activations, partners = caught.columns(first, last).half().cpu(), caught.partners(first, last)
            partners = None if partners is None else partners.cpu()
            return WindowBatch(activations, cutter.mask, cutter.place, cutter.priority, partners, where)

        largest = [
            torch.stack([window.amax(0) for window in batch(first, last).tokens()])
            for first, last in self._bounds
        ]
        self._update(batch, torch.cat(largest, 1), tokens, cutter.split)

    def _update(
        self,
        batch_of: Callable[[int, int], WindowBatch],
        largest: Tensor,
        tokens: Tensor,
        split: Tensor,
        counted: bool = False,
    ) -> None:
        """Take in windows; `batch_of` gives a range of units, `largest` `[window, unit]` is everybody's there."""
        silent = self.likeness.silent(largest)
        strengths = self.likeness.similar(largest), self.likeness.same_token(tokens)
        if counted:
            for reason, strength in enumerate(strengths):
                self._met[reason] += (strength > 0).sum(0)
                self._found[reason] += ((strength > 0) & silent).sum(0)
        inside = [split == code for code in range(len(SPLITS))]
        for (first, last), best in zip(self._bounds, self._best, strict=True):
            batch = batch_of(first, last)
            for reason, strength in enumerate(strengths):
                own = strength[:, first:last]
                found = silent[:, first:last] & (own > 0)
                if reason == NEAR_REASONS.index("same_token"):
                    own = own + uniform_of(batch)[:, None]  # of many as good ones any, not the corpus's first
                for part, keeper in zip(inside, best[reason], strict=True):
                    keeper.update(batch, torch.where(found & part[:, None], own, -torch.inf))

    def worst(self, reason: str) -> NDArray[np.float32]:
        """The score of the last that is kept of each unit, -inf while there is room (inf: none is
        wanted): `[part, unit]`."""
        place = NEAR_REASONS.index(reason)
        parts = [[keeper.score for keeper in best[place]] for best in self._best]
        joined = [torch.cat(of_part, 1) for of_part in zip(*parts, strict=True)]
        return torch.stack(
            [score.amin(0) if len(score) else score.new_full(score.shape[1:], torch.inf) for score in joined]
        ).numpy()

    def chance(self, reason: str) -> NDArray[np.float32]:
        """The chance that a unit is silent where there is this reason to fire, from the sample (Laplace): `[unit]`."""
        place = NEAR_REASONS.index(reason)
        return ((self._found[place] + 1) / (self._met[place] + 2)).numpy()

    def tensors(self, scratch: ScratchFile) -> Arrays:
        """`near.row` (of kept windows, -1: none), `near.activations` and, of units that have them, `near.partners`
        `[unit, slot, ...]`, best first; `near.split` and `near.reason` (of NEAR_REASONS) `[slot]`. A window that is
        found for both reasons is listed as similar. Nothing is held here any more then."""
        sizes = [
            (code, reason, keeper.count)
            for reason, of_reason in enumerate(self._best[0])
            for code, keeper in enumerate(of_reason)
        ]
        counts = [count for _, _, count in sizes]
        some = self._best[0][0][0]
        shape = self._bounds[-1][1], sum(counts), some.activations.shape[-1]
        tensors: Arrays = {
            "near.row": np.empty(shape[:2], dtype=np.int32),
            "near.activations": scratch.array(shape, np.float16),
            "near.split": np.repeat([code for code, _, _ in sizes], counts).astype(np.int32),
            "near.reason": np.repeat([reason for _, reason, _ in sizes], counts).astype(np.int32),
        }
        if some.partners is not None:
            tensors["near.partners"] = scratch.array(shape, np.int16)
        n_similar = sum(count for _, reason, count in sizes if reason == 0)
        for first, last in self._bounds:
            flat = [keeper.sorted() for of_reason in self._best.pop(0) for keeper in of_reason]
            place = torch.cat([keeper.place for keeper in flat]).T.numpy()
            row = np.where(place >= 0, np.searchsorted(self._places, place), -1)
            again = (row[:, n_similar:, None] == row[:, None, :n_similar]).any(-1)
            row[:, n_similar:][again] = -1
            tensors["near.row"][first:last] = row
            for name in tensors.keys() & {"near.activations", "near.partners"}:
                held = [getattr(keeper, name.removeprefix("near.")) for keeper in flat]
                tensors[name][first:last] = torch.cat(held).transpose(0, 1).numpy()
                release_pages(tensors[name])
        return tensors

    def state(self) -> State:
        """The windows held, by name."""
        return {
            f"{name}.{key}": held for name, keeper in self._keepers() for key, held in keeper.state().items()
        }

    def load(self, state: State) -> None:
        """Take a state back."""
        for name, keeper in self._keepers():
            start = f"{name}."
            keeper.load(
                {key.removeprefix(start): held for key, held in state.items() if key.startswith(start)}
            )

    def _keepers(self) -> Iterator[tuple[str, TopWindows]]:
        for number, best in enumerate(self._best):
            for reason, of_reason in zip(NEAR_REASONS, best, strict=True):
                for code, keeper in enumerate(of_reason):
                    yield f"{number}.{reason}{code}", keeper
