"""What an explanation may speak of: readable features of the text at a token, each with a key per token.

A feature maps every token of every window to an integer key (two tokens with the same key look the same
to it) and a key to words. A `View` gives a column at some distance from the token: lag 1 is the token
before, lag -1 the token that follows (a unit that predicts the next token is well described by it). Numpy
only.

Features are listed from simple to complex: of two that predict equally well, the explainer takes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.token_words import (
    BRACKET_WORDS,
    TOKEN_SHAPES,
    bucket_word,
    quoted,
    statement_words,
    token_shape,
)
from neuron_lens.windows import IntArray, TextWindows

__all__ = ["FEATURES", "CodedFeature", "Feature", "FeatureSet", "LogitFeature"]

Keys = NDArray[np.int64]

# Ranks in a unit's output logits at which a token's neighbourhood ends: 8 most raised, next 24, next 96.
_LOGIT_RANKS = (8, 32, 128)


class View:
    """Columns of windows at a lag, every entry at least 0 (0 is "absent")."""

    def __init__(self, windows: TextWindows) -> None:
        self.windows = windows
        self.size = {name: int(column.max(initial=0)) + 2 for name, column in windows.columns.items()}
        self.size["token"] = self.size["continuation"] = len(windows.token_texts) + 1

    def __call__(self, column: str, lag: int = 0) -> Keys:
        """`[window, length]`: the column's entry `lag` tokens earlier, plus one; 0 where there is none."""
        first = self.windows.context - lag
        values = self.windows.columns[column]
        if first < 0:
            values = np.pad(values, ((0, 0), (-first, 0)), constant_values=-1)
            first = 0
        return np.asarray(values[:, first : first + self.windows.length] + 1, dtype=np.int64)

    @cached_property
    def shapes(self) -> Keys:
        """The shape of every token of the vocabulary, by view entry (id + 1)."""
        return np.array([0, *(token_shape(text) for text in self.windows.token_texts)], dtype=np.int64)

    def pack(self, *parts: tuple[Keys, int]) -> Keys:
        """Several entries as one key, in mixed radix; the last varies fastest."""
        key = np.zeros_like(parts[0][0])
        for values, size in parts:
            key = key * size + values
        return key

    def columns(self, *wanted: tuple[str, int]) -> Keys:
        """Several columns at their lags as one key."""
        return self.pack(*((self(name, lag), self.size[name]) for name, lag in wanted))

    def split(self, key: int, *sizes: int) -> list[int]:
        """The entries `pack` put into a key."""
        entries = []
        for size in reversed(sizes):
            key, entry = divmod(key, size)
            entries.append(entry)
        return entries[::-1]

    def word(self, column: str, entry: int) -> str:
        """An entry of a column in words."""
        if entry == 0:
            return "nothing"
        if column in ("token", "continuation"):
            return quoted(self.windows.token_texts[entry - 1])
        if column in self.windows.names:
            name = self.windows.names[column][entry - 1]
            if column == "statement":
                return statement_words(name)
            return BRACKET_WORDS[name] if column == "bracket" else name
        return str(entry - 1)


@dataclass(frozen=True)
class Feature:
    """A feature every unit shares.

    `title` completes "where ... is <key>"; `plain` completes "on <keys>" where that reads better.
    """

    name: str
    title: str
    keys: Callable[[View], Keys]
    label: Callable[[View, int], str]


@dataclass(frozen=True, eq=False)
class CodedFeature:
    """A feature's keys renumbered 0..n-1 on given windows: `codes` `[window, length]`, `labels` by code."""

    name: str
    title: str
    codes: IntArray
    n_keys: int
    label: Callable[[int], str]


def _columns_feature(name: str, title: str, *wanted: tuple[str, int], joiner: str = ", ") -> Feature:
    """A feature that is one column, or several columns at once."""

    def label(view: View, key: int) -> str:
        entries = view.split(key, *(view.size[column] for column, _ in wanted))
        return joiner.join(
            view.word(column, entry) for (column, _), entry in zip(wanted, entries, strict=True)
        )

    return Feature(name, title, lambda view: view.columns(*wanted), label)


def _ngram(name: str, title: str, count: int) -> Feature:
    """The last `count` tokens, ending with this one."""
    wanted = [("token", lag) for lag in reversed(range(count))]

    def label(view: View, key: int) -> str:
        entries = view.split(key, *[view.size["token"]] * count)
        return quoted("".join(view.windows.token_texts[entry - 1] if entry else "" for entry in entries))

    return Feature(name, title, lambda view: view.columns(*wanted), label)


def _word_keys(view: View) -> Keys:
    """The word up to and with this token: its last three pieces."""
    piece = view("piece")
    size = view.size["token"]
    before = np.where(piece > 1, view("token", 1), 0)
    before_that = np.where(piece > 2, view("token", 2), 0)
    return view.pack((before_that, size), (before, size), (view("token"), size))


def _word_label(view: View, key: int) -> str:
    entries = view.split(key, *[view.size["token"]] * 3)
    return quoted("".join(view.windows.token_texts[entry - 1] if entry else "" for entry in entries))


def _shape_keys(view: View) -> Keys:
    return view.pack((np.minimum(view("piece"), 2), 3), (view.shapes[view("token")], len(TOKEN_SHAPES)))


def _shape_label(view: View, key: int) -> str:
    piece, shape = view.split(key, 3, len(TOKEN_SHAPES))
    return TOKEN_SHAPES[shape] + (" inside a word" if piece == 2 else "")


def _log_bucket(values: Keys) -> Keys:
    """1, 2, 3, 4, then doubling steps: 5-8, 9-16, ... as 0, 1, 2, 3, 4, 5, ..."""
    return np.where(values <= 4, values, 2 + np.ceil(np.log2(np.maximum(values, 1)))).astype(np.int64)


def _line_keys(view: View) -> Keys:
    return view.pack((_log_bucket(view("position_in_line")), 16), (view("indent"), view.size["indent"]))


def _line_label(view: View, key: int) -> str:
    bucket, indent = view.split(key, 16, view.size["indent"])
    return f"{bucket_word(bucket)} tokens into a line at indentation {max(indent - 1, 0)}"


def _context_keys(view: View) -> Keys:
    position = view.windows.context_position[:, None] + np.arange(view.windows.length)[None, :] + 1
    return _log_bucket(position.astype(np.int64))


FEATURES: tuple[Feature, ...] = (
    _columns_feature("lexical_class", "the lexical class", ("lexical_class", 0)),
    Feature("token_shape", "the token's shape", _shape_keys, _shape_label),
    _columns_feature("token", "the token", ("token", 0)),
    _columns_feature("previous_token", "the token before", ("token", 1)),
    _columns_feature("next_token", "the token that follows", ("token", -1)),
    Feature("word", "the word so far", _word_keys, _word_label),
    _columns_feature("second_previous_token", "the token two before", ("token", 2)),
    _columns_feature("third_previous_token", "the token three before", ("token", 3)),
    Feature(
        "context_position",
        "the number of tokens read",
        _context_keys,
        lambda view, key: bucket_word(key),
    ),
    Feature("place_in_line", "the place in the line", _line_keys, _line_label),
    _columns_feature(
        "statement",
        "the lexical class and kind of statement",
        ("lexical_class", 0),
        ("statement", 0),
        joiner=" ",
    ),
    _columns_feature(
        "bracket",
        "the lexical class and enclosing bracket",
        ("lexical_class", 0),
        ("bracket", 0),
        joiner=" ",
    ),
    _columns_feature(
        "repeated",
        "the lexical class and whether the token was seen before",
        ("lexical_class", 0),
        ("repeated", 0),
        joiner=", times seen before: ",
    ),
    _columns_feature(
        "next_lexical_class",
        "the lexical class here and next",
        ("lexical_class", 0),
        ("lexical_class", -1),
        joiner=" before ",
    ),
    _columns_feature(
        "previous_lexical_class",
        "the lexical class before and here",
        ("lexical_class", 1),
        ("lexical_class", 0),
        joiner=" then ",
    ),
    _columns_feature(
        "lexical_triple",
        "the last three lexical classes",
        ("lexical_class", 2),
        ("lexical_class", 1),
        ("lexical_class", 0),
        joiner=" then ",
    ),
    _columns_feature("continuation", "what followed the token the last time", ("continuation", 0)),
    _columns_feature(
        "token_in_class",
        "the token and its lexical class",
        ("token", 0),
        ("lexical_class", 0),
        joiner=" as ",
    ),
    _columns_feature(
        "token_in_statement",
        "the token and kind of statement",
        ("token", 0),
        ("statement", 0),
        joiner=" ",
    ),
    _columns_feature(
        "token_in_bracket",
        "the token and enclosing bracket",
        ("token", 0),
        ("bracket", 0),
        joiner=" ",
    ),
    _columns_feature(
        "previous_class_token",
        "the lexical class before and the token",
        ("lexical_class", 1),
        ("token", 0),
        joiner=" then ",
    ),
    _columns_feature(
        "previous_token_class",
        "the token before and the lexical class",
        ("token", 1),
        ("lexical_class", 0),
        joiner=" then ",
    ),
    _ngram("token_pair", "the last two tokens", 2),
    _ngram("token_triple", "the last three tokens", 3),
)


@dataclass(frozen=True)
class LogitFeature:
    """Where a token stands in the unit's own output logits: does the text hold what the unit promotes?"""

    name: str
    title: str
    column: str
    lag: int


LOGIT_FEATURES = (
    LogitFeature("promoted_next", "where the next token stands in what the unit promotes", "token", -1),
    LogitFeature("promoted_here", "where this token stands in what the unit promotes", "token", 0),
    LogitFeature(
        "promoted_continuation",
        "where what followed last time stands in what the unit promotes",
        "continuation", 0,
    ),
)  # fmt: skip

_BANDS = (
    "absent",
    *(f"among the {rank} most promoted" for rank in _LOGIT_RANKS),
    "in between",
    *(f"among the {rank} most suppressed" for rank in reversed(_LOGIT_RANKS)),
)


class FeatureSet:
    """All features on given windows, computed once and shared by the units that were seen on them."""

    def __init__(self, windows: TextWindows, features: Sequence[Feature] = FEATURES) -> None:
        self.windows = windows
        self._view = View(windows)
        self.shared = tuple(self._coded(feature) for feature in features)

    def _coded(self, feature: Feature) -> CodedFeature:
        keys = feature.keys(self._view)
        distinct, codes = np.unique(keys, return_inverse=True)
        return CodedFeature(
            name=feature.name,
            title=feature.title,
            codes=codes.reshape(keys.shape).astype(np.int32),
            n_keys=len(distinct),
            label=lambda code: feature.label(self._view, int(distinct[code])),
        )

    def of_unit(self, logits: NDArray[np.floating] | None) -> tuple[CodedFeature, ...]:
        """The shared features, and those from the unit's output logits `[d_vocab]` where it has them."""
        if logits is None:
            return self.shared
        order = np.argsort(-logits, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order))
        from_top = np.searchsorted(_LOGIT_RANKS, rank, side="right")
        from_bottom = np.searchsorted(_LOGIT_RANKS, len(order) - 1 - rank, side="right")
        band = np.where(from_top < 3, 1 + from_top, np.where(from_bottom < 3, 7 - from_bottom, 4))
        by_entry = np.zeros(len(self.windows.token_texts) + 1, dtype=np.int32)
        by_entry[1 : 1 + len(band)] = band[: len(by_entry) - 1]
        own = tuple(
            CodedFeature(
                name=feature.name,
                title=feature.title,
                codes=by_entry[self._view(feature.column, feature.lag)],
                n_keys=len(_BANDS),
                label=lambda code: _BANDS[code],
            )
            for feature in LOGIT_FEATURES
        )
        return self.shared + own
