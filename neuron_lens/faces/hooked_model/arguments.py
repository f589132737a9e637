"""Arguments checked by name: unknown ones, and what should be a list and is not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig

__all__ = ["known_arguments", "refuse_unknown", "several"]


def known_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of a function's own arguments."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "self"]


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises RequestError naming the first argument that `what` does not take, and what may have been meant."""
    names = list(known)
    for name in given:
        if name in names:
            continue
        hint = did_you_mean(name, names)
        if name in ExtractionConfig.model_fields:
            hint = f"it is a field of the configuration: extraction_config=ExtractionConfig({name}=…)"
        raise RequestError(f"{what} takes no argument {name!r}; {hint}")


def several(what: str, given: Any, expected: str) -> list[Any]:
    """What should be several things, as a list. Raises RequestError for a text, a mapping, and what holds nothing."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise RequestError(f"{what} must be {expected}; got {given!r:.80}")
    return list(given)
