"""Results -> HTML pages, whole or as files in a run folder.

A run folder gets `index.html`, and `units/<name>/index.html` beside each unit's `result.json`. Pages are
written under a temporary name and renamed; the index comes last, so that it never links to a missing page.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from neuron_lens.errors import RequestError
from neuron_lens.explain.result import RunResult, UnitResult
from neuron_lens.files.atomic import write_text_atomic
from neuron_lens.report.autoencoder import autoencoder_body
from neuron_lens.report.html import document
from neuron_lens.report.index import index_body
from neuron_lens.report.unit import unit_body

__all__ = [
    "autoencoder_page",
    "index_page",
    "link_pages",
    "unit_page",
    "write_index",
    "write_pages",
    "write_unit_page",
]

PAGE = "index.html"


def unit_page(result: UnitResult, *, index_href: str | None = None, linked: Collection[str] = ()) -> str:
    """The page of one unit, complete in itself.

    Args:
        index_href: a relative link to the list of units; None for a page that stands alone.
        linked: names of similar units whose pages lie in folders of that name beside this page's.
    """
    title = f"{result.unit} of {result.model.name}".replace(" of layer ", ", layer ")
    body = unit_body(result, index_href=index_href, linked=linked)
    return document(title, body, style=_asset("style.css"), script=_asset("page.js"))


def autoencoder_page(evaluation: Mapping[str, Any]) -> str:
    """The page of an autoencoder's evaluation, complete in itself; its fields as `sae evaluate` writes them to JSON."""
    body = autoencoder_body(evaluation)
    title = f"Autoencoder of {evaluation['model']}"
    return document(title, body, style=_asset("style.css"), script=_asset("page.js"))


def index_page(results: RunResult | Iterable[UnitResult]) -> str:
    """The page that lists the units; its links are relative to the folder it is written to.

    Raises:
        RequestError: there are no units, or they come from different models or runs.
    """
    run = results if isinstance(results, RunResult) else _gather(results)
    if not run.units:
        raise RequestError("a report needs at least one explained unit; this run has none")
    body = index_body(run)
    return document(f"Units of {run.model.name}", body, style=_asset("style.css"), script=_asset("page.js"))


def write_unit_page(result: UnitResult, run_folder: str | os.PathLike[str]) -> Path:
    """Write one unit's page into its folder of the run and return its path.

    Similar units whose pages are there already are links; `link_pages` adds those of pages written later.

    Raises:
        RequestError: the folder cannot be written to.
    """
    path = Path(run_folder) / result.summary().path / PAGE
    linked = _with_pages(result, Path(run_folder))
    write_text_atomic(path, unit_page(result, index_href=f"../../{PAGE}", linked=linked))
    return path


def link_pages(results: Iterable[UnitResult], run_folder: str | os.PathLike[str]) -> int:
    """Write those pages again that lack a link to a similar unit whose page is there by now; return how many.

    Raises:
        RequestError: the folder cannot be written to.
    """
    folder, count = Path(run_folder), 0
    for result in results:
        path = folder / result.summary().path / PAGE
        linked = _with_pages(result, folder)
        if not linked or not path.is_file():
            continue
        page = path.read_text(encoding="utf-8")
        if not all(f'href="../{name}/{PAGE}"' in page for name in linked):
            write_unit_page(result, folder)
            count += 1
    return count


def _with_pages(result: UnitResult, folder: Path) -> set[str]:
    """Names of the units similar to this one that have a page in a run folder."""
    names = {one.unit.name for one in result.similar} - {result.unit.name}
    return {name for name in names if (folder / "units" / name / PAGE).is_file()}


def write_index(results: RunResult | Iterable[UnitResult], run_folder: str | os.PathLike[str]) -> Path:
    """Write the index of a run and return its path.

    Raises:
        RequestError: as `index_page`, or the folder cannot be written to.
    """
    path = Path(run_folder) / PAGE
    write_text_atomic(path, index_page(results))
    return path


def write_pages(results: Iterable[UnitResult], out_dir: str | os.PathLike[str]) -> Path:
    """Write a page for each unit, then the index, and return the index's path.

    `results` is read once and only summaries are kept, so a generator over thousands of units is fine. A page links to
    similar units whose pages are there when it is written; `link_pages`, afterwards, adds the others.

    Raises:
        RequestError: there are no units, two are the same, they come from different models or runs, or the
            folder cannot be written to.
    """

    def written() -> Iterable[UnitResult]:
        for result in results:
            write_unit_page(result, out_dir)
            yield result

    return write_index(_gather(written()), out_dir)


def _gather(results: Iterable[UnitResult]) -> RunResult:
    """The run that these units make up, in order of layer and index."""
    first: UnitResult | None = None
    summaries = {}
    for result in results:
        first = first or result
        if (result.model, result.run) != (first.model, first.run):
            raise RequestError(
                f"one report holds one run; {result.unit} differs from {first.unit} in its model, corpus or "
                "settings: explain them again into one folder, or write two reports"
            )
        if result.unit.name in summaries:
            raise RequestError(f"{result.unit.name} is given twice; a report holds each unit once")
        summaries[result.unit.name] = result.summary()
    if first is None:
        raise RequestError("a report needs at least one explained unit; none was given")
    return RunResult.of(first.model, first.run, summaries.values(), {})


@cache
def _asset(name: str) -> str:
    return resources.files("neuron_lens.report").joinpath(name).read_text(encoding="utf-8")
