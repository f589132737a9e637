"""A tiny HTML builder: what it returns is escaped by construction.

`element("p", "a < b", class_="note")` gives `<p class="note">a &lt; b</p>`. Text and attribute values are
escaped unless they are `Html` already, and `Html` comes only from this module's functions, so a token such as
`</script>` can never leave the text it stands in. Knows nothing of neurons.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterable

__all__ = ["Child", "Html", "attributes", "document", "element", "fragment", "text"]


class Html(str):
    """Markup that needs no further escaping; made by `element`, `fragment` and `text` only."""

    __slots__ = ()


Child = str | int | float | None | Iterable["Child"]
Value = str | int | float | bool | None

VOID_TAGS = frozenset({"br", "col", "hr", "input", "link", "meta"})
NAME = re.compile(r"[A-Za-z][A-Za-z0-9:-]*")

# Characters an HTML document cannot carry (most C0 and C1 controls, lone surrogates, noncharacters), or that
# a parser rewrites (a carriage return becomes a newline).
UNCARRIABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def text(value: str) -> Html:
    """`value` as escaped text; characters that HTML cannot carry become U+FFFD."""
    return Html(html.escape(UNCARRIABLE.sub("\ufffd", value), quote=True))


def attributes(values: dict[str, Value]) -> str:
    """` name="value"` for each entry: `class_` is class, `aria_label` aria-label; None, False: left out.

    Raises:
        AssertionError: a name that is no attribute name, or an inline event handler or style (the pages'
            content security policy would block them).
    """
    parts = []
    for key, value in values.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        assert NAME.fullmatch(name) and name != "style" and not name.startswith("on"), f"attribute {key!r}"
        parts.append(f" {name}" if value is True else f' {name}="{text(str(value))}"')
    return "".join(parts)


def fragment(*children: Child) -> Html:
    """The children in order: `Html` as it is, other text escaped, None nothing, iterables flattened."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str | int | float):
            parts.append(text(str(child)))
        else:
            parts.append(fragment(*child))
    return Html("".join(parts))


def element(tag: str, *children: Child, **values: Value) -> Html:
    """`<tag values...>children</tag>`, everything escaped.

    Raises:
        AssertionError: the tag is no tag name, is `script` or `style` (see `document`), or is void and has
            children.
    """
    assert NAME.fullmatch(tag) and tag not in ("script", "style"), f"tag {tag!r}"
    if tag in VOID_TAGS:
        assert not children, f"<{tag}> holds nothing"
        return Html(f"<{tag}{attributes(values)}>")
    return Html(f"<{tag}{attributes(values)}>{fragment(*children)}</{tag}>")


def document(title: str, body: Html, *, style: str, script: str) -> Html:
    """A whole page. `style` and `script` are the package's own files, inlined as they are and named by hash.

    Raises:
        AssertionError: `style` or `script` holds `</`, which would end its block early.
    """
    assert "</" not in style and "</" not in script, "inlined files must not hold '</'"
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; base-uri 'none'"
    )
    head = fragment(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
    )
    return Html(
        f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n<style>{style}</style>\n</head>\n'
        f"<body>\n{body}\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
