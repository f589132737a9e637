#!/usr/bin/env python3
"""How well the units of a run are explained: a table by layer, and a figure of the test correlations.

neuron-lens explain pico --layer 2 --all && neuron-lens explain pico --layer 3 --all
python scripts/score_distribution.py explanations/pico --layers 2 3 --figure model_defs/pico/scores.svg
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neuron_lens.explain.result import RunResult, UnitSummary
from neuron_lens.files.atomic import write_text_atomic

LEVEL = 0.5  # a unit counts as explained when its interval lies above this
BINS = 24
_TEXT = 'font-family="sans-serif" font-size="10" fill="#777"'


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, with its run.json")
    parser.add_argument("--layers", type=int, nargs="+", help="only these layers")
    parser.add_argument("--figure", type=Path, help="where to write the SVG")
    arguments = parser.parse_args()
    run = RunResult.read(arguments.run / "run.json")
    layers = arguments.layers or sorted({unit.unit.layer for unit in run.units})
    units = [unit for unit in run.units if unit.unit.layer in layers]
    print(table(units, layers))
    if arguments.figure:
        write_text_atomic(arguments.figure, figure(units))


def table(units: Sequence[UnitSummary], layers: Sequence[int]) -> str:
    """Markdown: for each layer, quantiles of the correlation, its controls, and how many intervals clear LEVEL."""
    lines = [
        f"| layer | neurons | scored | 10 % | median | 90 % | another's | shuffled | interval above {LEVEL} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for layer in layers:
        own = [unit for unit in units if unit.unit.layer == layer]
        low, middle, high = np.quantile(values(own), [0.1, 0.5, 0.9])
        another, shuffled = (np.median(values(own, control)) for control in ("another_unit", "shuffled"))
        lines.append(
            f"| {layer} | {len(own)} | {len(values(own))} | {low:.2f} | {middle:.2f} | {high:.2f} | {another:.2f} | "
            f"{shuffled:.2f} | {len(cleared(own))} |"
        )
    return "\n".join(lines)


def values(units: Sequence[UnitSummary], control: str | None = None) -> list[float]:
    """The correlations that there are."""
    scores = [unit.scores if control is None else unit.controls[control] for unit in units]
    return [one["correlation"].value for one in scores if one["correlation"].value is not None]


def cleared(units: Sequence[UnitSummary]) -> list[UnitSummary]:
    """The units whose whole interval lies above LEVEL."""
    return [unit for unit in units if (unit.scores["correlation"].low or 0.0) > LEVEL]


def figure(units: Sequence[UnitSummary]) -> str:
    """A histogram of the test correlations; dark where the interval clears LEVEL, and the control as a line."""
    edges = np.linspace(-0.2, 1.0, BINS + 1)
    own = np.histogram(np.clip(values(units), -0.2, 1.0), edges)[0]
    clear = np.histogram(values(cleared(units)), edges)[0]
    control = np.histogram(np.clip(values(units, "another_unit"), -0.2, 1.0), edges)[0]
    tallest = max(own.max(), control.max(), 1)
    width = 340 / BINS
    shapes = []
    for place in range(BINS):
        for count, colour in ((own[place], "#9bb7d4"), (clear[place], "#2f6690")):
            height = 140 * count / tallest
            shapes.append(
                f'<rect x="{40 + place * width:.1f}" y="{165 - height:.1f}" width="{width - 1:.1f}" '
                f'height="{height:.1f}" fill="{colour}"/>'
            )
    steps = " ".join(
        f"{40 + (place + edge) * width:.1f},{165 - 140 * control[place] / tallest:.1f}"
        for place in range(BINS)
        for edge in (0, 1)
    )
    shapes.append(f'<polyline points="{steps}" fill="none" stroke="#c1666b" stroke-width="1.5"/>')
    marks = [(at, 40 + (at + 0.2) / 1.2 * 340) for at in (0.0, 0.25, 0.5, 0.75, 1.0)]
    shapes += [f'<text x="{x:.1f}" y="178" text-anchor="middle" {_TEXT}>{at:g}</text>' for at, x in marks]
    said = f"{len(cleared(units))} of {len(units)} neurons: interval above {LEVEL}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 200" role="img">'
        f"<title>{said}</title>{''.join(shapes)}"
        f'<text x="40" y="14" {_TEXT}>{said} (dark); line: another neuron\'s explanation</text>'
        f'<text x="210" y="194" text-anchor="middle" {_TEXT}>test correlation</text>'
        f'<text x="36" y="30" text-anchor="end" {_TEXT}>{tallest}</text></svg>\n'
    )


if __name__ == "__main__":
    main()
