"""Python's own view of a document: lexical class, kind of statement and enclosing bracket of every character.

Built on the standard library's `tokenize`. Classes are our own closed lists, so that results do not depend on
the Python version that runs (3.12 splits f-strings into parts; here a string is a string). A document that
does not tokenise is "unknown" throughout.
"""

from __future__ import annotations

import io
import tokenize
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BRACKETS", "LEXICAL_CLASSES", "STATEMENTS", "LexicalMap", "lex"]

LEXICAL_CLASSES = (
    "unknown",
    "space",
    "indentation",
    "newline",
    "keyword",
    "constant",
    "self",
    "function name",
    "class name",
    "parameter",
    "attribute",
    "called name",
    "module name",
    "builtin",
    "name",
    "number",
    "string",
    "docstring",
    "comment",
    "operator",
    "assignment",
    "opening bracket",
    "closing bracket",
    "comma",
    "colon",
    "dot",
    "decorator",
)

STATEMENTS = (
    "unknown", "expression", "def", "class", "import", "from", "return", "if", "elif", "else", "for", "while",
    "try", "except", "finally", "with", "raise", "assert", "del", "pass", "break", "continue", "yield",
    "global", "nonlocal", "async", "await", "lambda", "not", "decorator", "string", "comment", "blank",
)  # fmt: skip

BRACKETS = ("none", "call", "parameters", "parenthesis", "square bracket", "curly bracket", "unknown")

_CLASS = {name: code for code, name in enumerate(LEXICAL_CLASSES)}
_STATEMENT = {name: code for code, name in enumerate(STATEMENTS)}
_BRACKET = {name: code for code, name in enumerate(BRACKETS)}

_KEYWORDS = frozenset((
    "and", "as", "assert", "async", "await", "break", "class", "continue", "def", "del", "elif", "else",
    "except", "finally", "for", "from", "global", "if", "import", "in", "is", "lambda", "nonlocal",
    "not", "or", "pass", "raise", "return", "try", "while", "with", "yield",
))  # fmt: skip
_CONSTANTS = frozenset(("True", "False", "None", "Ellipsis", "NotImplemented"))
_BUILTINS = frozenset((
    "abs", "all", "any", "bin", "bool", "bytearray", "bytes", "callable", "chr", "classmethod",
    "compile", "complex", "delattr", "dict", "dir", "divmod", "enumerate", "eval", "exec", "filter",
    "float", "format", "frozenset", "getattr", "globals", "hasattr", "hash", "hex", "id", "input",
    "int", "isinstance", "issubclass", "iter", "len", "list", "locals", "map", "max", "memoryview",
    "min", "next", "object", "oct", "open", "ord", "pow", "print", "property", "range", "repr",
    "reversed", "round", "set", "setattr", "slice", "sorted", "staticmethod", "str", "sum", "super",
    "tuple", "type", "vars", "zip", "Exception", "ValueError", "TypeError", "KeyError", "IndexError",
    "AttributeError", "RuntimeError", "OSError", "NotImplementedError", "StopIteration", "ImportError",
))  # fmt: skip
_ASSIGNMENTS = frozenset((
    "=", "+=", "-=", "*=", "/=", "//=", "%=", "**=", ">>=", "<<=", "&=", "^=", "|=", "@=", ":=",
))  # fmt: skip
# Start and end of a string that newer Pythons deliver in parts (f-strings from 3.12, t-strings from 3.14).
_STRING_STARTS = frozenset(
    getattr(tokenize, name) for name in ("FSTRING_START", "TSTRING_START") if hasattr(tokenize, name)
)
_STRING_ENDS = frozenset(
    getattr(tokenize, name) for name in ("FSTRING_END", "TSTRING_END") if hasattr(tokenize, name)
)
_LAYOUT = frozenset((tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER))


@dataclass(frozen=True, eq=False)
class LexicalMap:
    """Codes `[character]` into LEXICAL_CLASSES, STATEMENTS and BRACKETS; `known` is False when lexing
    failed."""

    lexical_class: NDArray[np.uint8]
    statement: NDArray[np.uint8]
    bracket: NDArray[np.uint8]
    known: bool


@dataclass(frozen=True)
class _Token:
    kind: int
    text: str
    start: int
    end: int


def lex(text: str) -> LexicalMap:
    """The lexical map of a document; "unknown" throughout when it is not Python that tokenises."""
    try:
        tokens = _tokens(text)
    except (tokenize.TokenError, SyntaxError):
        # Not an error of ours: most of the world's text is not Python. The caller counts these documents.
        unknown = np.zeros(len(text), dtype=np.uint8)
        return LexicalMap(
            unknown, unknown, np.full(len(text), _BRACKET["unknown"], dtype=np.uint8), known=False
        )
    lexical_class = np.full(len(text), _CLASS["space"], dtype=np.uint8)
    statement = np.full(len(text), _STATEMENT["blank"], dtype=np.uint8)
    bracket = np.full(len(text), _BRACKET["none"], dtype=np.uint8)
    _mark_layout(text, lexical_class)
    line: list[_Token] = []
    begin = 0
    for token in tokens:
        if not line and token.kind == tokenize.COMMENT:
            lexical_class[token.start : token.end] = _CLASS["comment"]
            statement[begin : token.end] = _STATEMENT["comment"]
            begin = token.end
        if not line and token.kind in (tokenize.NL, tokenize.COMMENT):
            continue
        line.append(token)
        if token.kind in (tokenize.NEWLINE, tokenize.ENDMARKER):
            _mark_line(line, lexical_class, bracket)
            statement[begin : token.end] = _statement(line)
            begin, line = token.end, []
    return LexicalMap(lexical_class, statement, bracket, known=True)


def _tokens(text: str) -> list[_Token]:
    """The document's tokens with character offsets, strings whole."""
    starts = [0]
    for line in io.StringIO(text, newline="\n"):
        starts.append(starts[-1] + len(line))
    starts.append(starts[-1])
    found: list[_Token] = []
    depth, opened = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a document's own odd escapes are none of the caller's business
        for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
            start = min(starts[token.start[0] - 1] + token.start[1], len(text))
            end = min(starts[token.end[0] - 1] + token.end[1], len(text))
            if token.type == tokenize.ERRORTOKEN and token.string[:1] in "'\"":
                raise tokenize.TokenError("a string is never closed")  # as Python 3.12 and later report it
            if token.type in _STRING_STARTS:
                depth, opened = depth + 1, start if depth == 0 else opened
            elif token.type in _STRING_ENDS:
                depth -= 1
                if depth == 0:
                    found.append(_Token(tokenize.STRING, text[opened:end], opened, end))
            elif depth == 0:
                found.append(_Token(token.type, token.string, start, end))
    return found


def _mark_layout(text: str, lexical_class: NDArray[np.uint8]) -> None:
    """Newlines and the white space that begins a line."""
    place = 0
    for line in io.StringIO(text, newline="\n"):
        indent = len(line) - len(line.lstrip(" \t"))
        lexical_class[place : place + indent] = _CLASS["indentation"]
        place += len(line)
        if line.endswith("\n"):
            lexical_class[place - 1] = _CLASS["newline"]


def _statement(line: list[_Token]) -> int:
    """The kind of statement a logical line is."""
    for token in line:
        if token.kind in _LAYOUT or token.kind == tokenize.COMMENT:
            continue
        if token.kind == tokenize.STRING:
            return _STATEMENT["string"]
        if token.text == "@":
            return _STATEMENT["decorator"]
        return (
            _STATEMENT[token.text]
            if token.text in _STATEMENT and token.text in _KEYWORDS
            else _STATEMENT["expression"]
        )
    return _STATEMENT["blank"]


def _mark_line(line: list[_Token], lexical_class: NDArray[np.uint8], bracket: NDArray[np.uint8]) -> None:
    """Classes and brackets of one logical line."""
    code = [token for token in line if token.kind not in _LAYOUT and token.kind != tokenize.COMMENT]
    statement = STATEMENTS[_statement(line)]
    for token in line:
        if token.kind == tokenize.COMMENT:
            lexical_class[token.start : token.end] = _CLASS["comment"]
    stack: list[str] = []
    inside_since = 0
    for place, token in enumerate(code):
        before = code[place - 1] if place else None
        after = code[place + 1] if place + 1 < len(code) else None
        closing = token.kind == tokenize.OP and token.text in ")]}"
        if closing and stack:
            bracket[inside_since : token.start] = _BRACKET[stack[-1]]
            stack.pop()
            inside_since = token.start
        lexical_class[token.start : token.end] = _CLASS[_class(token, before, after, code, statement, stack)]
        if token.kind == tokenize.OP and token.text in "([{":
            if stack:
                bracket[inside_since : token.start] = _BRACKET[stack[-1]]
            stack.append(_bracket(token, before, lexical_class))
            inside_since = token.start


def _bracket(token: _Token, before: _Token | None, lexical_class: NDArray[np.uint8]) -> str:
    if token.text == "[":
        return "square bracket"
    if token.text == "{":
        return "curly bracket"
    if before is None:
        return "parenthesis"
    kind = LEXICAL_CLASSES[lexical_class[before.start]]
    if kind in ("function name", "class name"):
        return "parameters"
    after_value = before.kind == tokenize.NAME and kind != "keyword"
    return "call" if after_value or before.text in (")", "]") else "parenthesis"


def _class(
    token: _Token,
    before: _Token | None,
    after: _Token | None,
    code: list[_Token],
    statement: str,
    stack: list[str],
) -> str:
    """The lexical class of one token, from its neighbours on the logical line."""
    if token.kind == tokenize.NAME:
        return _name_class(token, before, after, statement, stack)
    if token.kind == tokenize.NUMBER:
        return "number"
    if token.kind == tokenize.STRING:
        return "docstring" if len(code) == 1 else "string"
    if token.kind != tokenize.OP:
        return "operator"
    if token.text in _ASSIGNMENTS:
        return "assignment"
    if token.text == "@" and before is None:
        return "decorator"
    single = {",": "comma", ":": "colon", ".": "dot"}
    if token.text in single:
        return single[token.text]
    if token.text in "([{":
        return "opening bracket"
    return "closing bracket" if token.text in ")]}" else "operator"


def _name_class(
    token: _Token, before: _Token | None, after: _Token | None, statement: str, stack: list[str]
) -> str:
    previous = before.text if before is not None else ""
    if token.text in _KEYWORDS:
        return "keyword"
    if token.text in _CONSTANTS:
        return "constant"
    if previous == "def":
        return "function name"
    if previous == "class":
        return "class name"
    if statement in ("import", "from"):
        return "module name"
    if token.text in ("self", "cls"):
        return "self"
    if previous == "@":
        return "decorator"
    called = after is not None and after.text == "("
    if previous == ".":
        return "called name" if called else "attribute"
    if stack and stack[-1] == "parameters" and previous in ("(", ",", "*", "**"):
        return "parameter"
    if token.text in _BUILTINS:
        return "builtin"
    return "called name" if called else "name"
