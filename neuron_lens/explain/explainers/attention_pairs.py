"""Attention heads: which token attends to which, where the head writes most.

The form, pairs of tokens by write norm, is that of OpenAI's transformer-debugger (2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import JudgeExplainer, most_active
from neuron_lens.explain.rendering import quoted_texts
from neuron_lens.records import TokenWindow

__all__ = ["FROM", "TO", "AttentionPairs", "Pair", "pairs_of", "shown_pair"]

# The attending token and the one attended to, as they are marked in a text.
FROM = ("[[", "]]")
TO = ("**", "**")


class Pair(NamedTuple):
    """A token that attends (`place`) and the token it attends to (`source`), with the write norm."""

    window: TokenWindow
    place: int
    source: int
    norm: float


@dataclass(frozen=True, kw_only=True)
class AttentionPairs(JudgeExplainer):
    """Shows the `n_windows` strongest pairs, at most two of one window.

    Raises RequestError when the windows say no sources: the unit is no attention head, or was not harvested as one.
    """

    name: ClassVar[str] = "attention_pairs"

    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """The marked texts."""
        pairs = [
            pair
            for window in most_active(evidence, 4 * self.n_windows)
            for pair in pairs_of(window)[:2]
            if pair.norm > evidence.firing_threshold
        ]
        if not pairs:
            raise RequestError(
                f"the training windows of {evidence.unit} hold no pair of tokens (TokenWindow.sources): "
                "attention_pairs explains attention heads that were harvested by token pair"
            )
        pairs.sort(key=lambda pair: -pair.norm)
        return {"texts": quoted_texts(shown_pair(pair) for pair in pairs[: self.n_windows])}


def pairs_of(window: TokenWindow) -> list[Pair]:
    """The pairs inside the window, largest write norm first."""
    found = [
        Pair(window, place, source, norm)
        for place, (source, norm) in enumerate(zip(window.sources or (), window.activations, strict=False))
        if source >= 0
    ]
    return sorted(found, key=lambda pair: -pair.norm)


def shown_pair(pair: Pair) -> str:
    """The text with the attending token in [[ ]] and the attended one in ** **."""
    tokens = list(pair.window.tokens)
    tokens[pair.source] = f"{TO[0]}{tokens[pair.source]}{TO[1]}"
    tokens[pair.place] = f"{FROM[0]}{tokens[pair.place]}{FROM[1]}"
    return "".join(tokens)
