"""The windows of a unit's page: its activation in text, the true one above the simulated one."""

from __future__ import annotations

from collections.abc import Sequence

from neuron_lens.explain.result import ScoredWindow, UnitResult
from neuron_lens.records import QuantileStratum, TokenWindow
from neuron_lens.report.heatmap import legend, token_spans, visible_text
from neuron_lens.report.html import Html, element, fragment
from neuron_lens.report.words import number

__all__ = ["windows_section"]

# A page shows this many windows of a group: thousands of pages should stay small. result.json holds all.
TEST_WINDOWS_SHOWN = 8
TRAINING_WINDOWS_SHOWN = 8
STRATUM_WINDOWS_SHOWN = 2

STRATUM_WORDS = {
    "top": ("Test windows with the strongest activations", "held out"),
    "quantile": ("Test windows across the range", "held out, from strong to weak"),
    "random": ("Test windows at random", "held out, as the text comes"),
}


def windows_section(result: UnitResult) -> Html:
    """Held-out windows with the simulation, then training windows; all on one scale, the unit's extreme."""
    scale = max(abs(result.statistics.maximum), abs(result.statistics.minimum))
    simulated = any(window.simulated is not None for window in result.test_windows)
    groups = [_test_group(stratum, result.test_windows, scale, simulated) for stratum in STRATUM_WORDS]
    strongest = sorted(result.train_top, key=lambda window: -window.max_activation)
    shown = [_window(window, scale) for window in strongest[:TRAINING_WINDOWS_SHOWN]]
    note = _count(len(shown), len(strongest))
    groups.append(_group("Training windows with the strongest activations", note, [_grid(shown)]))
    groups.append(_strata(result.strata, scale))
    hint = "Point at a token for its figures, or focus a window and use the arrow keys."
    return fragment(
        element("h2", "In text"),
        legend(scale, simulated=simulated),
        element("p", hint, class_="note"),
        groups,
    )


def _test_group(stratum: str, windows: Sequence[ScoredWindow], scale: float, simulated: bool) -> Html | None:
    """`simulated`: whether there is a simulation at all, so that a window without one misses it."""
    title, note = STRATUM_WORDS[stratum]
    scored = [window for window in windows if window.stratum == stratum]
    if stratum == "top":
        scored.sort(key=lambda window: -window.window.max_activation)
    shown = scored[:TEST_WINDOWS_SHOWN]
    if stratum == "quantile":
        scored.sort(key=lambda window: -window.window.max_activation)
        shown = scored[:: max(1, len(scored) // TEST_WINDOWS_SHOWN)][:TEST_WINDOWS_SHOWN]
    drawn = [_window(window.window, scale, window if simulated else None) for window in shown]
    words = f"{note}; {_count(len(shown), len(scored))}"
    return _group(title, words, [_grid(drawn)] if drawn else [], opened=stratum == "top")


def _strata(strata: Sequence[QuantileStratum], scale: float) -> Html | None:
    parts = []
    for stratum in sorted(strata, key=lambda stratum: -stratum.index):
        drawn = [_window(window, scale) for window in stratum.windows[:STRATUM_WINDOWS_SHOWN]]
        count = _count(len(drawn), len(stratum.windows))
        title = f"Peak from {number(stratum.low)} to {number(stratum.high)} "
        heading = element("h3", title, element("span", f"({count})", class_="note"))
        parts.append(fragment(heading, _grid(drawn)))
    return _group("Training windows by strength", f"{len(strata)} strata of equal count", parts)


def _group(title: str, note: str, content: Sequence[Html], *, opened: bool = False) -> Html | None:
    if not content:
        return None
    summary = element("summary", title, " ", element("span", f"({note})", class_="note"))
    return element("details", summary, content, open=opened)


def _grid(windows: Sequence[Html]) -> Html:
    return element("div", windows, class_="windows")


def _count(shown: int, total: int) -> str:
    return f"{shown} of {total} shown" if shown < total else f"all {total} shown"


def _window(window: TokenWindow, scale: float, scored: ScoredWindow | None = None) -> Html:
    simulated: Sequence[float | None] | None = None
    if scored is not None:
        simulated = scored.simulated if scored.simulated is not None else [None] * len(window.tokens)
    peak = max(range(len(window.tokens)), key=window.activations.__getitem__)
    peak_words = f"peak {number(window.activations[peak])}"
    place = f"{window.document}, token {window.start:,}"
    missing = "; no prediction was obtained" if scored is not None and scored.simulated is None else ""
    at = element("code", visible_text(window.tokens[peak]))
    before = element("span", "…", "".join(window.preceding), class_="before") if window.preceding else None
    spans = token_spans(window.tokens, window.activations, simulated, scale=scale)
    spoken = f"Window of {place}: {peak_words}"
    return element(
        "figure",
        element("figcaption", element("strong", peak_words), " at ", at, f" · {place}{missing}"),
        element("div", before, spans, class_="tokens", tabindex=0, role="group", aria_label=spoken),
        class_="window",
    )
