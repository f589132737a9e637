"""Figures and names in words, the same on every page."""

from __future__ import annotations

import math
import re

from neuron_lens.explain.result import Score
from neuron_lens.report.html import Html, element, fragment

__all__ = [
    "control_words",
    "decimals",
    "figure",
    "interval_text",
    "number",
    "percent",
    "score_interval",
    "score_words",
    "sentence_html",
    "signed",
]

# A score's name in words, and the value that means nothing was learned.
SCORE_WORDS: dict[str, tuple[str, float]] = {
    "correlation": ("Correlation", 0.0),
    "correlation_random": ("Correlation, random windows", 0.0),
    "detection_accuracy": ("Detection, balanced accuracy", 0.5),
    "detection_auc": ("Detection, AUC", 0.5),
    "balanced_accuracy": ("Balanced accuracy", 0.5),
    "auc": ("AUC", 0.5),
    "ev_correlation_score": ("Correlation of the simulation", 0.0),
    "rsquared_score": ("R² (against zero)", 0.0),
    "absolute_dev_explained_score": ("Absolute deviation explained", 0.0),
    "ablation_score": ("Effect kept by the simulation", 0.0),
    "moved_by_simulation": ("Predictions moved by the simulation (nats)", 0.0),
    "moved_by_mean": ("Predictions moved by the mean (nats)", 0.0),
    "precision_at_density": ("Precision at the unit's density", 0.0),
}

CONTROL_WORDS = {
    "another_unit": "another unit's explanation",
    "null": "an explanation that says nothing",
    "shuffled": "shuffled",
}


def score_words(name: str) -> tuple[str, float]:
    """A score's name in words and the value that means nothing was learned (0 for a name not listed)."""
    return SCORE_WORDS.get(name, (name.replace("_", " ").capitalize(), 0.0))


def control_words(name: str) -> str:
    """A control's name in words."""
    return CONTROL_WORDS.get(name, name.replace("_", " "))


def sentence_html(sentence: str) -> Html:
    """The sentence as text, what stands in backquotes as code."""
    parts = re.split(r"`([^`]+)`", sentence)
    return fragment(element("code", part) if place % 2 else part for place, part in enumerate(parts))


def number(value: float | None) -> str:
    """A figure: three significant digits, a true minus sign, an en dash where it is missing."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown = f"{value:.3g}"
    if "e" in shown and 1e3 <= abs(value) < 1e6:
        shown = f"{value:.0f}"
    return shown.replace("-", "−")


def signed(value: float | None) -> str:
    """A change, its sign always shown."""
    return f"+{number(value)}" if value is not None and value > 0 else number(value)


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{number(100 * share)} %"


def decimals(value: float | None, digits: int = 2) -> str:
    """A score: a fixed number of decimals, a true minus sign, an en dash where it is missing."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.{digits}f}".replace("-", "−")


def figure(value: float | None, digits: int = 2) -> str:
    """As `decimals`, or, where these would show nothing of it, three significant digits."""
    shown = decimals(value, digits)
    return number(value) if value and not shown.strip("−0.") else shown


def interval_text(value: float | None, low: float | None, high: float | None, digits: int = 2) -> str:
    """`0.83 [0.78, 0.87]`; an en dash where nothing was measured, no brackets where there is no interval."""
    if value is None or low is None or high is None:
        return decimals(value, digits)
    return f"{decimals(value, digits)} [{decimals(low, digits)}, {decimals(high, digits)}]"


def score_interval(score: Score) -> str:
    """`[0.78, 0.87]`, or that there is none."""
    if score.value is None:
        return "not computed"
    if score.low is None or score.high is None:
        return "no interval"
    said = decimals if decimals(score.high).strip("−0.") or decimals(score.low).strip("−0.") else figure
    return f"[{said(score.low)}, {said(score.high)}]"
