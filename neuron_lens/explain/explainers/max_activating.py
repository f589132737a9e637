"""Windows with the tokens the unit fires at between marks, and a list of those tokens with their strengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import JudgeExplainer, most_active
from neuron_lens.explain.rendering import discretised, largest_of, listed, marked, marks_for, quoted_texts
from neuron_lens.records import TokenWindow

__all__ = ["MaxActivating", "highlighted"]


@dataclass(frozen=True, kw_only=True)
class MaxActivating(JudgeExplainer):
    """The form of EleutherAI's Delphi (2024): highlighted spans, then each token's activation."""

    name: ClassVar[str] = "max_activating"

    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """The texts and their marks."""
        shown = most_active(evidence, self.n_windows)
        begin, end = marks = marks_for(shown)
        return {
            "begin": begin,
            "end": end,
            "texts": highlighted(shown, evidence.firing_threshold, largest_of(shown), marks),
        }


def highlighted(
    windows: Sequence[TokenWindow], threshold: float, largest: float, marks: tuple[str, str]
) -> str:
    """Numbered texts with the tokens above the threshold marked, each followed by their activations."""
    lines = quoted_texts(
        marked(window, lambda place, window=window: window.activations[place] > threshold, marks)  # type: ignore[misc]
        for window in windows
    ).split("\n")
    for place, window in enumerate(windows):
        levels = discretised(window.activations, largest)
        fired = [
            (token, level)
            for token, level, value in zip(window.tokens, levels, window.activations, strict=True)
            if value > threshold
        ]
        lines[place] += f"\n   activations: {listed(fired)}"
    return "\n".join(lines)
