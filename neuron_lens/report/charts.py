"""Numbers -> SVG drawings that follow the page's colours, light or dark, and read without them.

Each drawing has a title and a description for screen readers, carries its figures as text or as tooltips, and
takes its colours from the page's style sheet through classes. Knows nothing of neurons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from neuron_lens.errors import RequestError
from neuron_lens.report.html import Html, element
from neuron_lens.report.words import interval_text, number

__all__ = [
    "Estimate",
    "bar_svg",
    "heatmap_svg",
    "histogram_svg",
    "interval_svg",
    "nice_ticks",
]


@dataclass(frozen=True)
class Estimate:
    """One line of an interval drawing: a value and the interval around it; None where nothing was measured.

    `kind` is "main" for the figure itself, "control" for what it has to be told apart from, "group" for a
    heading over the lines that follow.
    """

    label: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    kind: str = "main"


def histogram_svg(
    edges: Sequence[float],
    counts: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str = "tokens",
    log_counts: bool = False,
    marker: tuple[float, str] | None = None,
    compared: tuple[Sequence[float], str] | None = None,
    width: int = 640,
    height: int = 220,
) -> Html:
    """Bars over `edges` `[bins + 1]` with heights `counts` `[bins]`.

    Args:
        log_counts: draw log10(1 + count): activations are rare, and rare bins should still be seen.
        marker: a value on the x axis and its label, drawn as a dashed line.
        compared: counts `[bins]` to tell these from, drawn as an outline over the bars, and their name.

    Raises:
        RequestError: the edges do not fit the counts, do not ascend, or a count is negative.
    """
    ascending = edges[0] < edges[-1] and all(a <= b for a, b in pairwise(edges))
    if len(edges) != len(counts) + 1 or not counts or not ascending or min(counts) < 0:
        raise RequestError(
            "a histogram needs ascending edges, one more than the counts, and no count below 0; given "
            f"{len(edges)} edges and {len(counts)} counts"
        )
    left, right, top, bottom = 64.0, width - 12.0, 14.0, height - 46.0
    tallest = max(*counts, *(compared[0] if compared else ()), 1)
    span = edges[-1] - edges[0]

    def x(value: float) -> float:
        return left + (value - edges[0]) / span * (right - left)

    def y(count: float) -> float:
        share = math.log1p(count) / math.log1p(tallest) if log_counts else count / tallest
        return bottom - share * (bottom - top)

    shapes: list[Html] = []
    for tick in _count_ticks(tallest, log_counts):
        shapes.append(_line(left, y(tick), right, y(tick), "grid"))
        shapes.append(_label(left - 6, y(tick) + 4, _compact(tick), "end"))
    for (low, high), count in zip(pairwise(edges), counts, strict=True):
        if count:
            tip = element("title", f"{number(low)} to {number(high)}: {_compact(count)} {y_label}")
            gap = min(1.0, (x(high) - x(low)) / 4)
            box = _rect(x(low) + gap / 2, y(count), x(high) - x(low) - gap, bottom - y(count), "bar", tip)
            shapes.append(box)
    if compared is not None:
        corners = [f"{x(e):.1f},{y(c):.1f}" for i, c in enumerate(compared[0]) for e in edges[i : i + 2]]
        outline = f"{left:.1f},{bottom:.1f} {' '.join(corners)} {right:.1f},{bottom:.1f}"
        shapes.append(element("polyline", element("title", compared[1]), points=outline, class_="outline"))
    shapes.append(_line(left, bottom, right, bottom, "axis"))
    for tick in nice_ticks(edges[0], edges[-1]):
        shapes.append(_line(x(tick), bottom, x(tick), bottom + 4, "axis"))
        shapes.append(_label(x(tick), bottom + 18, number(tick)))
    shapes.append(_label((left + right) / 2, height - 8, x_label, "middle", "caption"))
    scale_note = f"{y_label} (log scale)" if log_counts else y_label
    turned = f"rotate(-90 14 {(top + bottom) / 2:.1f})"
    shapes.append(_label(14, (top + bottom) / 2, scale_note, "middle", "caption", transform=turned))
    if marker is not None and edges[0] <= marker[0] <= edges[-1]:
        at = x(marker[0])
        near_end = at > (left + right) / 2
        shapes.append(_line(at, top - 6, at, bottom, "marker"))
        shapes.append(
            _label(at + (-5 if near_end else 5), top + 4, marker[1], "end" if near_end else "start")
        )
    description = (
        f"Histogram of {x_label}, {len(counts)} bins from {number(edges[0])} to {number(edges[-1])}."
    )
    return _svg(width, height, title, description, shapes)


def interval_svg(
    estimates: Sequence[Estimate],
    *,
    title: str,
    low: float = 0.0,
    high: float = 1.0,
    reference: float | None = None,
    digits: int = 2,
    width: int = 760,
) -> Html:
    """One row per estimate: a dot at the value, a line along its interval, the figures in words at the right.

    Args:
        low, high: the ends of the common axis; widened where an estimate lies outside.
        reference: the value that means nothing was learned (0 for a correlation, 0.5 for an accuracy).
        digits: decimals of the figures in words.
    """
    known = [v for e in estimates for v in (e.value, e.low, e.high) if v is not None and math.isfinite(v)]
    low, high = min([low, *known]), max([high, *known])
    figures = [interval_text(e.value, e.low, e.high, digits) for e in estimates]
    # About 7.4 units a character at the rows' size.
    left, right, row = 215.0, width - 20 - 7.4 * max(map(len, figures), default=0), 26.0
    bottom = 8 + row * len(estimates)
    height = int(bottom + 28)

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    shapes: list[Html] = []
    for tick in nice_ticks(low, high, 5):
        shapes.append(_line(x(tick), 4, x(tick), bottom, "grid"))
        shapes.append(_label(x(tick), bottom + 18, number(tick)))
    if reference is not None and low <= reference <= high:
        shapes.append(_line(x(reference), 4, x(reference), bottom, "marker"))
    spoken = []
    for index, estimate in enumerate(estimates):
        middle = 8 + row * (index + 0.5)
        if estimate.kind == "group":
            shapes.append(_label(0, middle + 4, estimate.label, "start", "row group"))
            continue
        kind = f"row {estimate.kind}"
        shapes.append(_label(left - 12, middle + 4, _shorten(estimate.label, 30), "end", kind))
        words = figures[index]
        spoken.append(f"{estimate.label} {words}")
        shapes.append(_label(right + 12, middle + 4, words, "start", kind))
        if estimate.low is not None and estimate.high is not None:
            shapes.append(
                _line(x(estimate.low), middle, x(estimate.high), middle, f"whisker {estimate.kind}")
            )
        if estimate.value is not None and math.isfinite(estimate.value):
            dot = {"cx": f"{x(estimate.value):.1f}", "cy": f"{middle:.1f}", "r": "5"}
            shapes.append(
                element("circle", element("title", spoken[-1]), class_=f"dot {estimate.kind}", **dot)
            )
    return _svg(width, height, title, "; ".join(spoken), shapes)


def heatmap_svg(
    matrix: Sequence[Sequence[float | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    value_label: str = "value",
    cell: int = 22,
) -> Html:
    """A labelled grid: the stronger the shade the larger the value; negative values in the second colour.

    Args:
        matrix: `[rows][columns]`; None or NaN is drawn as missing (hatched outline).

    Raises:
        RequestError: the labels do not fit the matrix.
    """
    if len(matrix) != len(row_labels) or any(len(row) != len(column_labels) for row in matrix):
        shape = f"{len(matrix)} rows of {sorted({len(row) for row in matrix})} values"
        raise RequestError(
            f"heatmap {title!r}: {shape} do not fit {len(row_labels)} row labels and {len(column_labels)} "
            "column labels"
        )
    known = [abs(v) for row in matrix for v in row if v is not None and math.isfinite(v)]
    strongest = max(known, default=0.0) or 1.0
    # About 7 units a character at the labels' size: enough for the longest label, cut at 24 characters.
    left = 16 + 7 * min(24, max((len(label) for label in row_labels), default=0))
    top = 16 + 6 * min(24, max((len(label) for label in column_labels), default=0))
    shapes = []
    for column, label in enumerate(column_labels):
        at = left + (column + 0.5) * cell + 4
        turned = f"rotate(-60 {at:.1f} {top - 8})"
        shapes.append(_label(at, top - 8, _shorten(label, 24), "start", transform=turned))
    for index, (row, label) in enumerate(zip(matrix, row_labels, strict=True)):
        y = top + index * cell
        shapes.append(_label(left - 8, y + cell / 2 + 4, _shorten(label, 24), "end"))
        for column, value in enumerate(row):
            tip = element("title", f"{label}, {column_labels[column]}: {value_label} {number(value)}")
            missing = value is None or not math.isfinite(value)
            kind = "missing" if missing else "negative" if (value or 0) < 0 else "positive"
            share = 0.0 if missing else abs(value or 0) / strongest
            box = {"fill_opacity": f"{share:.3f}"} if not missing else {}
            shapes.append(_rect(left + column * cell, y, cell - 1, cell - 1, f"cell {kind}", tip, **box))
    width = left + len(column_labels) * cell + 90
    height = top + len(row_labels) * cell + 30
    note = f"{value_label}: full shade {number(strongest)}"
    shapes.append(_label(left, height - 8, note, "start", "caption"))
    description = (
        f"{len(row_labels)} by {len(column_labels)} values of {value_label}, strongest {number(strongest)}."
    )
    return _svg(width, height, title, description, shapes)


def bar_svg(value: float, strongest: float, *, width: int = 72) -> Html:
    """A bar for one cell of a table, `abs(value) / strongest` wide; decoration beside the figure itself."""
    share = min(1.0, abs(value) / strongest) if strongest > 0 else 0.0
    bar = _rect(0, 1, share * width, 8, "cell negative" if value < 0 else "cell positive")
    return element("svg", bar, viewBox=f"0 0 {width} 10", width=str(width), height="10", aria_hidden="true")


def nice_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round values (steps of 1, 2 or 5 times a power of ten) inside `[low, high]`."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(index * step, digits) for index in range(first, last + 1)]


def _count_ticks(tallest: float, log_counts: bool) -> list[float]:
    if not log_counts:
        return nice_ticks(0, tallest, 4)
    powers = [10.0**exponent for exponent in range(math.floor(math.log10(max(tallest, 1))) + 1)]
    return powers[:: max(1, len(powers) // 4)]


def _compact(count: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{suffix}"
    return f"{count:.3g}"


def _shorten(label: str, length: int) -> str:
    return label if len(label) <= length else label[: length - 1] + "…"


def _svg(width: float, height: float, title: str, description: str, shapes: Sequence[Html]) -> Html:
    head = [element("title", title), element("desc", description)]
    box = f"0 0 {width:g} {height:g}"
    return element("svg", head, shapes, viewBox=box, width=f"{width:g}", height=f"{height:g}", role="img")


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _rect(x: float, y: float, width: float, height: float, kind: str, *children: Html, **values: str) -> Html:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{max(width, 0.5):.1f}", "height": f"{height:.1f}"}
    return element("rect", *children, class_=kind, **place, **values)


def _label(
    x: float,
    y: float,
    words: str,
    anchor: str = "middle",
    kind: str | None = None,
    *,
    transform: str | None = None,
) -> Html:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor, "transform": transform}
    return element("text", words, class_=kind, **place)
