"""Checkpoints to models: definitions of families as data, and the few functions that read them.

Reading order: definitions, conversions, config_map, transforms, weight_map, registry, load, verify.
"""

from __future__ import annotations

from neuron_lens.loading.load import load
from neuron_lens.loading.registry import KnownModel, known_models
from neuron_lens.loading.verify import Verification, verify

__all__ = ["KnownModel", "Verification", "known_models", "load", "verify"]
