"""The named conversions of config fields, for what a plain copy cannot say.

Reads both spellings of Hugging Face's files: rotary settings as `rope_theta` and `rope_scaling` (to version 4) or as
`rope_parameters` (from 5), windows by `sliding_window` and a pattern or by `layer_types`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from neuron_lens.loading.definitions import CONVERSIONS

__all__ = ["FUNCTIONS", "Fields", "MissingField"]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
_REQUIRED = object()


class MissingField(Exception):
    """A field that a definition needs is not in config.json; the message is its name."""


class Fields:
    """The fields of a config.json, remembering which were read. `known`: our fields mapped so far."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.known: Mapping[str, Any] = {}
        self._read: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value, or the default. Raises MissingField without one."""
        self._read.add(name)
        if name in self.raw:
            return self.raw[name]
        if default is _REQUIRED:
            raise MissingField(name)
        return default

    def first(self, names: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        """The value of the first of `names` that is there; all count as read."""
        self._read.update(names)
        for name in names:
            if name in self.raw:
                return self.raw[name]
        if default is _REQUIRED:
            raise MissingField(" or ".join(names))
        return default

    def unread(self) -> list[str]:
        """Fields nobody asked for, sorted."""
        return sorted(set(self.raw) - self._read)


def _activation(fields: Fields, value: Any) -> str:
    if value not in _ACTIVATIONS:
        raise ValueError(f"the activation {value!r} is unknown; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _or_four_d_model(fields: Fields, value: Any) -> Any:
    return 4 * fields.known["d_model"] if value is None else value


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "activation": _activation,
    "or_four_d_model": _or_four_d_model,
}
