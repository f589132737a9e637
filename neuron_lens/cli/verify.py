"""`neuron-lens verify`: hold a checkpoint, as loaded here, to Hugging Face's implementation of it."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add", "run"]


def add(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "verify",
        help="compare a checkpoint as loaded here with transformers",
        description=(
            "Compare logits, hidden states, gradients, padded rows and greedy tokens with transformers (extra hf). "
            "Exit code 1 when they differ."
        ),
    )
    parser.add_argument("model", metavar="PATH", help="a checkpoint folder, or a shipped or hub name")
    parser.add_argument("--length", type=int, default=24, help="tokens of the longest prompt (default: 24)")
    parser.add_argument("--new-tokens", type=int, default=8, help="greedy tokens to generate (default: 8)")
    parser.add_argument("--seed", type=int, default=0, help="of the random prompts (default: 0)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="in standard deviations of the numbers compared (default: 1e-4)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the differences; 0 when they are within the tolerance, else 1."""
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
