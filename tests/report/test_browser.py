"""The pages in a real browser: they open silently, sort, filter, turn pages, and answer to the keyboard."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.files.atomic import write_text_atomic
from neuron_lens.report import index_page, unit_page, write_pages
from neuron_lens.report import pages as pages_module
from neuron_lens.report.html import document
from neuron_lens.report.index import index_body
from neuron_lens.report.unit import unit_body

from .browser import Opened, find_browser, open_page
from .parsing import Node
from .samples import many_results, unit_result

pytestmark = pytest.mark.browser

BROWSER = find_browser()


@pytest.fixture(scope="module")
def browser() -> str:
    if BROWSER is None:
        pytest.skip(
            "NO BROWSER: the report's pages were NOT tested in one; install Debian's package 'chromium'"
        )
    return BROWSER


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pages(many_results(230), tmp_path_factory.mktemp("report"))


def rows(opened: Opened) -> list[Node]:
    return opened.root.find("tbody")[0].find("tr")


def column(opened: Opened, place: int) -> list[float | None]:
    cells = [row.find("td")[place].attributes.get("data-v") for row in rows(opened)]
    return [None if cell is None else float(cell) for cell in cells]


def status(opened: Opened) -> str:
    return next(node for node in opened.root.walk() if node.attributes.get("id") == "status").text()


def open_driven(browser: str, folder: Path, body: str, driver: str) -> Opened:
    """A page whose script is followed by a `driver` that plays the user."""
    style, script = (pages_module._asset(name) for name in ("style.css", "page.js"))
    path = folder / "driven.html"
    write_text_atomic(path, document("driven", body, style=style, script=script + driver))  # type: ignore[arg-type]
    return open_page(browser, path)


def test_the_index_opens_silently_with_controls_and_one_page_of_rows(browser: str, report: Path) -> None:
    opened = open_page(browser, report)
    assert opened.console == []
    assert len(rows(opened)) == 200 and status(opened) == "230 of 230 units, page 1 of 2"
    assert not any("hidden" in node.attributes for node in opened.root.find("form", "controls"))


@pytest.mark.parametrize("direction", ["asc", "desc"])
def test_a_hash_sorts_and_what_is_missing_comes_last(browser: str, report: Path, direction: str) -> None:
    opened = open_page(browser, report, f"sort=correlation&dir={direction}&layer=1")
    values = column(opened, 2)
    known = [value for value in values if value is not None]
    assert known == sorted(known, reverse=direction == "desc") and len(known) > 50
    assert values[: len(known)] == known and len(values) > len(known)
    headers = {
        node.attributes["data-key"]: node.attributes.get("aria-sort") for node in opened.root.find("th")
    }
    expected = {"asc": "ascending", "desc": "descending"}[direction]
    assert [key for key, value in headers.items() if value] == [
        "correlation"
    ] and expected in headers.values()
    assert opened.console == []


def test_a_hash_filters_by_words_layer_and_score(browser: str, report: Path) -> None:
    opened = open_page(browser, report, "q=SELF+fires&layer=2&min=0.5&sort=auc")
    shown = rows(opened)
    everything = open_page(browser, report, "page=2")
    assert 0 < len(shown) < 200 and status(opened) == f"{len(shown)} of 230 units"
    for row, value in zip(shown, column(opened, 2), strict=True):
        assert (
            "self" in row.text() and row.text().startswith("layer 2") and value is not None and value >= 0.5
        )
    assert len(rows(everything)) == 30 and status(everything) == "230 of 230 units, page 2 of 2"


def test_a_hash_that_makes_no_sense_shows_the_whole_table(browser: str, report: Path) -> None:
    opened = open_page(browser, report, "sort=%3Cscript%3E&page=99&dir=up")
    assert opened.console == [] and len(rows(opened)) == 30


def test_headings_and_fields_answer(browser: str, tmp_path: Path) -> None:
    results = many_results(40)
    body = index_body(pages_module._gather(results))
    driver = """
const press = () => document.querySelector("th[data-key=correlation] button").click();
press(); press();
const field = document.getElementById("query");
field.value = "digits";
field.dispatchEvent(new Event("input"));
"""
    opened = open_driven(browser, tmp_path, body, driver)
    values = [value for value in column(opened, 2) if value is not None]
    assert values == sorted(values) and len(values) > 1
    assert all("digits" in row.text() for row in rows(opened))
    assert opened.console == []


def test_a_unit_page_opens_silently(browser: str, report: Path) -> None:
    for path in sorted(report.parent.glob("units/*/index.html"))[:1]:
        opened = open_page(browser, path)
        assert opened.console == [] and len(opened.root.find("h1")) == 1


def test_a_unit_opens_from_the_index(browser: str, report: Path, tmp_path: Path) -> None:
    write_pages(results := many_results(3), tmp_path)
    body = index_body(pages_module._gather(results))
    opened = open_driven(browser, tmp_path, body, 'document.querySelector("tbody a").click();')
    assert opened.root.find("h1")[0].text() == "Neuron 0 of layer 1" and opened.console == []


def test_arrow_keys_read_a_window(browser: str, tmp_path: Path) -> None:
    driver = """
const text = document.querySelector(".tokens[tabindex]");
text.focus();
for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"])
  text.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
"""
    opened = open_driven(browser, tmp_path, unit_body(unit_result(), index_href=None), driver)
    readout = next(node for node in opened.root.walk() if node.attributes.get("id") == "readout").text()
    second = opened.root.find("div", "tokens")[0].find("i")[1]
    assert "here" in (second.attributes["class"] or "") and readout.endswith(str(second.attributes["title"]))


def test_hostile_text_does_nothing(browser: str, tmp_path: Path) -> None:
    attack = (
        "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"
    )
    result = unit_result(sentence=attack)
    for name, source in (("unit.html", unit_page(result)), ("index.html", index_page([result]))):
        write_text_atomic(tmp_path / name, source)
        opened = open_page(browser, tmp_path / name)
        assert "broken" not in opened.root.find("title")[0].text() and opened.console == []
        assert not opened.root.find("img") and attack in opened.root.text()


def test_a_script_that_is_not_ours_is_blocked(browser: str, tmp_path: Path) -> None:
    source = unit_page(unit_result(small=True)).replace(
        "</main>", "<script>document.title='broken'</script></main>"
    )
    write_text_atomic(tmp_path / "unit.html", source)
    opened = open_page(browser, tmp_path / "unit.html")
    assert "broken" not in opened.root.find("title")[0].text()
    assert any(
        "Content Security Policy" in line for line in opened.console
    )  # and console lines are seen at all


@pytest.mark.slow
def test_ten_thousand_units_stay_quick(browser: str, tmp_path: Path) -> None:
    run = pages_module._gather(many_results(50))
    units = [
        unit.model_copy(update={"unit": unit.unit.model_copy(update={"index": place * 50 + unit.unit.index})})
        for place in range(200)
        for unit in run.units
    ]
    path = tmp_path / "index.html"
    write_text_atomic(path, index_page(run.model_copy(update={"units": tuple(units)})))
    opened = open_page(browser, path, "sort=correlation&q=self")
    assert len(rows(opened)) == 200 and opened.console == []
