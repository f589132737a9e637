"""`neuron-lens explain`: the main job, from a model's name to explanations, scores and pages."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.cli.judge_options import add_judge_options, asked, judge_options
from neuron_lens.cli.run_options import add_unit_options, folder_of, named_units, pipeline_of, units_of

if TYPE_CHECKING:
    from neuron_lens.explain.result import RunResult, Score, UnitSummary
    from neuron_lens.records import Unit

__all__ = ["add", "print_run", "run", "summary_table"]

_COLUMNS = "{:<18}{:<22}{:>8}{:>9}{:>6}{:>8}  {}"

_JUDGED = "{:<18}{:<36}{:<24}{:>8}{:>8}{:>10}"

_EXAMPLES = """\
examples:
  neuron-lens explain                                  eight neurons of the shipped model's middle layer
  neuron-lens explain pico --layer 2 --neuron 17       one neuron
  neuron-lens explain pico --layer 2 --neurons 0:16    a range (the end is left out), or a list: 3,5,8
  neuron-lens explain pico --all                       every neuron; can be stopped and started again
  neuron-lens explain pico --sae pico --latent 42      a latent of the autoencoder that ships with pico
  neuron-lens explain gpt2 --sae folder --latents 0:64 latents of an autoencoder in any published format
  neuron-lens explain pico --layer 3 --heads 0:6       attention heads
  neuron-lens explain pico --layer 2 --directions probes.npy    vectors [width] or [n, width] of the stream
  neuron-lens explain pico --corpus src/ 'notes/*.md'  on other text
  neuron-lens explain pico --corpus rows.jsonl --text-key body  rows whose text is under another key
  neuron-lens explain pico --scorers ablate_to_simulation       does the model do the same with what the rule says?

with a judge, whose answers are kept: what was stopped goes on, and nothing is asked twice
  neuron-lens explain gpt2 --layer 6 --neurons 0:64 --explainer max_activating --scorers detection,fuzzing \\
      --judge openai:gpt-4o-mini --price 0.15,0.60 --dry-run         what it would take
  …                              --price 0.15,0.60 --budget 2        and no more than that
  neuron-lens explain pico --scorers detection --judge openai:qwen2.5@http://localhost:8000/v1
"""


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "explain",
        help="explain neurons, heads, latents and directions: sentences, scores, causal effects, pages",
        description="Explain neurons, attention heads, latents and directions. Runs offline, on any text, without a key.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_unit_options(parser)
    add_judge_options(parser, explains=True)
    parser.add_argument("--no-pages", action="store_true", help="write no HTML")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Explain what was asked for, print the table and where the pages are."""
    named_units(arguments)  # refused before anything is loaded
    options = judge_options(arguments)
    out = folder_of(arguments)
    pipeline = pipeline_of(arguments, out, pages=not arguments.no_pages, **options)
    units = units_of(pipeline, arguments)
    result = asked(pipeline, units, arguments)
    if isinstance(result, int):
        return result
    print_run(result, {unit.name for unit in units}, out, pages=not arguments.no_pages)
    return 0


def print_run(result: RunResult, wanted: set[str], out: Path, *, pages: bool) -> None:
    """The table of the units wanted, what could not be explained, and where everything is."""
    print(summary_table(result, wanted, width=shutil.get_terminal_size((110, 24)).columns))
    for name, reason in result.unexplained.items():
        if name in wanted:
            print(f"{name}: no explanation: {reason}")
    for line in _unanswered([row for row in result.units if row.unit.name in wanted], out):
        print(line, file=sys.stderr)
    _print_paths(result, wanted, out, pages=pages)


def summary_table(result: RunResult, wanted: set[str], width: int = 110, limit: int = 40) -> str:
    """A table of the units with their scores beside the controls, each with its explanation below.

    `wanted` are the names of the units shown; above `limit` of them only the distribution is printed.
    """
    rows = [row for row in result.units if row.unit.name in wanted]
    facts = result.run
    lines = [
        f"{result.model.name} on {facts.corpus}: {facts.n_documents} documents, {facts.n_tokens:,} tokens"
    ]
    if len(rows) > limit:
        return "\n".join([*lines, *_distributions(rows)])
    lines.append("")
    if any(row.judged or row.unscored or not row.scores for row in rows):
        return "\n".join([*lines, *_judged_rows(rows, width)])
    lines.append(
        _COLUMNS.format(
            "unit", "correlation (95 %)", "another", "shuffled", "AUC", "fires", "loss if ablated"
        )
    )
    for row in rows:
        another, shuffled = (row.controls[name]["correlation"] for name in ("another_unit", "shuffled"))
        lines.append(
            _COLUMNS.format(
                _title(row.unit),
                _interval(row.scores["correlation"]),
                _value(another),
                _value(shuffled),
                _value(row.scores["detection_auc"]),
                f"{row.density:.2%}",
                "-" if row.loss_change is None else _interval(row.loss_change, "+.3f"),
            )
        )
        lines.extend(textwrap.wrap("    " + row.sentence, max(width, 44), subsequent_indent="    "))
    return "\n".join(lines)


def _judged_rows(rows: list[UnitSummary], width: int) -> list[str]:
    """A line a scorer, beside the same figure for an explanation that should not work."""
    lines = [_JUDGED.format("unit", "figure", "score (95 %)", "control", "chance", "coverage")]
    for row in rows:
        title = _title(row.unit)
        figures = [("correlation", row.scores["correlation"], _another(row), 0.0)] if row.scores else []
        figures += [(f"{one.scorer} {one.figure}", one.score, one.control, one.chance) for one in row.judged]
        for name, score, control, chance in figures:
            beside = "-" if control is None else _value(control)
            lines.append(
                _JUDGED.format(
                    title, name, _interval(score), beside, f"{chance:.2f}", f"{score.coverage:.0%}"
                )
            )
            title = ""
        if row.unscored:
            lines.append(_JUDGED.format(title, f"does not apply: {', '.join(row.unscored)}", "", "", "", ""))
        lines.extend(textwrap.wrap("    " + row.sentence, max(width, 44), subsequent_indent="    "))
    return lines


def _title(unit: Unit) -> str:
    """Directions are told apart by their names, not by their numbers, which are all 0."""
    if unit.kind == "direction":
        title = f"L{unit.layer} {unit.dictionary.rpartition('-')[0]}"
        return title if len(title) < 18 else f"{title[:7]}…{title[-9:]}"  # their ends differ
    return f"L{unit.layer} {unit.kind} {unit.index}"


def _another(row: UnitSummary) -> Score | None:
    return row.controls.get("another_unit", {}).get("correlation")


def _distributions(rows: list[UnitSummary]) -> list[str]:
    """How many units reach what, by the lower end of the interval: a line a figure."""
    figures: dict[str, list[Score]] = {}
    for row in rows:
        for name, score in row.scores.items():
            if name == "correlation":
                figures.setdefault(name, []).append(score)
        for one in row.judged:
            figures.setdefault(f"{one.scorer} {one.figure}", []).append(one.score)
    return [_distribution(name, scores) for name, scores in figures.items()]


def _distribution(name: str, scores: list[Score]) -> str:
    known = [score for score in scores if score.low is not None]
    reached = ", ".join(
        f"{sum(score.low is not None and score.low > level for score in known)} above {level}"
        for level in (0.25, 0.5, 0.75)
    )
    return f"{name}: {len(scores)} units, {len(known)} with a score; lower end of the interval: {reached}"


def _interval(score: Score, form: str = ".2f") -> str:
    if score.value is None or score.low is None or score.high is None:
        return "-"
    return f"{score.value:{form}} [{score.low:{form}}, {score.high:{form}}]"


def _value(score: Score) -> str:
    return "-" if score.value is None else f"{score.value:.2f}"


def _unanswered(rows: list[UnitSummary], out: Path) -> list[str]:
    """A line a scorer to which no answer came at all, with the reasons: a judge that is not there, for one."""
    from neuron_lens.explain.result import UnitResult

    units: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {}
    for row in rows:
        silent = {one.scorer for one in row.judged if one.score.coverage == 0}
        units.update(silent)
        for judged in UnitResult.read(out / row.path / "result.json").judged if silent else ():
            if judged.scorer in silent:
                reasons.setdefault(judged.scorer, Counter()).update(judged.missing)
    return [
        f"neuron-lens: {scorer}: no answer came for {count} of {len(rows)} units, their scores are missing "
        f"({', '.join(f'{n} {kind}' for kind, n in reasons[scorer].items()) or 'nothing was asked'}); see that the judge "
        "answers, and give the same command again"
        for scorer, count in units.items()
    ]


def _print_paths(result: RunResult, wanted: set[str], out: Path, *, pages: bool) -> None:
    shown = [row for row in result.units if row.unit.name in wanted]
    first = shown[0]
    file = "index.html" if pages else "result.json"
    print(f"\nresults: {out / 'run.json'}")
    print(
        f"{'page' if pages else 'unit'}: {out / first.path / file}"
        + (f" (and {len(shown) - 1} more)" if len(shown) > 1 else "")
    )
    if pages:
        print(f"index: {out / 'index.html'}")
    sys.stdout.flush()
