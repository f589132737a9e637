"""What the weights say, beside what was seen: the tokens a unit reads, and the next tokens it promotes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import JudgeExplainer, most_active
from neuron_lens.explain.rendering import discretised, largest_of, listed, quoted_texts, words_of
from neuron_lens.records import TokenWindow

__all__ = ["LogitWeights"]

_AROUND = 8  # tokens shown on each side of the strongest


@dataclass(frozen=True, kw_only=True)
class LogitWeights(JudgeExplainer):
    """Token lists from weights and activations; for units known better by what they say than by what they see.

    Raises RequestError when the evidence holds neither promoted nor suppressed nor read tokens.
    """

    name: ClassVar[str] = "logit_weights"

    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """Lists of tokens and short excerpts."""
        if not (evidence.promoted or evidence.suppressed or evidence.reads):
            raise RequestError(
                f"the evidence of {evidence.unit} holds no tokens from its weights (promoted, suppressed, reads); take "
                "another explainer"
            )
        shown = most_active(evidence, self.n_windows)
        largest = largest_of(shown)
        peaks = [_peak(window) for window in shown]
        strongest = [
            (window.tokens[place], discretised([window.activations[place]], largest)[0])
            for window, place in zip(shown, peaks, strict=True)
        ]
        following = [
            window.tokens[place + 1]
            for window, place in zip(shown, peaks, strict=True)
            if place + 1 < len(window.tokens)
        ]
        return {
            "reads": listed((one.token, one.value) for one in evidence.reads),
            "promoted": listed((one.token, one.value) for one in evidence.promoted),
            "suppressed": listed((one.token, one.value) for one in evidence.suppressed),
            "strongest": listed(strongest),
            "following": ", ".join(map(words_of, following)) or "none",
            "texts": quoted_texts(
                _excerpt(window, place) for window, place in zip(shown, peaks, strict=True)
            ),
        }


def _peak(window: TokenWindow) -> int:
    return window.activations.index(window.max_activation)


def _excerpt(window: TokenWindow, place: int) -> str:
    return "".join(window.tokens[max(place - _AROUND, 0) : place + _AROUND + 1])
