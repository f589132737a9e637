"""How windows are shown to a judge: tables of tokens and activations, marked texts, numbered lists.

Activations are shown as whole numbers from 0 to 10, with OpenAI's formula (automated-interpretability, 2023).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence

from neuron_lens.records import TokenWindow

__all__ = [
    "LEVELS",
    "activation_table",
    "discretised",
    "largest_of",
    "listed",
    "marked",
    "marks_for",
    "quoted",
    "quoted_texts",
    "text_of",
    "visible",
    "words_of",
]

LEVELS = 10  # the largest activation shown is this
_SPARSE = 0.2  # below this share of tokens above zero, they are listed once more by themselves
_MARKS = (("<<", ">>"), ("[[", "]]"), ("{{", "}}"), ("⟦", "⟧"), ("❮", "❯"))


def largest_of(windows: Iterable[TokenWindow]) -> float:
    """The largest positive activation of some windows; 0 when there is none."""
    return max((max(window.max_activation, 0.0) for window in windows), default=0.0)


def discretised(activations: Sequence[float], largest: float) -> list[int]:
    """min(10, floor(10 relu(a) / largest)), and 0 where `largest` is not positive."""
    if largest <= 0:
        return [0] * len(activations)
    return [min(LEVELS, math.floor(LEVELS * max(value, 0.0) / largest)) for value in activations]


def visible(token: str) -> str:
    """A token on one line: line breaks, tabs and backslashes as escapes."""
    escaped = token.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    return "".join(c if c not in "\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029" else repr(c)[1:-1] for c in escaped)


def activation_table(windows: Sequence[TokenWindow], largest: float) -> str:
    """Every window as lines `token<tab>activation` between <start> and <end>; where few tokens are above zero,
    those follow by themselves."""
    levels = [discretised(window.activations, largest) for window in windows]
    parts = ["Activations:", *(_table(w, one, zeros=True) for w, one in zip(windows, levels, strict=True))]
    shown = [level for one in levels for level in one]
    if shown and sum(level > 0 for level in shown) < _SPARSE * len(shown):
        parts.append("Same activations, but with all zeros filtered out:")
        parts += [_table(w, one, zeros=False) for w, one in zip(windows, levels, strict=True)]
    return "\n".join(parts)


def _table(window: TokenWindow, levels: list[int], zeros: bool) -> str:
    lines = [
        f"{visible(token)}\t{level}"
        for token, level in zip(window.tokens, levels, strict=True)
        if zeros or level > 0
    ]
    return "\n".join(["<start>", *lines, "<end>"])


def text_of(window: TokenWindow) -> str:
    """The window's text."""
    return "".join(window.tokens)


def quoted(text: str) -> str:
    """A text as a JSON string: where it begins and ends cannot be mistaken."""
    return json.dumps(text, ensure_ascii=False)


def quoted_texts(texts: Iterable[str]) -> str:
    """Texts as numbered JSON strings, one a line."""
    return "\n".join(f"{number}: {quoted(text)}" for number, text in enumerate(texts, 1))


def marks_for(windows: Iterable[TokenWindow]) -> tuple[str, str]:
    """A pair of marks that occurs in none of the texts (the last pair where all do)."""
    text = "".join(text_of(window) for window in windows)
    return next((pair for pair in _MARKS if not any(mark in text for mark in pair)), _MARKS[-1])


def marked(window: TokenWindow, chosen: Callable[[int], bool], marks: tuple[str, str]) -> str:
    """The text with its chosen tokens (by index) between marks, runs of neighbours in one pair."""
    begin, end = marks
    pieces, inside = [], False
    for place, token in enumerate(window.tokens):
        if chosen(place) != inside:
            inside = not inside
            pieces.append(begin if inside else end)
        pieces.append(token)
    return "".join(pieces) + (end if inside else "")


def listed(pairs: Iterable[tuple[str, float | int]]) -> str:
    """Tokens with figures: ' cat' (7), ' dog' (3.1)."""
    return ", ".join(f"{words_of(token)} ({value:.3g})" for token, value in pairs) or "none"


def words_of(token: str) -> str:
    """One token in quotes."""
    return f"'{visible(token)}'"
