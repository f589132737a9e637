"""What changing one unit does to the model's predictions: the records causal scoring is judged by.

Steered, a unit is made so strong that the prediction moves by a given KL divergence (see `steering`): neurons, latents
and directions at the end of windows they are silent in (or quietest), heads where they write most. Ablated, it is
replaced, in windows it fires in and where it is largest, by what stands for it when it is taken out (its mean, or
zero).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import PartName
from neuron_lens.explain.scorers import Continuation, Effect
from neuron_lens.explain.unit import ExplainedUnit, UnitWindows
from neuron_lens.harvest.ablation import WindowRun, divergences, simulated_divergences, window_inputs
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.harvest.steering import Range, Steered, continued, steered_to, steering
from neuron_lens.records import TokenWindow, Unit, WindowId
from neuron_lens.windows import ABSENT, TextWindows

__all__ = ["UnitEffects"]

_LISTED = 10


@dataclass(frozen=True, eq=False)
class _Places:
    """Windows of one part (by their place in `held`), and one token of each, that the unit is changed at."""

    held: UnitWindows
    order: list[int]
    at: NDArray[np.int64]  # [window]

    @property
    def rows(self) -> list[int]:
        """Rows of the windows of `held`: those of a group of units, not of the whole source."""
        return [int(self.held.rows[index]) for index in self.order]

    @property
    def records(self) -> tuple[TokenWindow, ...]:
        """The windows."""
        return self.held.records(np.array(self.order, dtype=np.int64))

    def mask(self, length: int) -> NDArray[np.bool_]:
        """True at the tokens `[window, length]`."""
        return np.arange(length) == self.at[:, None]

    def text(self, number: int, window: TokenWindow) -> str:
        """The text of a window up to the token, with what is shown of its context."""
        return "".join((*window.preceding, *window.tokens[: int(self.at[number]) + 1]))


class UnitEffects:
    """The effects of any unit of one source: call it with the unit, or ask for `continuations`.

    Args:
        source: where the units are read and changed.
        windows: the harvested windows of the source.
        explained: a unit's windows and threshold, by its index (`SourceWork.explained`).
        n_windows: how many windows it is steered in, and how many ablated in, at most.
        divergence: how far steering moves the next-token prediction in the mean, KL(intact || steered), nats.
        n_tokens: the length of a continuation.
        seed: of the draws of continuations.
    """

    def __init__(
        self,
        source: UnitSource,
        windows: TextWindows,
        explained: Callable[[int], ExplainedUnit],
        *,
        n_windows: int = 12,
        divergence: float = 0.5,
        n_tokens: int = 16,
        seed: int = 0,
    ) -> None:
        if min(n_windows, n_tokens) < 1 or not divergence > 0:
            raise RequestError(
                f"n_windows and n_tokens are at least 1, and divergence is above 0; got {n_windows}, {n_tokens} and "
                f"{divergence}"
            )
        self._source, self._windows, self._explained = source, windows, explained
        self._n_windows, self._divergence = n_windows, divergence
        self._n_tokens, self._seed = n_tokens, seed

    def __call__(self, unit: Unit, part: PartName = "test") -> list[Effect]:
        """Steered and ablated in turn, in windows of a part.

        Empty for a unit that fires in none of them. Raises RequestError for a unit of another source.
        """
        explained = self._own(unit)
        steered, ablated = self._steered_at(explained, part), self._ablated_at(explained, part)
        both = (self._steered(explained, steered), self._ablated(explained, ablated))
        return [one for one in chain.from_iterable(zip_longest(*both)) if one is not None]

    def continuations(
        self, unit: Unit, part: PartName = "test", count: int | None = None
    ) -> list[Continuation]:
        """What the model writes after windows of a part (`count` of them, at most), by itself and with the unit steered
        at the last token and at every token it writes.

        Empty for a unit that fires in none of them. Raises RequestError for a unit of another source.
        """
        explained = self._own(unit)
        places = self._steered_at(explained, part, at_most=count, longer=True)
        if not places.order:
            return []
        _, found = self._search(explained, places)
        inputs, begins = window_inputs(places.held.windows, places.rows)
        prompts = [
            ids[: begin + place + 1] for ids, begin, place in zip(inputs, begins, places.at, strict=True)
        ]
        everywhere = torch.ones(1, 1, dtype=torch.bool, device=found.log_probabilities.device)
        hooks = steering(self._source, unit.index, found.strength, everywhere)
        intact, steered = continued(
            self._source, prompts, [None, hooks], n_tokens=self._n_tokens, seed=self._seed
        )
        return [
            Continuation(
                text=places.text(number, window),
                intact=self._text(intact[number]),
                steered=self._text(steered[number]),
                strength=found.strength,
                divergence=_finite(found.divergence[number]),
                of=window.identity,
            )
            for number, window in enumerate(places.records)
        ]

    def simulated(
        self, unit: Unit, windows: Sequence[WindowId], simulated: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Divergences of the predictions with the unit replaced by simulated activations, and by its mean `[window, 2]`.

        See `simulated_divergences`. `simulated` `[window, length]` is NaN where there is no prediction. Raises
        RequestError for heads, whose activation is the norm of a vector, and for windows that were not harvested.
        """
        explained = self._own(unit)
        if unit.kind == "head":
            raise RequestError(
                f"{unit} is simulated by the norm of what it writes, which says nothing of the direction: it cannot be "
                "replaced by its simulation"
            )
        document, start = zip(*windows, strict=True) if windows else ((), ())
        values = np.full((len(windows), self._windows.length), np.nan)
        values[:, : simulated.shape[1]] = simulated
        given = np.isfinite(values)
        return simulated_divergences(
            self._source,
            unit.index,
            self._windows,
            self._windows.rows_of(document, start).tolist(),
            np.where(given, values, 0.0),
            given,
            float(explained.held.moments[0]),
        )

    def _own(self, unit: Unit) -> ExplainedUnit:
        if unit != self._source.unit(unit.index):
            raise RequestError(f"{unit} at {unit.site} is no unit of {self._source.name}")
        return self._explained(unit.index)

    def _loud(self, explained: ExplainedUnit, held: UnitWindows) -> list[int]:
        """Windows it fires in, loudest first."""
        largest = held.largest()
        falling = np.argsort(-largest, kind="stable")
        return [int(i) for i in falling if largest[i] > explained.firing_threshold]

    def _steered_at(
        self, explained: ExplainedUnit, part: PartName, *, at_most: int | None = None, longer: bool = False
    ) -> _Places:
        """Heads where they write most; other units at the end of windows they are silent in, then, of a unit that is
        hardly ever silent, where it is lowest."""
        held = explained.held.part(part)
        loud, largest = self._loud(explained, held), held.largest()
        if explained.unit.kind == "head":
            return self._places(held, loud, np.argmax, at_most, longer=longer)
        if not loud:
            return self._places(held, [], np.argmin)
        silent = {int(i) for i in np.flatnonzero(held.random) if largest[i] <= explained.firing_threshold}
        last = self._places(held, sorted(silent), lambda values: len(values) - 1, at_most, longer=longer)
        wanted = min(self._n_windows, at_most or self._n_windows) - len(last.order)
        if not wanted:
            return last
        lowest = self._places(held, loud[::-1], np.argmin, wanted, longer=longer)
        return _Places(held, last.order + lowest.order, np.concatenate([last.at, lowest.at]))

    def _ablated_at(self, explained: ExplainedUnit, part: PartName) -> _Places:
        """From the loudest window to the quietest it fires in: what holds of strong firing may not of weak."""
        held = explained.held.part(part)
        loud = self._loud(explained, held)
        spread = np.linspace(0, len(loud) - 1, min(len(loud), self._n_windows)).astype(int)
        return self._places(held, [loud[i] for i in spread], np.argmax)

    def _places(
        self,
        held: UnitWindows,
        candidates: list[int],
        chosen: Callable[[NDArray[np.float32]], np.integer[Any] | int],
        at_most: int | None = None,
        *,
        longer: bool = False,
    ) -> _Places:
        """The token to change the unit at in each window, `chosen` by the activations of those that have a next token,
        and (`longer`) one before them."""
        order, at = [], []
        for index in candidates:
            ids = held.windows.columns["token"][held.rows[index], held.windows.context :]
            there = np.flatnonzero((ids[:-1] != ABSENT) & (ids[1:] != ABSENT))
            there = there[there > 0] if longer else there
            if len(there):
                order.append(index)
                at.append(int(there[chosen(held.activations[index][there])]))
            if len(order) == min(self._n_windows, at_most or self._n_windows):
                break
        return _Places(held, order, np.array(at, dtype=np.int64))

    def _run(self, places: _Places) -> WindowRun:
        source = self._source
        return WindowRun(source.model, source.layer, places.held.windows, places.rows, places.at[:, None])

    def _search(self, explained: ExplainedUnit, places: _Places) -> tuple[WindowRun, Steered]:
        run = self._run(places)
        where = run.spread(places.mask(self._windows.length))
        largest = float(explained.held.part("train").largest().max(initial=0.0))
        span = Range(float(explained.held.moments[0]), largest)
        return run, steered_to(self._source, explained.unit.index, run, where, span, self._divergence)

    def _steered(self, explained: ExplainedUnit, places: _Places) -> list[Effect]:
        if not places.order:
            return []
        run, found = self._search(explained, places)
        change = (found.log_probabilities - run.intact[:, 0]).double().cpu().numpy()
        return self._effects("steer", places, change, found.divergence, found.strength)

    def _ablated(self, explained: ExplainedUnit, places: _Places) -> list[Effect]:
        if not places.order:
            return []
        run = self._run(places)
        value = float(explained.held.moments[0]) if self._source.replaced_by == "mean" else 0.0
        where = run.spread(places.mask(self._windows.length))
        changed = run.changed(self._source.replacing(explained.unit.index, value, where))[:, 0]
        moved = divergences(run.intact[:, 0], changed).double().cpu().numpy()
        change = (changed - run.intact[:, 0]).double().cpu().numpy()
        return self._effects("ablate", places, change, moved, None)

    def _effects(
        self,
        kind: Literal["steer", "ablate"],
        places: _Places,
        change: NDArray[np.float64],
        moved: NDArray[np.float64],
        strength: float | None,
    ) -> list[Effect]:
        found = []
        for number, window in enumerate(places.records):
            raised, lowered = self._moved(change[number])
            found.append(
                Effect(
                    kind=kind,
                    text=places.text(number, window),
                    raised=raised,
                    lowered=lowered,
                    divergence=_finite(moved[number]),
                    strength=strength,
                    of=window.identity,
                )
            )
        return found

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

    def _text(self, ids: list[int]) -> str:
        return "".join(self._windows.token_texts[token] for token in ids)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
