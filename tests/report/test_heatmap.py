"""Tokens as text: nothing is lost, nothing is added, shades follow the activation."""

from __future__ import annotations

import math
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.report.heatmap import SHADES, legend, token_spans, visible_text

from .parsing import Node, parse
from .test_html import HOSTILE

INVISIBLE = ("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp")


def tokens_of(markup: str) -> list[Node]:
    nodes = parse(markup)
    assert all(isinstance(node, Node) and node.tag == "i" for node in nodes)
    return [node for node in nodes if isinstance(node, Node)]


@given(st.lists(st.tuples(HOSTILE, st.floats(-10, 10), st.floats(-10, 10) | st.none()), max_size=6))
def test_every_token_is_one_element_whose_text_is_the_token(rows: list) -> None:
    tokens, true, simulated = [r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows]
    nodes = tokens_of(token_spans(tokens, true, simulated, scale=10.0))
    assert len(nodes) == len(tokens)
    for token, node in zip(tokens, nodes, strict=True):
        seen = "".join(c for c in token if unicodedata.category(c) not in INVISIBLE or c in "\n\t")
        assert node.text(without="b") == seen  # <b> holds the glyphs of what cannot be seen
        assert {inner.tag for inner in node.walk()} <= {"i", "b"}
        assert set(node.attributes) <= {"class", "title"}
        glyphs = [inner.text() for inner in node.find("b")]
        unseen = [c for c in token if unicodedata.category(c) in INVISIBLE]
        assert len(glyphs) == max(len(unseen), 0 if token else 1) and all(glyphs)


@given(st.floats(-5, 5), st.floats(0.1, 5))
def test_shade_is_proportional_symmetric_and_bounded(value: float, scale: float) -> None:
    def shade(activation: float) -> tuple[int, bool]:
        classes = (
            tokens_of(token_spans(["x"], [activation], scale=scale))[0].attributes.get("class") or ""
        ).split()
        levels = [int(c[1:]) for c in classes if re.fullmatch(r"t\d+", c)]
        return (levels[0] if levels else 0), "tn" in classes

    level, negative = shade(value)
    assert abs(level / SHADES - min(1.0, abs(value) / scale)) <= 0.5 / SHADES + 1e-9
    assert negative == (value < 0 and level > 0)
    assert shade(-value)[0] == level


def test_whitespace_is_visible_and_kept() -> None:
    newline, tab, spaces, word = tokens_of(token_spans(["\n    ", "\t", "  ", " self"], [0.0] * 4, scale=1.0))
    assert newline.text() == "↵\n    " and tab.text() == "⇥\t"
    assert spaces.attributes["class"] == "w" and spaces.text() == "  "
    assert word.text() == " self" and "class" not in word.attributes
    assert visible_text(" a\n\t\u202e") == "·a↵⇥⟨U+202E⟩"


def test_a_missing_prediction_is_marked_and_not_drawn_as_zero() -> None:
    missing, zero = tokens_of(token_spans(["a", "b"], [1.0, 1.0], [None, 0.0], scale=1.0))
    assert "sx" in (missing.attributes["class"] or "") and "simulated –" in (
        missing.attributes["title"] or ""
    )
    assert "sx" not in (zero.attributes["class"] or "") and "simulated 0" in (zero.attributes["title"] or "")
    assert "t12" not in (
        tokens_of(token_spans(["a"], [math.nan], scale=1.0))[0].attributes.get("class") or ""
    )


def test_a_silent_unit_has_no_shades() -> None:
    assert all(
        "class" not in node.attributes for node in tokens_of(token_spans(["a", "b"], [0.0, 0.0], scale=0.0))
    )


@pytest.mark.parametrize("simulated", [None, [0.0]])
def test_lengths_that_differ_are_refused(simulated: list[float] | None) -> None:
    activations = [0.0] if simulated is None else [0.0, 0.0]
    with pytest.raises(RequestError, match="2 tokens"):
        token_spans(["a", "b"], activations, simulated, scale=1.0)


def test_the_legend_says_which_band_is_which() -> None:
    assert "simulated" in legend(3.0, simulated=True) and "simulated" not in legend(3.0, simulated=False)
