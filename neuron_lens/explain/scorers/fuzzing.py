"""Fuzzing: are these the tokens it fires at? (EleutherAI's Delphi, Paulo et al. 2024.)

Half the wrong markings are in texts the unit does fire in, at tokens it is silent at; so that knowing the text's
topic is not enough. Wrong markings are as many tokens as right ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neuron_lens.explain.evidence import Evidence, PartName
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import marked, marks_for, quoted_texts
from neuron_lens.explain.scorers.batches import ask_in_batches
from neuron_lens.explain.scorers.detection import BinaryScorer
from neuron_lens.explain.scorers.examples import Example, draw_firing, draw_silent
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.llm import Backend
from neuron_lens.records import TokenWindow

__all__ = ["Fuzzing", "Marking", "draw_markings"]


@dataclass(frozen=True)
class Marking:
    """Some tokens of a window, marked rightly or wrongly."""

    example: Example
    places: frozenset[int]
    right: bool

    @property
    def window(self) -> TokenWindow:
        """The window."""
        return self.example.window

    @property
    def judged(self) -> Example:
        """What is to be told. A wrong marking in a firing window says nothing of silent windows: it is not natural."""
        if self.right == self.example.fires:
            return self.example
        return Example(self.window, False, "near_miss")

    def text(self, marks: tuple[str, str]) -> str:
        """The window's text with the tokens between marks."""
        return marked(self.window, self.places.__contains__, marks)


@dataclass(frozen=True, kw_only=True)
class Fuzzing(BinaryScorer):
    """Marked tokens, right or wrong; `n_firing` right and `n_silent` wrong markings; see `BinaryScorer`.

    `precision_at_density` takes the share of tokens the unit fires at, and wrong markings in silent windows of the
    sample.
    """

    name: ClassVar[str] = "fuzzing"

    def density(self, evidence: Evidence) -> float | None:
        """The share of tokens the unit fires at."""
        return None if evidence.density is None else evidence.density.tokens

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        markings = draw_markings(evidence, self.part, right=self.n_firing, wrong=self.n_silent, seed=seed)
        begin, end = marks = marks_for(marking.window for marking in markings)
        asked = ask_in_batches(
            prompt_named(self.name),
            [one.text(marks) for one in markings],
            self.batch,
            lambda texts: {
                "explanation": explanation, "texts": quoted_texts(texts), "begin": begin, "end": end,
            },
        )  # fmt: skip
        return asked.then(lambda answers: judgements_of([one.judged for one in markings], answers))


def draw_markings(evidence: Evidence, part: PartName, *, right: int, wrong: int, seed: int) -> list[Marking]:
    """Up to `right` right and `wrong` wrong markings, mixed; half of the wrong ones in firing windows."""
    rng = np.random.default_rng([seed, 4])
    threshold = evidence.firing_threshold
    firing = draw_firing(evidence, part, right + (wrong + 1) // 2, seed)
    # With few firing windows, two in three are marked rightly.
    n_right = min(right, max(1, round(2 * len(firing) / 3)))
    if len(firing) >= right + (wrong + 1) // 2:
        n_right = right
    rightly = [Marking(one, frozenset(_places(one, threshold, fires=True)), True) for one in firing[:n_right]]
    wrongly = []
    for one in firing[n_right:]:
        fired, silent = _places(one, threshold, fires=True), _places(one, threshold, fires=False)
        if silent:
            chosen = rng.choice(silent, min(len(fired), len(silent)), replace=False)
            wrongly.append(Marking(one, frozenset(map(int, chosen)), False))
    usual = [len(one.places) for one in rightly] or [1]
    for one in draw_silent(evidence, part, wrong - len(wrongly), seed):
        silent = _places(one, threshold, fires=False)
        count = min(int(rng.choice(usual)), len(silent))
        wrongly.append(Marking(one, frozenset(map(int, rng.choice(silent, count, replace=False))), False))
    markings = rightly + wrongly
    return [markings[place] for place in rng.permutation(len(markings))]


def _places(example: Example, threshold: float, *, fires: bool) -> list[int]:
    return [place for place, value in enumerate(example.window.activations) if (value > threshold) == fires]
