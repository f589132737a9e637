"""The page of a run: how well its units were explained, as a drawing and as a table to sort and filter.

Every unit is one row of plain HTML, so that the page works without its script and prints whole; the script
sorts and filters the rows and keeps 200 at a time in the document, which keeps thousands of units quick.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from neuron_lens.explain.result import RunResult, Score, UnitSummary
from neuron_lens.report.charts import histogram_svg
from neuron_lens.report.html import Html, element, fragment
from neuron_lens.report.words import decimals, number, percent, sentence_html, signed

__all__ = ["index_body"]

BIN_WIDTH = 0.05
HIGH_CORRELATION = 0.5

# key, heading, class, the direction of the first click
Column = tuple[str, str, str, str]
_FIRST: tuple[Column, ...] = (
    ("unit", "Unit", "c-unit", "ascending"),
    ("explanation", "Explanation", "", "ascending"),
)
_OFFLINE: tuple[Column, ...] = (
    ("correlation", "Test correlation", "c-wide", "descending"),
    ("control", "Control: another unit", "c-figure n optional", "descending"),
    ("auc", "Detection AUC", "c-figure n", "descending"),
)
_LAST: tuple[Column, ...] = (
    ("density", "Fires on", "c-figure n", "descending"),
    ("maximum", "Strongest", "c-figure n optional", "descending"),
    ("loss", "Loss without it", "c-figure n optional", "descending"),
)


@dataclass(frozen=True)
class _Figures:
    """Which figures the units of a run have; the main one is drawn, and is the one to filter by."""

    offline: bool  # scores of a predicate
    scorers: tuple[str, ...]  # that asked a judge

    @classmethod
    def of(cls, units: tuple[UnitSummary, ...]) -> _Figures:
        scorers = tuple(dict.fromkeys(one.scorer for unit in units for one in unit.judged))
        return cls(any(unit.scores for unit in units) or not scorers, scorers)

    @property
    def columns(self) -> tuple[Column, ...]:
        judged = tuple(
            (
                name,
                name.replace("_", " ").capitalize(),
                "c-wide" if not self.offline else "c-figure n",
                "descending",
            )
            for name in self.scorers
        )
        return (*_FIRST, *(_OFFLINE if self.offline else ()), *judged, *_LAST)

    @property
    def main(self) -> tuple[str, str]:
        """Key and words of the main figure."""
        if self.offline:
            return "correlation", "test correlation"
        return self.scorers[0], f"{self.scorers[0].replace('_', ' ')} score"

    def score(self, unit: UnitSummary) -> Score | None:
        """A unit's main figure."""
        if self.offline:
            return unit.scores.get("correlation")
        return next((one.score for one in unit.judged if one.scorer == self.scorers[0]), None)

    def control(self, unit: UnitSummary) -> Score | None:
        """The same for an explanation that should not work."""
        if self.offline:
            return _control(unit)
        return next((one.control for one in unit.judged if one.scorer == self.scorers[0]), None)


def index_body(run: RunResult) -> Html:
    """The index's body; rows link to `<unit path>/index.html`, relative to the page's folder."""
    sentences = sorted({unit.sentence for unit in run.units})
    order = {sentence: place for place, sentence in enumerate(sentences)}
    facts = run.run
    figures = _Figures.of(run.units)
    return fragment(
        element(
            "header",
            element("p", f"neuron_lens {facts.package_version}", class_="crumbs"),
            element("h1", f"Units of {run.model.name}, explained"),
            element(
                "p",
                f"Each unit's explanation was made on training windows of {facts.corpus} "
                f"({facts.n_documents:,} documents, {facts.n_tokens:,} tokens) and scored on held-out ones, "
                "beside two predictions that should not work.",
                class_="note",
            ),
        ),
        element(
            "main",
            _overview(run.units, figures),
            element("h2", "Units"),
            _controls(run.units, figures),
            element("div", _table(run.units, order, figures), class_="scroll"),
            _pager(),
        ),
    )


def _overview(units: tuple[UnitSummary, ...], figures: _Figures) -> Html:
    values = [value for unit in units if (value := _value(figures.score(unit))) is not None]
    control = [value for unit in units if (value := _value(figures.control(unit))) is not None]
    above = sum(1 for unit in units if (_low(figures.score(unit)) or 0.0) > HIGH_CORRELATION)
    words = figures.main[1]
    cards = [
        ("Units", f"{len(units):,}", f"{len(values):,} with a {words}"),
        ("Interval above 0.5", f"{above:,}", f"{100 * above / len(units):.0f} % of the units"),
    ]
    if values:
        quarter = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        cards.append(
            (
                f"Median {words.removeprefix('test ')}",
                decimals(quarter[1]),
                f"middle half {decimals(quarter[0])} to {decimals(quarter[2])}",
            )
        )
    if control:
        cards.append(
            ("Median of the control", decimals(statistics.median(control)), "another unit's explanation")
        )
    shown = element(
        "dl",
        [element("div", element("dt", a), element("dd", b, element("small", c))) for a, b, c in cards],
        class_="cards",
    )
    if not values:
        return fragment(shown, element("p", f"No unit has a {words}.", class_="note"))
    lowest = min([0.0, *values, *control])
    first = int(lowest // BIN_WIDTH)
    last = round(1 / BIN_WIDTH)
    edges = [round(place * BIN_WIDTH, 6) for place in range(first, last + 1)]
    chart = histogram_svg(
        edges,
        _counts(values, first, last),
        title=f"{words.capitalize()} of every unit",
        x_label=words,
        y_label="units",
        compared=(_counts(control, first, last), "another unit's explanation") if control else None,
        width=760,
    )
    caption = f"Bars: {words} of each unit's own explanation."
    caption += " Outline: the same units predicted by another unit's explanation." if control else ""
    return fragment(shown, element("figure", chart, element("figcaption", caption)))


def _counts(values: list[float], first: int, last: int) -> list[int]:
    counts = [0] * (last - first)
    for value in values:
        counts[min(last - 1, max(first, int(value // BIN_WIDTH))) - first] += 1
    return counts


def _controls(units: tuple[UnitSummary, ...], figures: _Figures) -> Html:
    layers = sorted({unit.unit.layer for unit in units})
    options = [element("option", "all", value="")]
    options += [element("option", str(layer), value=str(layer)) for layer in layers]
    return element(
        "form",
        element("label", "Search in name and explanation",
                element("input", type="search", id="query", autocomplete="off",
                        placeholder="words, all must occur"),
                class_="wide"),
        element("label", "Layer", element("select", options, id="layer")),
        element("label", f"Least {figures.main[1].removeprefix('test ')}",
                element("input", type="number", id="least", min=-1, max=1, step="0.05", inputmode="decimal")),
        class_="controls", role="search", hidden=True, data_needs_script=True,
    )  # fmt: skip


def _pager() -> Html:
    return element(
        "div",
        element("button", "Previous", type="button", id="previous"),
        element("button", "Next", type="button", id="next"),
        element("span", id="status", role="status"),
        class_="pager", hidden=True, data_needs_script=True,
    )  # fmt: skip


def _table(units: tuple[UnitSummary, ...], order: dict[str, int], figures: _Figures) -> Html:
    heads = [
        element(
            "th",
            element("button", words, type="button"),
            scope="col",
            class_=kind or None,
            data_key=key,
            data_first=first,
        )
        for key, words, kind, first in figures.columns
    ]
    rows = [_row(unit, order[unit.sentence], figures) for unit in units]
    return element(
        "table",
        element(
            "caption", "Choose a heading to sort; intervals are bootstrap 95 % intervals over test windows."
        ),
        element("thead", element("tr", heads)),
        element("tbody", rows),
        class_="units",
        data_main=figures.main[0],
    )


def _row(unit: UnitSummary, alphabetical: int, figures: _Figures) -> Html:
    place = unit.unit
    # A number that sorts by layer and then by index.
    rank = place.layer * 10**9 + place.index
    link = element("a", f"layer {place.layer} · {place.kind} {place.index}", href=f"{unit.path}/index.html")
    whose = element("small", place.dictionary) if place.dictionary else None
    judged = {one.scorer: one.score for one in unit.judged}
    offline = [
        _bar(unit.scores.get("correlation")),
        _figure(_value(_control(unit)), decimals, "n optional"),
        _figure(_value(unit.scores.get("detection_auc")), decimals),
    ]
    return element(
        "tr",
        element("td", link, whose, data_v=rank),
        element("td", sentence_html(unit.sentence), class_="text", data_v=alphabetical),
        offline if figures.offline else None,
        [
            _figure(_value(judged.get(name)), decimals) if figures.offline else _bar(judged.get(name))
            for name in figures.scorers
        ],
        element("td", percent(unit.density), data_v=unit.density, class_="n"),
        _figure(unit.maximum, number, "n optional"),
        _figure(_value(unit.loss_change), signed, "n optional"),
        data_layer=place.layer,
    )


def _bar(score: Score | None) -> Html:
    """A score with its interval, and a bar as long as it is."""
    value, low = _value(score), _low(score)
    interval = f"[{decimals(low)}, {decimals(score.high)}]" if score is not None and low is not None else None
    filled = 0 if value is None else max(0, min(20, round(20 * value)))
    return element(
        "td", decimals(value), element("small", interval) if interval else None, data_v=value,
        class_=f"bar b{filled}" if filled else None,
    )  # fmt: skip


def _figure(value: float | None, words: Callable[[float | None], str], kind: str = "n") -> Html:
    return element("td", words(value), data_v=value, class_=kind)


def _control(unit: UnitSummary) -> Score | None:
    return unit.controls.get("another_unit", {}).get("correlation")


def _value(score: Score | None) -> float | None:
    return None if score is None else score.value


def _low(score: Score | None) -> float | None:
    return None if score is None else score.low
