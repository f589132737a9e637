"""How options are read: an error is one line that says what was given and what was expected, never a page of usage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

__all__ = ["USER_ERROR", "OneLineParser", "error_line", "not_negative", "whole_number"]

USER_ERROR = 2  # exit code


class OneLineParser(argparse.ArgumentParser):
    """Leaves the usage to --help. Parsers of its commands are of this kind, too."""

    def error(self, message: str) -> NoReturn:
        """Say it in one line and exit with 2."""
        self.exit(USER_ERROR, error_line(f"{message}; see {self.prog} --help") + "\n")


def error_line(message: str) -> str:
    """What is printed of an error."""
    return f"neuron-lens: error: {' '.join(message.split())}"


def whole_number(least: int) -> Callable[[str], int]:
    """Reads whole numbers from `least` up."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return number

    return read


def not_negative(text: str) -> float:
    """Reads a number from 0 up."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return number
