#!/usr/bin/env python3
"""How explanations and their scores relate to a known truth: units that fire on one lexical class of Python tokens.

neuron-lens explain pico --layer 2 --neurons 0:768 && python scripts/lexical_truth.py explanations/pico

For every unit of a run, the rule "it fires exactly on tokens of class c" is tried for every class, on the
training windows of the harvest; the best is measured on the test windows by its balanced accuracy, which is
the area under the curve of a yes-or-no rule (0.5: chance). Python's own tokenizer says what the classes are, not a
model. Units are grouped by how true their rule is; for each group the table says how often the explanation's
sentence names the class (and how often the next unit's does, as the control), and what scores it has.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.result import RunResult, UnitSummary
from neuron_lens.harvest.shard import LayerHarvest
from neuron_lens.records import Unit

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """What is true of one unit: the class whose rule fits it best, and how well that does on new text."""

    summary: UnitSummary
    lexical_class: str
    auc: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, with its run.json and harvest")
    parser.add_argument("--layers", type=int, nargs="+", help="only these layers")
    parser.add_argument("--kind", choices=["neuron", "latent", "head"], default="neuron")
    arguments = parser.parse_args()
    run = RunResult.read(arguments.run / "run.json")
    chosen = [
        one
        for one in run.units
        if one.unit.kind == arguments.kind and (not arguments.layers or one.unit.layer in arguments.layers)
    ]
    if not chosen:
        raise SystemExit(f"{arguments.run} holds no {arguments.kind} of these layers")
    print(table([truth(one, arguments.run) for one in chosen]))


def truth(summary: UnitSummary, run: Path) -> Truth:
    """The best class of a unit, and its figure on the test windows."""
    harvest = _harvest(run, summary.unit)
    kept, windows = harvest.unit(summary.unit.index), harvest.windows
    rows = kept.random_rows
    classes = windows.columns["lexical_class"][rows, windows.context : windows.context + windows.length]
    present, split = windows.present[rows], windows.split[rows]
    firing = kept.random > threshold(kept.random[split == 0])
    parts = [present & (split == part)[:, None] for part in (0, 2)]
    names = windows.names["lexical_class"]
    accuracies = rule_accuracies(firing[parts[0]], classes[parts[0]], len(names))
    best = int(np.nanargmax(np.where(np.isnan(accuracies), -1, accuracies)))
    return Truth(
        summary, names[best], float(rule_accuracies(firing[parts[1]], classes[parts[1]], len(names))[best])
    )


def threshold(activations: NDArray[np.float32]) -> float:
    """A quarter of the way from the smallest activation, or 0, to the largest: above it a unit fires."""
    low = max(float(activations.min()), 0.0)
    return low + 0.25 * max(float(activations.max()) - low, 0.0)


def rule_accuracies(firing: Bools, classes: NDArray[np.int32], n_classes: int) -> NDArray[np.float64]:
    """Balanced accuracy of "it fires exactly on class c" for every class; NaN where the unit never or always
    fires, or the class does not occur."""
    fires = np.bincount(classes[firing], minlength=n_classes)
    silent = np.bincount(classes[~firing], minlength=n_classes)
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = (fires / fires.sum() + 1 - silent / silent.sum()) / 2
    return np.where(fires + silent > 0, accuracy, np.nan)


def _harvest(run: Path, unit: Unit) -> LayerHarvest:
    """The harvest of a run that holds a unit."""
    for folder in sorted((run / "harvest").iterdir()):
        found = LayerHarvest.open(folder)
        wanted = {"kind": unit.kind, "layer": unit.layer, "dictionary": unit.dictionary}
        if (
            found is not None
            and wanted.items() <= found.manifest["key"].items()
            and unit.index in found.indices
        ):
            return found
    raise SystemExit(f"{run / 'harvest'} holds no harvest of {unit}; run neuron-lens explain again")


def names_class(sentence: str, lexical_class: str) -> bool:
    """Whether a sentence speaks of a class by its name."""
    return re.search(rf"\b{re.escape(lexical_class)}\b", sentence) is not None


def table(truths: Sequence[Truth]) -> str:
    """Markdown: a row for each level of truth, then how truth and scores go together over all units."""
    lines = [
        f"{len(truths)} units; rule: the unit fires exactly on one lexical class (balanced accuracy on test windows)",
        "",
        "| rule holds to | units | sentence names the class | another unit's does | detection AUC | correlation |",
        "|---|---|---|---|---|---|",
    ]
    named = np.array([names_class(one.summary.sentence, one.lexical_class) for one in truths])
    others = [*truths[1:], *truths[:1]]
    chance = np.array(
        [
            names_class(other.summary.sentence, one.lexical_class)
            for one, other in zip(truths, others, strict=True)
        ]
    )
    auc = np.array([one.auc for one in truths])
    scores = {
        name: np.array([_value(one.summary, name) for one in truths])
        for name in ("detection_auc", "correlation")
    }
    for low, high in pairwise(LEVELS):
        own = (auc >= low) & ((auc < high) | (high == 1.0)) if low > 0.5 else auc < high
        if own.any():
            medians = " | ".join(_median(scores[name][own]) for name in scores)
            said = (
                f"{'below 0.6' if low == 0.5 else f'{low} to {high}'} | {own.sum()} | {named[own].mean():.0%}"
            )
            lines.append(f"| {said} | {chance[own].mean():.0%} | {medians} |")
    for name, values in scores.items():
        lines.append(
            f"\nrank correlation of the rule's accuracy with {name}: {rank_correlation(auc, values):.2f}"
        )
    return "\n".join(lines)


def rank_correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's, over what is there in both (ties in order of appearance)."""
    known = ~(np.isnan(a) | np.isnan(b))
    if known.sum() < 3:
        return float("nan")
    ranks = [np.argsort(np.argsort(values[known], kind="stable"), kind="stable") for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _value(summary: UnitSummary, name: str) -> float:
    value = summary.scores[name].value
    return float("nan") if value is None else value


def _median(values: NDArray[np.float64]) -> str:
    known = values[~np.isnan(values)]
    return f"{np.median(known):.2f}" if len(known) else "-"


if __name__ == "__main__":
    main()
