"""The tables of the pages: columns of figures, tokens with bars, lists of facts."""

from __future__ import annotations

from collections.abc import Sequence

from neuron_lens.explain.result import TokenValue
from neuron_lens.report.charts import bar_svg
from neuron_lens.report.heatmap import visible_text
from neuron_lens.report.html import Child, Html, element
from neuron_lens.report.words import signed

__all__ = ["TOKENS_SHOWN", "bar_rows", "fact_list", "table", "token_table"]

TOKENS_SHOWN = 12


def table(heads: Sequence[str], rows: Sequence[Sequence[Child]], *, figures: frozenset[int]) -> Html:
    """A table of `heads` over `rows`; the columns in `figures` (from 0) are set as numbers, to the right."""

    def kind(column: int) -> str | None:
        return "n" if column in figures else None

    head = [element("th", words, scope="col", class_=kind(column)) for column, words in enumerate(heads)]
    body = [
        element("tr", [element("td", cell, class_=kind(column)) for column, cell in enumerate(row)])
        for row in rows
    ]
    return element("table", element("thead", element("tr", head)), element("tbody", body))


def bar_rows(entries: Sequence[tuple[str, float]]) -> list[list[Child]]:
    """Cells of the first entries `(token, value)`: the token, the signed value, a bar."""
    strongest = max((abs(value) for _, value in entries), default=0.0)
    return [
        [element("code", visible_text(token)), signed(value), bar_svg(value, strongest)]
        for token, value in entries[:TOKENS_SHOWN]
    ]


def token_table(title: str, unit: str, entries: Sequence[TokenValue]) -> Html:
    """Tokens with a figure each, under a heading; `unit` names the figure."""
    if not entries:
        return element("div", element("h3", title), element("p", "none", class_="note"))
    rows = bar_rows([(entry.token, entry.value) for entry in entries])
    return element("div", element("h3", title), table(["Token", unit, ""], rows, figures=frozenset({1})))


def fact_list(facts: Sequence[tuple[str, str]]) -> Html:
    """Names and what they are."""
    return element(
        "dl", [[element("dt", name), element("dd", value)] for name, value in facts], class_="facts"
    )
