"""A page as a tree, by the standard library's parser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

from neuron_lens.report.html import VOID_TAGS


@dataclass
class Node:
    """An element: its tag, attributes and children (text or elements)."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    children: list[Node | str] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """This element and every element inside it, in order."""
        yield self
        for child in self.children:
            if isinstance(child, Node):
                yield from child.walk()

    def text(self, *, without: str = "") -> str:
        """All text inside, leaving out elements with the tag `without`."""
        return "".join(
            child if isinstance(child, str) else "" if child.tag == without else child.text(without=without)
            for child in self.children
        )

    def find(self, tag: str, kind: str | None = None) -> list[Node]:
        """Elements inside with this tag and, if given, this class."""
        found = (node for node in self.walk() if node.tag == tag)
        return [
            node for node in found if kind is None or kind in (node.attributes.get("class") or "").split()
        ]


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Node("root")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        assert len(node.attributes) == len(attrs), f"<{tag}> repeats an attribute"
        self.open[-1].children.append(node)
        if tag not in VOID_TAGS:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        closed = self.open.pop()
        assert closed.tag == tag, f"</{tag}> closes <{closed.tag}>"

    def handle_data(self, data: str) -> None:
        children = self.open[-1].children
        if children and isinstance(children[-1], str):
            children[-1] += data
        else:
            children.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data!r}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"an instruction: {data!r}")


def parse(markup: str) -> list[Node | str]:
    """The top-level nodes of `markup`; fails on unbalanced tags, comments and repeated attributes."""
    builder = _Builder()
    builder.feed(markup)
    builder.close()
    assert len(builder.open) == 1, f"never closed: {[node.tag for node in builder.open[1:]]}"
    return builder.open[0].children


def page(markup: str) -> Node:
    """A whole page as its `<html>` element."""
    return next(node for node in parse(markup) if isinstance(node, Node))
