"""`neuron-lens score`: score the explanations a run folder holds, by a judge or without one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from neuron_lens.cli.explain import print_run
from neuron_lens.cli.judge_options import add_judge_options, asked, judge_options
from neuron_lens.cli.run_options import pipeline_of_folder
from neuron_lens.errors import RequestError

__all__ = ["add", "run"]

_EXAMPLES = """\
examples:
  neuron-lens explain pico --layer 2 --neurons 0:16 --out run
  neuron-lens score run --scorers detection,fuzzing --judge openai:MODEL@http://localhost:8000/v1
  neuron-lens score run --scorers ablate_to_simulation     without a judge: the rules of token statistics simulate
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "score",
        help="score the explanations of a run folder, by a judge or without one",
        description="Score every explanation of a run folder. Scores that are there already are not made again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a run folder: --out of neuron-lens explain")
    add_judge_options(parser, explains=False)
    parser.add_argument("--no-pages", action="store_true", help="write no HTML")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Score, and print the table."""
    from neuron_lens.explain.run_folder import RunFolder

    options = judge_options(arguments)
    if not options["scorers"]:
        raise RequestError("name at least one scorer: --scorers detection,fuzzing")
    folder = RunFolder(arguments.folder)
    folder.require_manifest()
    units = [summary.unit for summary in folder.run().units]
    pipeline = pipeline_of_folder(
        arguments.folder,
        explainer=None,
        pages=not arguments.no_pages,
        progress=not arguments.quiet,
        **options,
    )
    result = asked(pipeline, units, arguments)
    if isinstance(result, int):
        return result
    print_run(result, {unit.name for unit in units}, arguments.folder, pages=not arguments.no_pages)
    return 0
