"""The command line: `neuron-lens <command>`. One file per command, whose imports wait until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import neuron_lens
from neuron_lens.cli import explain, harvest, judge, models, report, sae, score, verify
from neuron_lens.errors import NeuronLensError

__all__ = ["main"]

# Every command module offers `add(subparsers)`, which registers it, and `run(arguments) -> int`.
_COMMANDS = {
    "harvest": harvest,
    "explain": explain,
    "score": score,
    "judge": judge,
    "report": report,
    "verify": verify,
    "models": models,
    "sae": sae,
}

_USER_ERROR = 2
_INTERRUPTED = 130  # what shells report for SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line on stderr for an error of the user's."""
    parser = argparse.ArgumentParser(prog="neuron-lens", description="Explain the parts of language models.")
    parser.add_argument("--version", action="version", version=f"neuron-lens {neuron_lens.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS.values():
        command.add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        code: int = _COMMANDS[arguments.command].run(arguments)
        return code
    except NeuronLensError as error:
        print(f"neuron-lens: error: {' '.join(str(error).split())}", file=sys.stderr)
        return _USER_ERROR
    except KeyboardInterrupt:
        print("neuron-lens: interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
