"""What explanations call things: the shapes of tokens, the kinds of statements and brackets, tokens in quotes."""

from __future__ import annotations

import re

__all__ = ["BRACKET_WORDS", "TOKEN_SHAPES", "bucket_word", "quoted", "statement_words", "token_shape"]

TOKEN_SHAPES = (
    "nothing",
    "line break",
    "spaces",
    "digits",
    "lower-case letters",
    "upper-case letters",
    "capitalised letters",
    "letters and digits or underscores",
    "an underscore",
    "a bracket",
    "a quote",
    "punctuation",
    "mixed",
)
_SHAPE_PATTERNS = (
    r"(?!)",
    r"[ \t]*\n\s*",
    r"[ \t]+",
    r" ?[0-9]+",
    r" ?[a-z]+",
    r" ?[A-Z]+",
    r" ?[A-Z][a-z]+",
    r" ?\w*[A-Za-z0-9]\w*",
    r" ?_+",
    r" ?[()\[\]{}]+",
    r" ?['\"`]+",
    r" ?[^\w\s]+",
    r".*",
)


def token_shape(text: str) -> int:
    """The shape of a token's text, as an index of TOKEN_SHAPES."""
    return next(
        code for code, pattern in enumerate(_SHAPE_PATTERNS) if re.fullmatch(pattern, text, re.DOTALL)
    )


def quoted(text: str) -> str:
    """A token's text in quotes, with line breaks and tabs visible and long runs of spaces counted."""
    shown = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return "'" + re.sub(r" {4,}", lambda run: f"[{len(run[0])} spaces]", shown) + "'"


# How codes of these columns read after a token or a class: "'x' inside a call".
_STATEMENT_WORDS = {
    "unknown": "in text that is not Python",
    "expression": "in an expression or assignment",
    "decorator": "in a decorator",
    "string": "in a docstring",
    "comment": "in a comment",
    "blank": "on a blank line",
    "import": "in an import",
    "if": "in an if line",
}
BRACKET_WORDS = {
    "none": "outside brackets",
    "call": "inside a call",
    "parameters": "inside a parameter list",
    "parenthesis": "inside parentheses",
    "square bracket": "inside square brackets",
    "curly bracket": "inside braces",
    "unknown": "in text that is not Python",
}


def statement_words(name: str) -> str:
    """How a kind of statement reads after a token or a class: "'x' in a def line"."""
    return _STATEMENT_WORDS.get(name, f"in a {name} line")


def bucket_word(bucket: int) -> str:
    """The counts a bucket of doubling steps stands for: "nothing", "0", "1", "2", "3", "4-7", "8-15", …"""
    if bucket <= 4:
        return str(bucket - 1) if bucket else "nothing"
    return f"{2 ** (bucket - 3)}-{2 ** (bucket - 2) - 1}"
