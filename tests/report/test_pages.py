"""Pages: whole, self-contained, escaped, and true to their results."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from neuron_lens.errors import RequestError
from neuron_lens.explain.result import RunResult, UnitResult
from neuron_lens.records import Unit
from neuron_lens.report import index_page, unit_page, write_pages
from neuron_lens.report.pages import write_index

from .parsing import Node, page
from .samples import many_results, unit_result
from .test_html import HOSTILE, carried

ALLOWED_LINK = re.compile(r"(\.\./)*(units/[a-z0-9_]+/)?index\.html|#[a-z]+")


def structure(node: Node) -> list[str]:
    """The elements of a page, in order, without what they say."""
    return [inner.tag for inner in node.walk() if inner.tag not in ("b", "code")]


def assert_self_contained(root: Node) -> None:
    for node in root.walk():
        for name, value in node.attributes.items():
            assert name not in ("src", "srcset", "style", "action", "xlink:href", "ping"), (node.tag, name)
            assert not name.startswith("on"), name
            if name == "href":
                assert ALLOWED_LINK.fullmatch(value or ""), value
        assert node.tag not in ("iframe", "object", "embed", "base", "link", "img")
    for style in root.find("style"):
        assert "url(" not in style.text() and "@import" not in style.text()
    assert len(root.find("script")) == 1


def hostile_result(text: str) -> UnitResult:
    """A result with `text` wherever a model, a corpus or a judge could have put it."""
    data = unit_result(small=True).model_dump()

    def replace(value: object, name: str = "") -> object:
        if isinstance(value, dict):
            return {key: replace(inner, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [replace(inner, name) for inner in value]
        free = ("token", "tokens", "preceding", "sentence", "document", "description", "key", "title", "site")
        free += ("corpus", "fingerprint", "corpus_fingerprint", "package_version", "explainer")
        if isinstance(value, str) and name in free:
            return text.encode("utf-8", "replace").decode()  # records hold no lone surrogates
        return value

    return UnitResult.model_validate(replace(data))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HOSTILE)
def test_no_text_can_change_the_structure_of_a_page(text: str) -> None:
    text = text.replace("`", "'")  # backquotes are the sentence's own way to say: code
    plain, hostile = hostile_result("plain"), hostile_result(text)
    root = page(unit_page(hostile))
    assert structure(root) == structure(page(unit_page(plain)))
    assert_self_contained(root)
    shown = root.find("p", "sentence")[0].text()
    assert shown == carried(hostile.explanation.sentence)
    index = page(index_page([hostile]))
    assert structure(index) == structure(page(index_page([plain])))
    assert_self_contained(index)


def test_a_unit_page_holds_what_the_result_holds() -> None:
    result = unit_result()
    root = page(unit_page(result, index_href="../../index.html"))
    text = root.find("main")[0].text()
    for words in (
        "another unit's explanation",
        "shuffled",
        "0.83 [0.79, 0.87]",
        "Fires on digits inside a number.",
    ):
        assert words in text
    top = [window for window in result.test_windows if window.stratum == "top"]
    strongest = max(top, key=lambda scored: scored.window.max_activation).window
    shown = root.find("div", "tokens")[0]
    assert [node.text(without="b") for node in shown.find("i")] == list(strongest.tokens)
    assert text.count("no prediction was obtained") == 1
    assert "3.12 %" in text and result.run.corpus_fingerprint in text
    assert_self_contained(root)


def tokens_of(result: UnitResult) -> list[Node]:
    """The section of a unit's page on its weights."""
    return [one for one in page(unit_page(result)).find("section") if one.attributes["id"] == "tokens"]


def test_what_its_weights_read_stands_beside_what_they_promote() -> None:
    result = unit_result()
    tables = tokens_of(result)[0]
    heads = [node.text() for node in tables.find("h3")]
    assert heads == ["Promoted", "Suppressed", "Read"]
    shown = [node.text() for node in tables.find("table")[2].find("code")]
    assert [one.replace("·", " ").strip() for one in shown] == ["self", "cls", "this"]
    # Older results say nothing of it, some units read no single direction, some write none.
    data = result.model_dump(exclude={"reads"})
    assert UnitResult.model_validate(data).reads == ()
    alone = result.model_copy(update={"reads": ()})
    assert [node.text() for node in page(unit_page(alone)).find("h3")].count("Read") == 0
    only = result.model_copy(update={"promoted": (), "suppressed": ()})
    assert [n.text() for n in tokens_of(only)[0].find("h3")] == ["Read"]
    neither = only.model_copy(update={"reads": ()})
    assert not tokens_of(neither)
    assert UnitResult.model_validate_json(result.model_dump_json()).reads == result.reads


def test_units_of_several_dictionaries_say_which_is_theirs() -> None:
    results = []
    for name in ("sae-00000001", "sae-00000002"):
        unit = Unit(kind="latent", layer=2, index=4, site="resid.torso.post_mlp", dictionary=name)
        results.append(unit_result().model_copy(update={"unit": unit}))
    for result in results:
        crumbs = page(unit_page(result)).find("p", "crumbs")[0].text()
        assert result.unit.dictionary in crumbs
    rows = page(index_page(results)).find("tbody")[0].find("tr")
    assert [row.find("small")[0].text() for row in rows] == ["sae-00000001", "sae-00000002"]


def test_what_was_not_measured_is_said_to_be_so() -> None:
    result = unit_result(level=None, causal=False)
    text = page(unit_page(result)).text()
    assert "not computed" in text and "Not measured in this run." in text
    empty = ("controls", "promoted", "suppressed", "strata", "test_windows", "train_top")
    bare = result.model_copy(update={"scores": {}, **dict.fromkeys(empty, ())})
    assert_self_contained(page(unit_page(bare)))


def test_every_heading_label_and_drawing_can_be_read_aloud() -> None:
    for root in (page(unit_page(unit_result())), page(index_page(many_results(12)))):
        assert root.attributes["lang"] == "en" and len(root.find("h1")) == 1
        levels = [int(node.tag[1]) for node in root.walk() if re.fullmatch("h[1-6]", node.tag)]
        assert all(b - a <= 1 for a, b in pairwise(levels))
        for svg in root.find("svg"):
            assert svg.attributes.get("aria-hidden") == "true" or (svg.find("title") and svg.find("desc"))
        for field in [*root.find("input"), *root.find("select")]:
            assert any(field in label.walk() for label in root.find("label"))
        ids = [node.attributes["id"] for node in root.walk() if "id" in node.attributes]
        assert len(ids) == len(set(ids))


def test_the_index_has_a_row_a_unit_and_every_link_leads_to_a_page(tmp_path: Path) -> None:
    results = many_results(20)
    index = write_pages(iter(reversed(results)), tmp_path)
    root = page(index.read_text("utf-8"))
    rows = root.find("tbody")[0].find("tr")
    assert len(rows) == 20
    ranks = [int(row.find("td")[0].attributes["data-v"] or 0) for row in rows]
    assert ranks == sorted(ranks)
    for link in root.find("tbody")[0].find("a"):
        unit = index.parent / str(link.attributes["href"])
        back = page(unit.read_text("utf-8")).find("p", "crumbs")[0].find("a")[0]
        assert (unit.parent / str(back.attributes["href"])).resolve() == index.resolve()
    assert not list(tmp_path.rglob("*.tmp"))
    summaries = tuple(sorted((r.summary() for r in results), key=lambda s: (s.unit.layer, s.unit.index)))
    run = RunResult(model=results[0].model, run=results[0].run, units=summaries)
    before = index.read_bytes()
    assert write_index(run, tmp_path).read_bytes() == before  # from summaries alone: the same page


def test_units_with_a_high_interval_are_counted() -> None:
    results = [unit_result(index, level=level) for index, level in enumerate([0.9, 0.53, 0.55, 0.2, None])]
    cards = page(index_page(results)).find("dl", "cards")[0].find("dd")
    small = [card.find("small")[0].text() for card in cards[:2]]
    assert [card.text().removesuffix(note) for card, note in zip(cards, small, strict=False)] == ["5", "2"]


def test_reports_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least one"):
        write_pages([], tmp_path)
    with pytest.raises(RequestError, match="twice"):
        index_page([unit_result(), unit_result()])
    other = unit_result(18)
    other = other.model_copy(update={"run": other.run.model_copy(update={"seed": 1})})
    with pytest.raises(RequestError, match="one run"):
        index_page([unit_result(), other])
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(RequestError, match="cannot write"):
        write_pages([unit_result()], blocked)


def test_reports_need_no_torch_and_no_template_engine() -> None:
    code = (
        "import sys, neuron_lens.report; "
        "print([m for m in ('torch', 'jinja2', 'pandas', 'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
