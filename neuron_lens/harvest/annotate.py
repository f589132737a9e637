"""What is known of every token of a document without a model: its columns.

Lexical class, statement and bracket come from Python's own tokenizer (`lexical`); position, indentation,
pieces of words and repetition from the text itself. Everything is computed on the whole document, so that
a window knows what lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuron_lens.harvest.lexical import BRACKETS, LEXICAL_CLASSES, STATEMENTS, lex
from neuron_lens.windows import ABSENT, IntArray

__all__ = [
    "COLUMN_NAMES",
    "INDENT_CAP",
    "PIECE_CAP",
    "POSITION_CAP",
    "REPEAT_REACH",
    "annotate",
    "column_types",
]

POSITION_CAP = 64  # position in line is counted up to here, in tokens
INDENT_CAP = 10  # indentation is counted up to here, in steps of four columns
PIECE_CAP = 64  # pieces of a word are counted up to here
REPEAT_REACH = 256  # how far back a token counts as seen before

# The names behind the codes of a column; the other columns are ids and counts.
COLUMN_NAMES = {"lexical_class": LEXICAL_CLASSES, "statement": STATEMENTS, "bracket": BRACKETS}


def annotate(text: str, ids: IntArray, spans: Sequence[tuple[int, int]]) -> tuple[dict[str, IntArray], bool]:
    """Columns `[token]` of a whole document, and whether it could be lexed; `spans` are the tokens'
    characters.

    token, lexical_class, statement, bracket, position_in_line, indent, piece (which piece of its word it
    is, 0 the first), repeated (0 or 1), continuation (the token that followed the last time this one was
    seen, or ABSENT).
    """
    starts = np.array([start for start, _ in spans], dtype=np.int32)
    ends = np.array([end for _, end in spans], dtype=np.int32)
    lexical = lex(text)
    # A token is what its first visible character is; a layout token is what its first character is.
    ink = _first_ink(text)[starts]
    place = np.where(ink < ends, ink, starts)
    position, indent = _line_places(text, starts)
    repeated, continuation = _repeats(ids)
    columns = {
        "token": ids,
        "lexical_class": lexical.lexical_class[place],
        "statement": lexical.statement[place],
        "bracket": lexical.bracket[place],
        "position_in_line": position,
        "indent": indent,
        "piece": np.minimum(_pieces(text, spans), PIECE_CAP),
        "repeated": repeated,
        "continuation": continuation,
    }
    return {name: np.asarray(column, dtype=np.int32) for name, column in columns.items()}, lexical.known


def column_types(n_tokens: int) -> dict[str, np.dtype[np.signedinteger[Any]]]:
    """The narrowest type of every column, for a vocabulary of `n_tokens` ids."""
    largest = {
        "token": n_tokens - 1,
        **{name: len(names) - 1 for name, names in COLUMN_NAMES.items()},
        "position_in_line": POSITION_CAP,
        "indent": INDENT_CAP,
        "piece": PIECE_CAP,
        "repeated": 1,
        "continuation": n_tokens - 1,
    }
    # One more has room, too: readers count from 1, so that 0 is ABSENT.
    return {
        name: np.promote_types(np.min_scalar_type(-value - 2), np.int8) for name, value in largest.items()
    }


def _first_ink(text: str) -> IntArray:
    """For every character, the index of the first visible character from it on (len(text) if none)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    visible = ~np.isin(codes, [9, 10, 11, 12, 13, 32])
    places = np.where(visible, np.arange(len(codes)), len(codes))
    return np.asarray(np.minimum.accumulate(places[::-1])[::-1] if len(places) else places, dtype=np.int32)


def _line_places(text: str, starts: IntArray) -> tuple[IntArray, IntArray]:
    """Position of each token in its line, in tokens, and the line's indentation in steps of four columns."""
    line_starts = [0]
    indents = []
    for line in text.split("\n"):
        bare = line.expandtabs(4)
        indents.append(min((len(bare) - len(bare.lstrip(" "))) // 4, INDENT_CAP))
        line_starts.append(line_starts[-1] + len(line) + 1)
    line_of = np.searchsorted(np.array(line_starts[1:-1]), starts, side="right")
    first_of_line = np.searchsorted(line_of, line_of, side="left")
    position = np.minimum(np.arange(len(starts)) - first_of_line, POSITION_CAP)
    return np.asarray(position, dtype=np.int32), np.array(indents, dtype=np.int32)[line_of]


def _pieces(text: str, spans: Sequence[tuple[int, int]]) -> list[int]:
    """Which piece of its word each token is: 0 unless it and the token before meet inside a word."""
    pieces: list[int] = []
    for start, _ in spans:
        joined = 0 < start < len(text) and _in_word(text[start]) and _in_word(text[start - 1])
        pieces.append(pieces[-1] + 1 if joined and pieces else 0)
    return pieces


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _repeats(ids: IntArray) -> tuple[list[int], list[int]]:
    """Whether each token was seen within REPEAT_REACH, and what followed it the last time."""
    last: dict[int, int] = {}
    repeated, continuation = [], []
    tokens = ids.tolist()
    for place, token in enumerate(tokens):
        seen = last.get(token, -REPEAT_REACH - 1)
        recent = place - seen <= REPEAT_REACH
        repeated.append(int(recent))
        continuation.append(tokens[seen + 1] if recent else ABSENT)
        last[token] = place
    return repeated, continuation
