"""HookedTransformer and ActivationCache: the interface people's code already uses, over the engine."""

from __future__ import annotations

from neuron_lens.faces.hooked_transformer.act_name import get_act_name
from neuron_lens.faces.hooked_transformer.activation_cache import ActivationCache
from neuron_lens.faces.hooked_transformer.config import HookedTransformerConfig
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint, LensHandle
from neuron_lens.faces.hooked_transformer.kv_cache import HookedTransformerKeyValueCache
from neuron_lens.faces.hooked_transformer.model import HookedTransformer
from neuron_lens.faces.hooked_transformer.root_module import HookedRootModule
from neuron_lens.weights import FactoredMatrix

__all__ = [
    "ActivationCache",
    "FactoredMatrix",
    "HookPoint",
    "HookedRootModule",
    "HookedTransformer",
    "HookedTransformerConfig",
    "HookedTransformerKeyValueCache",
    "LensHandle",
    "get_act_name",
]
