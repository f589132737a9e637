"""Drawings: geometry follows the figures, figures are there in words, bad input is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.report.charts import Estimate, bar_svg, heatmap_svg, histogram_svg, interval_svg, nice_ticks

from .parsing import Node, page
from .test_html import HOSTILE, carried


def figure(node: Node, name: str) -> float:
    return float(node.attributes[name] or "nan")


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=30), st.booleans())
def test_bars_are_as_many_and_as_ordered_as_the_counts(counts: list[int], log_counts: bool) -> None:
    edges = [0.5 * place - 1 for place in range(len(counts) + 1)]
    svg = page(histogram_svg(edges, counts, title="t", x_label="x", log_counts=log_counts))
    bars = svg.find("rect", "bar")
    assert len(bars) == sum(1 for count in counts if count)
    heights = [figure(bar, "height") for bar in bars]
    filled = [count for count in counts if count]
    for (a, b), (c, d) in zip(
        zip(filled, heights, strict=True), zip(filled[1:], heights[1:], strict=True), strict=False
    ):
        assert (a - c) * (b - d) >= 0
    if not log_counts and filled:
        tallest, height = max(filled), max(heights)
        assert all(abs(h - height * n / tallest) <= 0.11 for n, h in zip(filled, heights, strict=True))


def test_a_histogram_shows_its_threshold_and_what_it_is_compared_with() -> None:
    svg = page(
        histogram_svg(
            [0, 1, 2],
            [5, 1],
            title="t",
            x_label="x",
            marker=(1.0, "fires: 3 %"),
            compared=([0, 9], "control"),
        )
    )
    assert "fires: 3 %" in svg.text() and len(svg.find("line", "marker")) == 1
    assert svg.find("polyline", "outline")[0].text() == "control"


@pytest.mark.parametrize(
    "edges, counts", [([0, 1], []), ([0, 1], [1, 2]), ([1, 0], [1]), ([0, 1], [-1]), ([1, 1], [1])]
)
def test_a_histogram_that_contradicts_itself_is_refused(edges: list[float], counts: list[float]) -> None:
    with pytest.raises(RequestError, match="ascending edges"):
        histogram_svg(edges, counts, title="t", x_label="x")


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_dots_stand_in_the_order_of_their_values(values: list[float]) -> None:
    rows = [Estimate(f"row {place}", value, value - 0.1, value + 0.1) for place, value in enumerate(values)]
    svg = page(interval_svg(rows, title="t", reference=0.0))
    dots, whiskers = svg.find("circle"), svg.find("line", "whisker")
    assert len(dots) == len(whiskers) == len(values)
    order = [figure(dot, "cx") for dot in dots]
    for place, value in enumerate(values):
        for other, other_value in enumerate(values):
            assert value > other_value or order[place] <= order[other]
    for dot, whisker in zip(dots, whiskers, strict=True):
        assert figure(whisker, "x1") <= figure(dot, "cx") <= figure(whisker, "x2")


def test_what_was_not_measured_has_a_dash_and_no_dot() -> None:
    svg = page(interval_svg([Estimate("missing"), Estimate("heading", kind="group")], title="t"))
    assert not svg.find("circle") and not svg.find("line", "whisker")
    assert "missing –" in svg.find("desc")[0].text()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 8))
def test_ticks_are_few_even_and_inside(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count)
    tolerance = 1e-6 * max(1.0, abs(low), abs(high))
    assert len(ticks) <= count + 1
    assert all(low - tolerance <= tick <= high + tolerance for tick in ticks)
    steps = [b - a for a, b in pairwise(ticks)]
    assert all(abs(step - steps[0]) < tolerance for step in steps)


@given(st.lists(st.tuples(HOSTILE, st.floats(-5, 5) | st.none(), st.floats(-5, 5)), min_size=1, max_size=5))
def test_a_heatmap_has_one_cell_a_value_and_the_strongest_is_full(rows: list) -> None:
    matrix = [[a, b] for _, a, b in rows]
    svg = page(heatmap_svg(matrix, [label for label, _, _ in rows], ["q<k>", "v"], title="t"))
    cells = svg.find("rect", "cell")
    assert len(cells) == 2 * len(rows)
    values = [value for row in matrix for value in row]
    strongest = max(abs(value) for value in values if value is not None)
    for cell, value in zip(cells, values, strict=True):
        kind = "missing" if value is None else "negative" if value < 0 else "positive"
        assert kind in (cell.attributes["class"] or "")
        if value is not None and strongest > 0:
            assert abs(figure(cell, "fill-opacity") - abs(value) / strongest) < 1e-3
    assert carried(f"{rows[0][0]}, q<k>: ") in cells[0].text()


def test_a_heatmap_whose_labels_do_not_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="2 column labels"):
        heatmap_svg([[1.0]], ["a"], ["b", "c"], title="t")


def test_a_bar_is_never_wider_than_its_cell() -> None:
    assert figure(page(bar_svg(5.0, 2.0, width=70)).find("rect")[0], "width") == 70
    assert figure(page(bar_svg(-1.0, 2.0, width=70)).find("rect")[0], "width") == 35
