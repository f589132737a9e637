"""`neuron-lens judge`: can this judge tell true explanations from false ones?"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.cli.arguments import whole_number
from neuron_lens.cli.judge_options import add_who, backend_of, price_of, stopped_by
from neuron_lens.errors import RequestError

if TYPE_CHECKING:
    from neuron_lens.explain.judge_check import JudgeCheck
    from neuron_lens.explain.scorers import BaseScorer

__all__ = ["add", "run"]

_EXAMPLES = """\
examples:
  neuron-lens judge openai:gpt-4o-mini --dry-run                     what it would take
  neuron-lens judge openai:qwen2.5@http://localhost:8000/v1
  neuron-lens judge local:SmolLM2-135M-Instruct --batch 1            a small judge does better with one text a call
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "judge",
        help="try a judge on units whose meaning is known",
        description="Score true and false explanations of planted units with a judge: one worth its price scores the true "
        "ones higher. Answers are kept: what was stopped goes on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_who(parser)
    parser.add_argument(
        "--scorers", default="detection,fuzzing", metavar="A,B,…",
        help="detection, fuzzing, graded_detection, graded_fuzzing, intruder, simulation, surprisal (default: the first two)",
    )  # fmt: skip
    parser.add_argument(
        "--puzzles", type=int, metavar="N", help="only the first N planted units (default: all)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="texts a call of detection and fuzzing (default: 5)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the examples drawn (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("judges"),
        metavar="DIR",
        help="for answers and results (default: judges)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Try the judge, print a table and keep the results."""
    from neuron_lens.explain.judge_check import check_judge, estimate_check
    from neuron_lens.explain.puzzles import puzzles
    from neuron_lens.files.atomic import write_json_atomic
    from neuron_lens.llm import BudgetExceeded, CachedBackend

    known = puzzles()
    count = len(known) if arguments.puzzles is None else arguments.puzzles
    if not 1 <= count <= len(known):
        raise RequestError(
            f"--puzzles {count}: there are {len(known)} planted units; give a number from 1 to that"
        )
    scorers = _scorers(arguments)
    backend = backend_of(arguments)
    assert backend is not None, "WHO is given"
    judge = CachedBackend(backend, arguments.out / "requests.sqlite")
    if arguments.dry_run:
        price = price_of(arguments.price)
        said = estimate_check(judge, scorers, chosen=known[:count], seed=arguments.seed, price=price)
        print(f"{count} planted units: {said}")
        return 0
    try:
        checks = check_judge(
            judge, scorers, chosen=known[:count], seed=arguments.seed, progress=not arguments.quiet
        )
    except BudgetExceeded as error:
        return stopped_by(error)
    print(_table(checks))
    file = arguments.out / f"{backend.kind}-{backend.model.replace('/', '-')}.json"
    write_json_atomic(file, [check.model_dump(mode="json") for check in checks])
    print(f"every puzzle: {file}")
    return 0


def _scorers(arguments: argparse.Namespace) -> list[BaseScorer]:
    from neuron_lens.explain.scorers import scorer_named
    from neuron_lens.explain.scorers.detection import BinaryScorer

    made: list[BaseScorer] = []
    for name in filter(None, map(str.strip, arguments.scorers.split(","))):
        kind = scorer_named(name)
        batched = arguments.batch is not None and issubclass(kind, BinaryScorer)
        made.append(kind(**({"batch": arguments.batch} if batched else {})))
    return made


def _table(checks: list[JudgeCheck]) -> str:
    """A line a scorer: mean figures of true and false explanations, their difference, and how often the true one won."""
    lines = [f"{checks[0].backend}, on units whose meaning is known:", ""]
    head = ("scorer", "figure", "true", "false", "difference", "true above every false", "answered", "chance")
    rows = [head]
    for check in checks:
        gain = check.gain
        between = "" if gain.low is None or gain.high is None else f" [{gain.low:.2f}, {gain.high:.2f}]"
        rows.append((
            check.scorer, check.figure, _shown(check.mean_true), _shown(check.mean_false),
            _shown(gain.value) + between, f"{check.n_first} of {len(check.puzzles)}", f"{check.coverage:.0%}",
            f"{check.chance:.2f}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"
