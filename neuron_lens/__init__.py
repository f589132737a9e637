"""neuron_lens: look inside a language model, change what happens there, and explain its parts.

The public names below are loaded on first use, so that `import neuron_lens` is quick and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# The one table of the public surface: name -> the module that defines it.
_PUBLIC: dict[str, str] = {
    "ActivationCache": "neuron_lens.faces.hooked_transformer",
    "AtHeads": "neuron_lens.hooks",
    "AtLayers": "neuron_lens.hooks",
    "AtPositions": "neuron_lens.hooks",
    "AtRows": "neuron_lens.hooks",
    "AtSteps": "neuron_lens.hooks",
    "AtUnits": "neuron_lens.hooks",
    "AutoencoderHooks": "neuron_lens.hooks",
    "FactoredMatrix": "neuron_lens.weights",
    "HookPoint": "neuron_lens.faces.hooked_transformer",
    "HookedRootModule": "neuron_lens.faces.hooked_transformer",
    "HookedTransformer": "neuron_lens.faces.hooked_transformer",
    "HookedTransformerConfig": "neuron_lens.faces.hooked_transformer",
    "KVCache": "neuron_lens.transformer",
    "NeuronLensError": "neuron_lens.errors",
    "Transformer": "neuron_lens.transformer",
    "TransformerConfig": "neuron_lens.transformer",
    "TransformerHooks": "neuron_lens.hooks",
    "When": "neuron_lens.hooks",
    "grad_hook_wrapper": "neuron_lens.hooks",
}

__all__: list[str] = sorted([*_PUBLIC, "__version__"])  # noqa: PLE0605 - one table, not two lists


def __getattr__(name: str) -> Any:
    module = _PUBLIC.get(name)
    if module is None:
        raise AttributeError(
            f"module 'neuron_lens' has no attribute {name!r}; it offers: {', '.join(__all__)}"
        )
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return __all__
