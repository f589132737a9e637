"""Which windows of a part a scorer asks about: some the unit fires in, some it does not, in mixed order.

Firing windows are spread evenly over the strata, so that a score speaks of weak firing as well as of the top; silent
ones are half near misses, half from the uniform sample, as far as there are any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from neuron_lens.explain.evidence import Evidence, Part, PartName
from neuron_lens.records import TokenWindow, WindowId

__all__ = ["Example", "Source", "draw_examples", "draw_firing", "draw_silent"]

Source = Literal["top", "stratum", "random", "near_miss"]


@dataclass(frozen=True)
class Example:
    """One window to ask about.

    `source`: why it was kept ("stratum" and "random" stand for the unit's natural behaviour, "top" and "near_miss" do
    not). `stratum`: the index of its stratum, None outside all.
    """

    window: TokenWindow
    fires: bool
    source: Source
    stratum: int | None = None

    @property
    def natural(self) -> bool:
        """Whether it is as the unit's firing (or silent) windows are in the corpus."""
        return self.source in ("stratum", "random")


def draw_examples(
    evidence: Evidence, part: PartName, *, firing: int, silent: int, seed: int
) -> tuple[Example, ...]:
    """Up to `firing` windows the unit fires in and up to `silent` in which it does not, mixed; fewer if fewer there are."""
    found = [
        *draw_firing(evidence, part, firing, seed),
        *draw_silent(evidence, part, silent, seed),
    ]
    order = np.random.default_rng([seed, 2]).permutation(len(found))
    return tuple(found[place] for place in order)


def draw_firing(evidence: Evidence, part: PartName, count: int, seed: int) -> tuple[Example, ...]:
    """Firing windows, one stratum after the other in turn, then others of the sample, then the top."""
    rng = np.random.default_rng([seed, 0])
    windows = evidence.part(part)
    strata: list[list[Example]] = [
        [
            Example(window, True, "stratum", stratum.index)
            for window in _shuffled(stratum.windows, rng)
            if evidence.fires(window)
        ]
        for stratum in windows.strata
    ]
    turns = [
        one for place in range(max(map(len, strata), default=0)) for s in strata for one in s[place:][:1]
    ]
    others = [
        Example(window, True, source, windows.stratum_of.get(window.identity))
        for source, listed in _others(windows)
        for window in listed
        if evidence.fires(window)
    ]
    return tuple(_first(turns + others, count))


def draw_silent(evidence: Evidence, part: PartName, count: int, seed: int) -> tuple[Example, ...]:
    """Silent windows: near misses and the sample in turn, then what is left of the one that has more."""
    rng = np.random.default_rng([seed, 1])
    windows = evidence.part(part)
    near = [
        Example(w, False, "near_miss") for w in _shuffled(windows.near_misses, rng) if not evidence.fires(w)
    ]
    random = [Example(w, False, "random") for w in _shuffled(windows.random, rng) if not evidence.fires(w)]
    turns = [
        one for place in range(max(len(near), len(random))) for s in (random, near) for one in s[place:][:1]
    ]
    return tuple(_first(turns, count))


def _others(part: Part) -> tuple[tuple[Source, Sequence[TokenWindow]], ...]:
    return (("random", part.random), ("top", part.top))


def _first(examples: Sequence[Example], count: int) -> list[Example]:
    """The first `count`, each window once."""
    first: dict[WindowId, Example] = {}
    for example in examples:
        first.setdefault(example.window.identity, example)
    return list(first.values())[:count]


def _shuffled(windows: Sequence[TokenWindow], rng: np.random.Generator) -> list[TokenWindow]:
    return [windows[place] for place in rng.permutation(len(windows))]
