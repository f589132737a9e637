"""What an explainer or a scorer sees of one unit, of whatever kind: statistics, and windows in three parts.

Explainers read `train`, choices are made on `validation`, and scores are reported on `test`. No token is in
two parts: an `Evidence` in which one is cannot be made. Plain records, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from neuron_lens.errors import RequestError
from neuron_lens.explain.result import TokenValue
from neuron_lens.explain.unit import ExplainedUnit
from neuron_lens.records import QuantileStratum, Record, TokenWindow, Unit, UnitStatistics, WindowId
from neuron_lens.windows import SPLITS

__all__ = ["PARTS", "Density", "Evidence", "Part", "PartName", "strata_of"]

PartName = Literal["train", "validation", "test"]
PARTS: tuple[PartName, ...] = ("train", "validation", "test")

_N_STRATA = 5


class Part(Record):
    """One part's windows. A window may be in several of the lists, with the same activations in each.

    Attributes:
        top: the windows in which the unit is most active, most active first.
        random: a uniform sample of the corpus: the unit at its natural density.
        near_misses: hard negatives, in which the unit does not fire although something like it does.
        strata: windows by the size of their largest activation, lowest stratum first.
    """

    top: tuple[TokenWindow, ...] = ()
    random: tuple[TokenWindow, ...] = ()
    near_misses: tuple[TokenWindow, ...] = ()
    strata: tuple[QuantileStratum, ...] = ()

    @cached_property
    def windows(self) -> tuple[TokenWindow, ...]:
        """Every window once: the top, the strata from high to low, the near misses, then the sample."""
        in_strata = (window for stratum in reversed(self.strata) for window in stratum.windows)
        listed = (*self.top, *in_strata, *self.near_misses, *self.random)
        return tuple({window.identity: window for window in listed}.values())

    @cached_property
    def stratum_of(self) -> dict[WindowId, int]:
        """The index of the stratum of each window that is in one."""
        return {window.identity: stratum.index for stratum in self.strata for window in stratum.windows}

    def firing(self, threshold: float) -> tuple[TokenWindow, ...]:
        """The windows with a token above the threshold."""
        return tuple(window for window in self.windows if window.max_activation > threshold)

    def silent(self, threshold: float) -> tuple[TokenWindow, ...]:
        """The windows without one."""
        return tuple(window for window in self.windows if window.max_activation <= threshold)


class Density(Record):
    """How often the unit fires: the share of windows, and of tokens.

    `windows` is counted in the uniform sample of all parts (`n_windows`). Where none of these fires (`firing_windows`
    is 0), it is derived: tokens it fires at, by how many of them a window holds in which it fires at all.
    `tokens` is that of the whole corpus.
    """

    windows: float = Field(ge=0, le=1)
    tokens: float = Field(ge=0, le=1)
    n_windows: NonNegativeInt
    firing_windows: NonNegativeInt


class Evidence(Record):
    """What is known of one unit. See the module.

    Raises RequestError when parts share a token, one window is given with different activations, or the unit fires in
    a near miss.

    Attributes:
        statistics: over every token of the corpus; its `firing_threshold` is the unit's.
        promoted, suppressed: next tokens the unit's output weights raise and lower most; empty where unknown.
        reads: input tokens whose embedding drives the unit most, by its input weights; empty where unknown.
    """

    unit: Unit
    statistics: UnitStatistics
    train: Part
    validation: Part
    test: Part
    promoted: tuple[TokenValue, ...] = ()
    suppressed: tuple[TokenValue, ...] = ()
    reads: tuple[TokenValue, ...] = ()

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            raise RequestError(
                f"this is no evidence of a unit: {place}{': ' * bool(place)}{first['msg']}"
            ) from None

    @model_validator(mode="after")
    def _parts_are_apart(self) -> Self:
        spans: dict[int, list[tuple[int, int, str]]] = {}
        for name, part in self.parts():
            seen: dict[WindowId, TokenWindow] = {}
            for window in _listed(part):
                known = seen.setdefault(window.identity, window)
                if known is not window and known != window:
                    raise ValueError(
                        f"the window {window.identity} of {name} is given twice, and differently"
                    )
            for window in seen.values():
                span = (window.start, window.start + len(window.tokens), name)
                spans.setdefault(window.document_index, []).append(span)
        for document, found in spans.items():
            _refuse_shared_tokens(document, sorted(found))
        return self

    @model_validator(mode="after")
    def _near_misses_are_silent(self) -> Self:
        for name, part in self.parts():
            for window in part.near_misses:
                if self.fires(window):
                    raise ValueError(
                        f"the window {window.identity} is no near miss of {name}: the unit fires there (at "
                        f"{window.max_activation}, above its threshold of {self.firing_threshold})"
                    )
        return self

    @classmethod
    def of(
        cls,
        explained: ExplainedUnit,
        *,
        promoted: tuple[TokenValue, ...] = (),
        suppressed: tuple[TokenValue, ...] = (),
        reads: tuple[TokenValue, ...] = (),
    ) -> Evidence:
        """The evidence in a unit's harvested windows.

        Strata are those of the windows it fires in: in the uniform sample, and, of a unit silent almost everywhere, in
        the sample of its firing windows.
        """
        parts = {name: _part(explained, name) for name in SPLITS}
        return cls(
            unit=explained.unit,
            statistics=explained.statistics(),
            promoted=promoted,
            suppressed=suppressed,
            reads=reads,
            **parts,
        )

    def replaced(self, **fields: Any) -> Evidence:
        """The same evidence with some fields replaced, checked as new evidence is."""
        return Evidence(**{name: getattr(self, name) for name in type(self).model_fields} | fields)

    @property
    def firing_threshold(self) -> float:
        """The unit fires at a token where its activation is above this."""
        return self.statistics.firing_threshold

    def part(self, name: PartName) -> Part:
        """The part of that name."""
        found: Part = getattr(self, name)
        return found

    def parts(self) -> Iterator[tuple[PartName, Part]]:
        """The parts with their names, in order."""
        for name in PARTS:
            yield name, self.part(name)

    def fires(self, window: TokenWindow) -> bool:
        """Whether the unit fires in the window."""
        return window.max_activation > self.firing_threshold

    @cached_property
    def density(self) -> Density | None:
        """How often the unit fires in the uniform sample; None without one."""
        sample = [window for _, part in self.parts() for window in part.random]
        if not sample:
            return None
        firing = sum(self.fires(window) for window in sample)
        return Density(
            windows=firing / len(sample) if firing else self._rare_windows(sample),
            tokens=self.statistics.density,
            n_windows=len(sample),
            firing_windows=firing,
        )

    def _rare_windows(self, sample: list[TokenWindow]) -> float:
        loud = [w for _, part in self.parts() for w in part.windows if self.fires(w)]
        fired = sum(value > self.firing_threshold for window in loud for value in window.activations)
        length = sum(len(window.tokens) for window in sample) / len(sample)
        return min(self.statistics.density * length * len(loud) / fired, 1.0) if fired else 0.0


def strata_of(
    windows: tuple[TokenWindow, ...], threshold: float, count: int = _N_STRATA
) -> tuple[QuantileStratum, ...]:
    """The windows with a token above `threshold`, by their largest activation, in `count` strata of equal size.

    Fewer strata when there are fewer windows than `count`; the last one's `high` is the largest activation.
    """
    firing = sorted((w for w in windows if w.max_activation > threshold), key=lambda w: w.max_activation)
    bounds = np.linspace(0, len(firing), min(count, len(firing)) + 1).astype(int)
    return tuple(
        QuantileStratum(
            index=index,
            low=firing[begin].max_activation,
            high=firing[min(end, len(firing) - 1)].max_activation,
            windows=tuple(firing[begin:end]),
        )
        for index, (begin, end) in enumerate(pairwise(bounds))
    )


def _part(explained: ExplainedUnit, name: str) -> Part:
    held = explained.held.part(name)
    records = dict(zip(held.rows.tolist(), held.records(np.arange(len(held.rows))), strict=True))

    def some(chosen: NDArray[np.bool_]) -> tuple[TokenWindow, ...]:
        return tuple(records[row] for row in held.rows[chosen].tolist())

    top = some(held.top)
    return Part(
        top=tuple(sorted(top, key=lambda window: -window.max_activation)),
        random=some(held.random),
        near_misses=tuple(
            # They are silent by the threshold of the harvest, from which this one differs by rounding.
            window
            for window in explained.held.near_misses(name)
            if window.max_activation <= explained.firing_threshold
        ),
        strata=strata_of(some(held.random | held.fired), explained.firing_threshold),
    )


def _listed(part: Part) -> Iterator[TokenWindow]:
    yield from part.top
    yield from part.random
    yield from part.near_misses
    for stratum in part.strata:
        yield from stratum.windows


def _refuse_shared_tokens(document: int, spans: list[tuple[int, int, str]]) -> None:
    """Raise ValueError when two spans (begin, end, part) of one document, sorted, overlap in different parts."""
    reach: dict[str, int] = {}  # how far each part's windows reach so far
    for begin, end, name in spans:
        for other, reached in reach.items():
            if other != name and begin < reached:
                raise ValueError(
                    f"{other} and {name} both hold token {begin} of document {document}: a token may be in one "
                    "part only, or what is scored has been seen before"
                )
        reach[name] = max(reach.get(name, 0), end)
