"""The builder: whatever text is put in, a parser gets the same text back and no other structure."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.report.html import Html, document, element, fragment, text

from .parsing import Node, parse

# Text that tries hard: markup, quotes, entities, comments, controls, reordering characters, lone surrogates.
HOSTILE_PIECES = (
    ["<", ">", "&", '"', "'", "`", "</script>", "</i>", "<!--", "-->", "]]>", "&lt;", "&#0;", "&amp"],
    [
        "<img src=x onerror=a()>",
        "\x00",
        "\n",
        "\r",
        "\r\n",
        "\t",
        " ",
        "\u202e",
        "\u2028",
        "\ud800",
        "\ufffe",
    ],
)
HOSTILE = st.lists(
    st.sampled_from([piece for pieces in HOSTILE_PIECES for piece in pieces])
    | st.text(alphabet=st.characters(), max_size=8)
).map("".join)

UNCARRIABLE = {*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0))} - {"\n", "\t"}


def carried(value: str) -> str:
    """What an HTML document can carry of `value`."""

    def bad(char: str) -> bool:
        code = ord(char)
        return (
            char in UNCARRIABLE
            or 0xD800 <= code < 0xE000
            or 0xFDD0 <= code < 0xFDF0
            or code in (0xFFFE, 0xFFFF)
        )

    return "".join("\ufffd" if bad(char) else char for char in value)


@given(inside=HOSTILE, value=HOSTILE)
def test_text_and_attributes_come_back_unchanged_and_add_no_structure(inside: str, value: str) -> None:
    markup = element("p", inside, title=value)
    assert parse(markup) == [Node("p", {"title": carried(value)}, [carried(inside)] if inside else [])]
    markup.encode("utf-8")  # lone surrogates would fail here


@given(st.lists(HOSTILE, max_size=4))
def test_a_fragment_holds_its_children_in_order(parts: list[str]) -> None:
    nodes = parse(fragment([element("b", part) for part in parts], None, []))
    assert ["".join(map(str, node.children)) for node in nodes if isinstance(node, Node)] == list(
        map(carried, parts)
    )


def test_only_html_passes_unescaped() -> None:
    assert fragment(Html("<b>"), "<b>") == "<b>&lt;b&gt;"
    assert fragment(text("<b>") + "<i>") == "&amp;lt;b&amp;gt;&lt;i&gt;"  # a plain str again: escaped again


@pytest.mark.parametrize("name", ["onclick", "style", "a b", "a>"])
def test_attributes_that_could_act_are_refused(name: str) -> None:
    with pytest.raises(AssertionError):
        element("p", **{name: "x"})


@pytest.mark.parametrize("tag", ["script", "style", "p><script", ""])
def test_tags_that_could_act_are_refused(tag: str) -> None:
    with pytest.raises(AssertionError):
        element(tag)


def test_a_void_tag_has_no_end_and_no_children() -> None:
    assert element("br") == "<br>"
    with pytest.raises(AssertionError):
        element("br", "x")


def test_a_document_names_its_two_inline_blocks_and_allows_nothing_else() -> None:
    page = document("a <b>", element("p", "x"), style="p{}", script="1;")
    assert "<title>a &lt;b&gt;</title>" in page
    assert page.count("sha256-") == 2 and "default-src &#x27;none&#x27;" in page
    HTMLParser().feed(page)
    with pytest.raises(AssertionError):
        document("t", element("p"), style="", script='"</script>"')
