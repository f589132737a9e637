"""The errors a user can cause, as one small tree.

    NeuronLensError (ValueError)
    ├── ConfigError       a configuration that contradicts itself or holds unknown fields
    ├── HookError         a wrong path, or a hook whose result does not fit its site
    ├── CheckpointError   files that are missing, truncated, or do not match their config
    ├── TokenizerError    text or ids a tokenizer cannot take
    ├── RequestError      a request that matches nothing, or does not fit the model or the data
    ├── BackendError      a judge backend that cannot do what was asked, or failed
    └── MissingExtraError an optional dependency is not installed; names the pip command

Every message says what was given, what was expected, and what to do. Programming mistakes inside the
library raise AssertionError or the built-in error instead; the command line turns every
`NeuronLensError` into one line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "HookError",
    "MissingExtraError",
    "NeuronLensError",
    "RequestError",
    "TokenizerError",
    "did_you_mean",
]


class NeuronLensError(ValueError):
    """Base of everything a user of the library can cause and mend."""


class ConfigError(NeuronLensError):
    """A configuration contradicts itself, or holds fields nobody reads."""


class HookError(NeuronLensError):
    """A path names no site, or a hook's result does not fit the site it is on."""


class CheckpointError(NeuronLensError):
    """A checkpoint is missing, truncated, or does not match its own config."""


class TokenizerError(NeuronLensError):
    """Text or ids that a tokenizer cannot take, or tokenizer files that cannot be read."""


class RequestError(NeuronLensError):
    """A request that matches nothing, or that does not fit the model or the data."""


class BackendError(NeuronLensError):
    """A judge backend cannot do what was asked of it, or failed for good."""


class MissingExtraError(NeuronLensError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, what_for: str) -> None:
        super().__init__(
            f"{what_for} needs the package {package!r}, which is not installed: pip install 'neuron-lens[{extra}]'"
        )


def did_you_mean(given: str, known: Iterable[str], count: int = 3) -> str:
    """A clause to end an error message with: the known names closest to `given`, or all when few."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=count, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(name) for name in close) + "?"
    if len(names) <= 12:
        return "known: " + ", ".join(names)
    return f"none of the {len(names)} known names is close"
