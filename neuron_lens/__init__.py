"""neuron_lens: look inside a language model, change what happens there, and explain its parts.

The public names below are loaded on first use, so that `import neuron_lens` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The one table of the public surface: name -> the module that defines it.
_PUBLIC: dict[str, str] = {}

__all__ = sorted([*_PUBLIC, "__version__"])


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(f"module 'neuron_lens' has no attribute {name!r}; it offers: {', '.join(__all__)}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
