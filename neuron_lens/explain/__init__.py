"""Records in, explanations and scores out: everything here runs without torch.

`pipeline` is the exception by intent: it brings the model, the harvest and this package together, and
imports them when it is run. The names below are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.explain.result import RunResult, UnitResult

__all__ = ["Pipeline", "RunResult", "UnitResult"]

_MODULES = {"Pipeline": "pipeline", "RunResult": "result", "UnitResult": "result"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
