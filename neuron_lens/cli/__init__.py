"""The command line: `neuron-lens <command>`. One file per command, whose imports wait until it runs."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import neuron_lens
from neuron_lens.cli import explain, harvest, judge, models, report, sae, score, verify
from neuron_lens.cli.arguments import USER_ERROR, OneLineParser, error_line
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

_INTERRUPTED = 130  # what shells report for SIGINT
_PIPE_CLOSED = 141  # and for SIGPIPE

_FULL = frozenset((errno.ENOSPC, errno.EDQUOT))

_EXIT_CODES = """\
exit codes: 0 done; 1 verify found a difference; 2 an error, told in one line; 3 stopped by --budget or
--max-calls; 130 interrupted. Commands that were stopped go on when they are given again.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, or 2 with one line on stderr for an error of the user's."""
    parser = OneLineParser(
        prog="neuron-lens",
        description="Explain the parts of language models.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"neuron-lens {neuron_lens.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in _COMMANDS.values():
        command.add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        code: int = _COMMANDS[arguments.command].run(arguments)
        return code
    except NeuronLensError as error:
        print(error_line(str(error)), file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # Who reads stdout has gone (`| head`); nothing may be left to be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno not in _FULL:
            raise
        print(error_line(f"{error}; make room, and the same command goes on from here"), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("neuron-lens: interrupted; the same command goes on from here", file=sys.stderr)
        return _INTERRUPTED
