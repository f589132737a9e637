"""Pages of units that a judge explained and scored: every figure beside its controls, in words and in a browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.explain.result import UnitResult
from neuron_lens.report import index_page, unit_page, write_pages
from neuron_lens.report.pages import _gather, link_pages

from .browser import open_page
from .parsing import page
from .samples import judged_result, many_results
from .test_browser import browser, column, rows, status
from .test_pages import assert_self_contained

__all__ = ["browser"]  # a fixture


def test_a_page_holds_every_score_with_its_controls() -> None:
    result = judged_result()
    root = page(unit_page(result, index_href="../../index.html"))
    text = root.find("main")[0].text()
    for words in (
        "Detection: balanced accuracy", "0.900", "[0.86, 0.94]", "another unit's explanation", "shuffled",
        "10 calls to openai words", "1 refused", "detection@0123456789ab", "levels were compared with activations",
        "By strength", "attention_pairs", "no pairs of tokens", "missing: it was refused", "chosen",
        "What token statistics say", "Units that are active with it", "neuron 3", "not computed",
    ):  # fmt: skip
        assert words in text, words
    assert_self_contained(root)
    assert UnitResult.model_validate_json(result.model_dump_json()) == result


def test_a_window_misses_a_simulation_only_where_there_is_one() -> None:
    assert "no prediction was obtained" in page(unit_page(judged_result())).text()
    assert "no prediction was obtained" not in page(unit_page(judged_result(simulated=False))).text()


def test_similar_units_are_links_where_they_have_a_page(tmp_path: Path) -> None:
    """Made results say they are similar to neuron 3, whose page is written after that of neuron 1."""
    first, third = judged_result(1), judged_result(3)
    write_pages([first], tmp_path)
    path = tmp_path / first.summary().path / "index.html"
    assert link_pages([first], tmp_path) == 0 and "../layer2_neuron3/" not in path.read_text()
    write_pages([first, third], tmp_path)
    assert link_pages([first, third], tmp_path) == 1 and link_pages([first, third], tmp_path) == 0
    (link,) = [
        node for node in page(path.read_text()).find("a") if node.attributes["href"].startswith("../layer")
    ]
    assert link.text() == "neuron 3" and (path.parent / link.attributes["href"]).is_file()
    assert "../layer2_neuron3/" not in (tmp_path / third.summary().path / "index.html").read_text()


def test_results_of_before_can_be_read() -> None:
    plain = many_results(1)[0].model_dump(mode="json")
    for name in ("judged", "unscored", "baseline", "similar"):
        plain.pop(name)
    for name in ("prompt", "backend", "candidates", "chosen_by", "another"):
        plain["explanation"].pop(name)
    assert UnitResult.model_validate(plain) == many_results(1)[0]


def test_the_index_shows_the_figures_there_are() -> None:
    results = [judged_result(index, level=index / 10) for index in range(1, 8)]
    root = page(index_page(results))
    keys = [node.attributes.get("data-key") for node in root.find("th")]
    assert keys == ["unit", "explanation", "detection", "simulation", "density", "maximum", "loss"]
    both = [one.model_copy(update={"judged": judged_result(level=0.7).judged[:1]}) for one in many_results(5)]
    keys = [node.attributes.get("data-key") for node in page(index_page(both)).find("th")]
    assert keys[2:6] == ["correlation", "control", "auc", "detection"]


@pytest.mark.browser
def test_judged_units_sort_and_filter(browser: str, tmp_path: Path) -> None:
    levels = [0.3, None, 0.9, 0.5, 0.7]
    index = write_pages((judged_result(i, level=level) for i, level in enumerate(levels)), tmp_path)
    opened = open_page(browser, index, "sort=detection&dir=asc")
    assert opened.console == [] and column(opened, 2) == [0.3, 0.5, 0.7, 0.9, None]
    opened = open_page(browser, index, "min=0.5&sort=simulation")
    assert opened.console == [] and column(opened, 3) == [0.9, 0.7, 0.5]
    assert status(opened) == "3 of 5 units"
    unit = open_page(browser, next(tmp_path.glob("units/*/index.html")))
    assert unit.console == [] and len(unit.root.find("h1")) == 1


@pytest.mark.browser
@pytest.mark.slow
def test_five_thousand_judged_units_stay_quick(browser: str, tmp_path: Path) -> None:
    run = _gather([judged_result(index, level=index / 50) for index in range(50)])
    units = [
        unit.model_copy(update={"unit": unit.unit.model_copy(update={"index": place * 50 + unit.unit.index})})
        for place in range(100)
        for unit in run.units
    ]
    path = tmp_path / "index.html"
    path.write_text(index_page(run.model_copy(update={"units": tuple(units)})), encoding="utf-8")
    opened = open_page(browser, path, "sort=detection&q=self&min=0.5")
    assert len(rows(opened)) == 200 and opened.console == []
    assert path.stat().st_size < 6e6
