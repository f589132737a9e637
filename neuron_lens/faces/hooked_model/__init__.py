"""HookedModel: ask for activations, ablations and patches declaratively, over batches and data sets.

Reading order: positions, fields, extraction_config, extraction, cache; requests, compile, queries; forward, model; dataset,
patching, stored, store; logit_lens.
"""

from __future__ import annotations

from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.config import HookedModelConfig
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.logit_lens import LogitLens
from neuron_lens.faces.hooked_model.model import HookedModel
from neuron_lens.faces.hooked_model.positions import ResolvedPositions, resolve_positions
from neuron_lens.faces.hooked_model.requests import Intervention
from neuron_lens.faces.hooked_model.store import ActivationLoader, ActivationSaver, QueryResult
from neuron_lens.faces.hooked_model.stored import StoredCache

__all__ = [
    "ActivationCache",
    "ActivationLoader",
    "ActivationSaver",
    "ExtractionConfig",
    "HookedModel",
    "HookedModelConfig",
    "Intervention",
    "LogitLens",
    "QueryResult",
    "ResolvedPositions",
    "StoredCache",
    "resolve_positions",
]
