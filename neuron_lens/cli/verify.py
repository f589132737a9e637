"""`neuron-lens verify`: hold a checkpoint, as loaded here, to Hugging Face's implementation of it; or a run folder to
its model, by computing some of the recorded activations again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from neuron_lens.cli.arguments import not_negative, whole_number

__all__ = ["add", "run"]


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a checkpoint with transformers, or recorded activations of a run with the model",
        description=(
            "Of a run folder (--out of neuron-lens harvest and explain): compute some of the recorded activations again, "
            "and say whether they reproduce. Of a checkpoint: compare logits, hidden states, gradients, "
            "padded rows and greedy tokens with transformers (extra hf). "
            "Exit code 1 when something differs."
        ),
    )
    parser.add_argument(
        "model", metavar="PATH", help="a run folder, a checkpoint folder, or a shipped or hub name"
    )
    parser.add_argument(
        "--length", type=whole_number(3), default=24, help="tokens of the longest prompt (default: 24)"
    )
    parser.add_argument(
        "--new-tokens", type=whole_number(1), default=8, help="greedy tokens to generate (default: 8)"
    )
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the random prompts (default: 0)")
    parser.add_argument(
        "--tolerance",
        type=not_negative,
        default=1e-4,
        help="in standard deviations of the numbers compared (default: 1e-4)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the differences; 0 when they are within the tolerance, else 1."""
    from neuron_lens.explain.run_folder import RunFolder

    if RunFolder.is_one(arguments.model):
        return _verify_run(Path(arguments.model))
    from neuron_lens.loading import verify

    result = verify(
        arguments.model,
        length=arguments.length,
        new_tokens=arguments.new_tokens,
        seed=arguments.seed,
        tolerance=arguments.tolerance,
    )
    print(result)
    return 0 if result.passed else 1


def _verify_run(folder: Path) -> int:
    """Print a line a source; 0 when all recorded activations that were tried reproduce, else 1."""
    from neuron_lens.cli.run_options import pipeline_of_folder

    found = pipeline_of_folder(folder, pages=False, progress=False).verify()
    for one in found:
        print(one)
    return 0 if all(one.passed for one in found) else 1
