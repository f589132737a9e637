"""Words for tokens: every text has one shape, every count lies in the bucket that is said, quotes hide nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.explain.features import _log_bucket
from neuron_lens.explain.token_words import TOKEN_SHAPES, bucket_word, quoted, statement_words, token_shape


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("\n    ", "line break"), ("   ", "spaces"), (" 42", "digits"), (" self", "lower-case letters"),
        ("IO", "upper-case letters"), (" None", "capitalised letters"), ("x_1", "letters and digits or underscores"),
        ("__", "an underscore"), (" ((", "a bracket"), ("\"\"\"", "a quote"), (" +=", "punctuation"), ("a b", "mixed"),
        ("", "mixed"),
    ],
)  # fmt: skip
def test_the_shape_of_a_token(text: str, shape: str) -> None:
    assert TOKEN_SHAPES[token_shape(text)] == shape


@given(st.text(max_size=12))
def test_every_text_has_a_shape_and_only_nothing_is_nothing(text: str) -> None:
    assert 0 < token_shape(text) < len(TOKEN_SHAPES)


@given(st.integers(0, 100_000))
def test_a_count_lies_in_the_bucket_that_is_said(count: int) -> None:
    # Views hold counts one higher: 0 is "absent".
    low, _, high = bucket_word(int(_log_bucket(np.array(count + 1)))).partition("-")
    assert int(low) <= count <= int(high or low)
    assert bucket_word(0) == "nothing"


@given(
    st.text(st.sampled_from("ab\\\n\t\r' "), max_size=8), st.text(st.sampled_from("ab\\\n\t\r' "), max_size=8)
)
def test_different_texts_are_quoted_differently(first: str, second: str) -> None:
    assert (quoted(first) == quoted(second)) == (first == second)
    assert not set(quoted(first)) & set("\n\t\r")


def test_statements_have_words_of_their_own_or_are_lines() -> None:
    assert statement_words("decorator") == "in a decorator" and statement_words("def") == "in a def line"
