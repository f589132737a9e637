"""The offline explainer on evidence: rules over the tokens around, fitted to the activations. No judge, no network.

It is `explain.token_statistics` with the features that the windows themselves hold. With whole harvested windows,
which know more of the text (statements, brackets, words), `explain.unit.explain_windows` is the richer form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import Candidate
from neuron_lens.explain.features import FEATURES, FeatureSet
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import largest_of
from neuron_lens.explain.sentence import describe
from neuron_lens.explain.token_statistics import Examples, fit_predicate
from neuron_lens.llm import Backend
from neuron_lens.records import TokenWindow
from neuron_lens.windows import ABSENT, IntArray, TextWindows

__all__ = ["TokenStatistics"]

_CONTEXT = 4  # tokens before a window that features look at
_OF_TOKENS = (
    "token_shape", "token", "previous_token", "next_token", "second_previous_token", "third_previous_token",
    "token_pair", "token_triple",
)  # fmt: skip
_OF_CLASSES = (
    "lexical_class", "next_lexical_class", "previous_lexical_class", "lexical_triple", "token_in_class",
    "previous_class_token", "previous_token_class",
)  # fmt: skip
_CLASS = "lexical_class"


@dataclass(frozen=True)
class TokenStatistics:
    """Fits on train, chooses on validation. Raises RequestError when either part has no window."""

    name: ClassVar[str] = "token_statistics"

    def plan(self, evidence: Evidence, backend: Backend | None = None) -> Plan[tuple[Candidate, ...]]:
        """No calls; the backend is not used."""
        return Plan((), lambda answers: self.explain(evidence))

    def explain(self, evidence: Evidence, backend: Backend | None = None) -> tuple[Candidate, ...]:
        """One candidate, with its predicate."""
        train, validation = evidence.train.windows, evidence.validation.windows
        if not train or not validation:
            raise RequestError(
                f"{self.name} fits on train and chooses on validation; {evidence.unit} has {len(train)} and "
                f"{len(validation)} windows there, and needs at least 1 in each"
            )
        windows = (*train, *validation)
        text = _text_windows(windows)
        activations = np.zeros((len(windows), text.length), dtype=np.float32)
        for row, window in enumerate(windows):
            activations[row, : len(window.activations)] = window.activations
        names = _OF_TOKENS + (_OF_CLASSES if _CLASS in text.columns else ())
        features = FeatureSet(text, [feature for feature in FEATURES if feature.name in names]).of_unit(None)
        split = len(train)
        rows = np.arange(len(windows), dtype=np.int32)
        fitting, choosing = (
            Examples(some, text.present[some], activations[some]) for some in (rows[:split], rows[split:])
        )
        fitted = fit_predicate(features, fitting, choosing)
        predicate = fitted.written()
        sentence = describe(predicate, largest_of(train), fitted.validation_correlation)
        return (Candidate(explainer=self.name, sentence=sentence, predicate=predicate),)


def _text_windows(windows: Sequence[TokenWindow]) -> TextWindows:
    """The windows as columns over a vocabulary of their own."""
    length = max(len(window.tokens) for window in windows)
    tokens = _Codes(token for window in windows for token in (*window.preceding, *window.tokens))
    before = [tokens.of(window.preceding[-_CONTEXT:]) for window in windows]
    columns = {"token": _column(windows, length, before, [tokens.of(window.tokens) for window in windows])}
    columns["piece"] = np.where(columns["token"] == ABSENT, ABSENT, 0)  # words are not told from pieces here
    names: dict[str, tuple[str, ...]] = {}
    if all(_CLASS in window.annotations for window in windows):
        classes = _Codes(name for window in windows for name in window.annotations[_CLASS])
        own = [classes.of(window.annotations[_CLASS]) for window in windows]
        columns[_CLASS] = _column(windows, length, [[] for _ in windows], own)
        names[_CLASS] = classes.texts
    place = np.zeros(len(windows), dtype=np.int32)
    return TextWindows(
        length=length, context=_CONTEXT, documents={0: ""}, token_texts=tokens.texts, names=names, document=place,
        start=place, character_start=place, context_position=place, split=place, columns=columns,
    )  # fmt: skip


def _column(
    windows: Sequence[TokenWindow], length: int, before: list[list[int]], own: list[list[int]]
) -> IntArray:
    """`[window, context + length + 1]`; what follows a window's last token is not known."""
    column = np.full((len(windows), _CONTEXT + length + 1), ABSENT, dtype=np.int32)
    for row, (earlier, here) in enumerate(zip(before, own, strict=True)):
        column[row, _CONTEXT - len(earlier) : _CONTEXT] = earlier
        column[row, _CONTEXT : _CONTEXT + len(here)] = here
    return column


class _Codes:
    """Texts numbered from 0 in order of first appearance."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._code = {text: code for code, text in enumerate(dict.fromkeys(texts))}

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self._code)

    def of(self, texts: Sequence[str]) -> list[int]:
        return [self._code[text] for text in texts]
