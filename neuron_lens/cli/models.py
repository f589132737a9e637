"""`neuron-lens models`: which families of checkpoints can be loaded, and which checkpoints come with the library."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add", "run"]

_COLUMNS = "{:<24}{:<26}{}"


def add(subparsers: Any) -> None:
    """Register the command."""
    subparsers.add_parser(
        "models",
        help="list the families of checkpoints that can be loaded",
        description="List the families of checkpoints that can be loaded: one file of model_defs/ each.",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each family."""
    from neuron_lens.loading import known_models

    print(_COLUMNS.format("family", "architecture", "examples"))
    for model in known_models():
        examples = [f"{name} (shipped)" for name in model.shipped] + list(model.examples)
        print(_COLUMNS.format(model.title, ", ".join(model.architectures), ", ".join(examples)))
    return 0
