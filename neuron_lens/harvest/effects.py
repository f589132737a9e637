"""What changing one unit at one token does to the prediction of the next: the records causal scoring is judged by.

Steered: in a test window the unit is silent in, it is set to a multiple of its largest activation. Ablated: in a test
window it fires in, it is replaced, where it is largest, by what stands for it when it is taken out (its mean, or zero).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.scorers import Effect
from neuron_lens.explain.unit import ExplainedUnit, UnitWindows
from neuron_lens.harvest.ablation import ablate_where
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.records import Unit
from neuron_lens.windows import ABSENT, TextWindows

__all__ = ["UnitEffects"]

_LISTED = 10


class UnitEffects:
    """The effects of any unit of one source: call it with the unit.

    Args:
        source: where the units are read and changed.
        windows: the harvested windows of the source.
        explained: a unit's windows and threshold, by its index (`SourceWork.explained`).
        n_windows: how many windows it is steered in, and how many ablated in, at most.
        strength: what it is steered to, in multiples of its largest training activation.
    """

    def __init__(
        self,
        source: UnitSource,
        windows: TextWindows,
        explained: Callable[[int], ExplainedUnit],
        *,
        n_windows: int = 12,
        strength: float = 2.0,
    ) -> None:
        if n_windows < 1 or strength <= 0:
            raise RequestError(
                f"n_windows is at least 1 and strength above 0; got {n_windows} and {strength}"
            )
        self._source, self._windows, self._explained = source, windows, explained
        self._n_windows, self._strength = n_windows, strength

    def __call__(self, unit: Unit) -> list[Effect]:
        """Steered and ablated in turn; heads are only ablated, because what they write has no one direction.

        Empty for a unit that fires in none of its test windows. Raises RequestError for a unit of another source.
        """
        if unit != self._source.unit(unit.index):
            raise RequestError(f"{unit} at {unit.site} is no unit of {self._source.name}")
        explained = self._explained(unit.index)
        held = explained.held.part("test")
        largest = held.largest()
        falling = np.argsort(-largest, kind="stable")
        loud = [int(i) for i in falling if largest[i] > explained.firing_threshold]
        quiet = [int(i) for i in np.flatnonzero(held.random) if largest[i] <= explained.firing_threshold]
        ablated = self._effects("ablate", explained, held, loud)
        if unit.kind == "head" or not loud:
            return ablated
        steered = self._effects("steer", explained, held, quiet or loud)
        return [one for one in chain.from_iterable(zip_longest(steered, ablated)) if one is not None]

    def _effects(
        self, kind: Literal["steer", "ablate"], explained: ExplainedUnit, held: UnitWindows, order: list[int]
    ) -> list[Effect]:
        found: list[Effect] = []
        for index in order:
            place = self._place(kind, held, index)
            if place is not None:
                found.append(self._effect(kind, explained, held, index, place))
            if len(found) == self._n_windows:
                break
        return found

    def _place(self, kind: str, held: UnitWindows, index: int) -> int | None:
        """The token to change the unit at: where it is largest, or the last; one that has a next token."""
        ids = self._windows.columns["token"][held.rows[index], self._windows.context :]
        there = np.flatnonzero((ids[:-1] != ABSENT) & (ids[1:] != ABSENT))
        if not len(there):
            return None
        return int(there[-1] if kind == "steer" else there[np.argmax(held.activations[index][there])])

    def _effect(
        self,
        kind: Literal["steer", "ablate"],
        explained: ExplainedUnit,
        held: UnitWindows,
        index: int,
        place: int,
    ) -> Effect:
        mask = np.zeros((1, self._windows.length), dtype=bool)
        mask[0, place] = True
        row = int(held.rows[index])
        value = self._value(kind, explained)
        (changed,) = ablate_where(self._source, explained.unit.index, value, self._windows, [row], [mask])
        raised, lowered = self._moved(changed.log_probability_change)
        (window,) = held.records(np.array([index]))
        return Effect(
            kind=kind,
            text="".join((*window.preceding, *window.tokens[: place + 1])),
            raised=raised,
            lowered=lowered,
            divergence=float(changed.divergence[0]),
            of=window.identity,
        )

    def _value(self, kind: str, explained: ExplainedUnit) -> float:
        if kind == "steer":
            return self._strength * float(explained.held.part("train").largest().max(initial=0.0))
        return float(explained.held.moments[0]) if self._source.replaced_by == "mean" else 0.0

    def _moved(self, change: NDArray[np.float64]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        # Log-probabilities of all tokens shift together when one becomes likely; logits do not.
        change = change - change.mean()
        order = np.argsort(-change, kind="stable")
        texts = self._windows.token_texts
        raised, lowered = order[:_LISTED], order[::-1][:_LISTED]
        return (
            tuple(texts[token] for token in raised if change[token] > 0),
            tuple(texts[token] for token in lowered if change[token] < 0),
        )
