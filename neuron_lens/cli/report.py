"""`neuron-lens report`: pages, tables and other tools' files from the results in a run folder. Runs without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_lens.explain.run_folder import RunFolder

__all__ = ["add", "run"]


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "report",
        help="write a run folder's pages, a table, or files of other tools",
        description="Write the results of a run folder: html pages (they open with no network), a csv or jsonl table, "
        "OpenAI's records, or Neuronpedia's batches.",
    )
    parser.add_argument("folder", type=Path, help="a run folder: --out of neuron-lens explain")
    parser.add_argument(
        "--format", default="html", choices=["html", "csv", "jsonl", "openai", "neuronpedia"],
        help="default: html",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the run folder, or a folder in it")


def run(arguments: argparse.Namespace) -> int:
    """Write, and say where."""
    from neuron_lens.explain.run_folder import RunFolder
    from neuron_lens.llm import RequestCache

    folder, kind = RunFolder(arguments.folder), arguments.format
    folder.require_manifest()
    out = arguments.out or (folder.path if kind in ("html", "csv", "jsonl") else folder.path / kind)
    if kind == "html":
        from neuron_lens.report.pages import link_pages, write_pages

        index = write_pages(folder.results(), out)
        link_pages(folder.results(), out)
        print(f"index: {index}")
    elif kind in ("csv", "jsonl"):
        folder.run().save(out / f"units.{kind}")
        print(f"table: {out / f'units.{kind}'}")
    else:
        count = _openai(folder, out) if kind == "openai" else _neuronpedia(folder, out)
        print(f"{count} units in {out}")
    if folder.requests.is_file():
        calls, usage = RequestCache(folder.requests).spent()
        print(
            f"asked of judges in all: {calls:,} calls, {usage.prompt_tokens:,} tokens read, "
            f"{usage.completion_tokens:,} written"
        )
    return 0


def _openai(folder: RunFolder, out: Path) -> int:
    """Records and scored explanations, in the layout OpenAI published: `<kind of unit>/…/{layer}/{index}.json`."""
    from neuron_lens.explain.formats.openai_json import write_record
    from neuron_lens.explain.formats.openai_results import neuron_record, simulation_results

    count = 0
    for result in folder.results():
        unit = result.unit
        place = out / (unit.dictionary or unit.kind)
        random = [one.window for one in result.test_windows if one.stratum == "random"]
        record = neuron_record(
            unit, result.statistics, top=result.train_top, random=random, strata=result.strata
        )
        write_record(place / "collated-activations" / str(unit.layer) / f"{unit.index}.json", record)
        if any(one.simulated is not None for one in result.test_windows):
            path = place / "explanations" / str(unit.layer) / f"{unit.index}.jsonl"
            write_record(path, simulation_results(result))
        count += 1
    return count


def _neuronpedia(folder: RunFolder, out: Path) -> int:
    """A dashboard batch for each layer and dictionary, and the rows of a bulk import."""
    from neuron_lens.explain.formats.neuronpedia import dashboard_batch, write_batch
    from neuron_lens.explain.formats.neuronpedia_export import (
        ExportFolder,
        export_activations,
        export_explanation,
        export_features,
    )
    from neuron_lens.explain.result import UnitResult

    groups: dict[tuple[int, str, str], list[UnitResult]] = {}
    for result in folder.results():
        unit = result.unit
        groups.setdefault((unit.layer, unit.site, unit.dictionary or unit.kind), []).append(result)
    for (_, _, name), results in groups.items():
        batch = dashboard_batch(results, sae_set=name)
        export = ExportFolder(out, batch.model_id, batch.source_id)
        write_batch(export.path / "batch-0.json", batch)
        export.write(0, export_features(batch))
        export.write(0, export_activations(batch))
        export.write(
            0, [export_explanation(one, batch, model=one.explanation.backend or None) for one in results]
        )
    return sum(map(len, groups.values()))
