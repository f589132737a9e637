"""All weight processing in one pass, each step taken where it is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.model import Transformer
from neuron_lens.weights.centring import centred_unembed, centred_writers, why_unembed_stays, why_writers_stay
from neuron_lens.weights.norms import folded_norms
from neuron_lens.weights.scales import folded_scales
from neuron_lens.weights.tensors import Weights
from neuron_lens.weights.values import (
    folded_value_biases,
    refactored_attention,
    why_attention_stays,
    why_value_biases_stay,
)

__all__ = ["Processing", "process"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Processing:
    """Which steps to take, in this order. Names as in TransformerLens."""

    fold_scales: bool = True
    fold_ln: bool = False
    center_writing_weights: bool = False
    center_unembed: bool = False
    fold_value_biases: bool = False
    refactor_factored_attn_matrices: bool = False


def process(model: Transformer, steps: Processing) -> Transformer:
    """A new model with the steps applied. A step that would change the model's function is left out, and logged."""
    weights = Weights.of(model)
    for name, why_not, apply in _STEPS:
        if not getattr(steps, name):
            continue
        reason = why_not(weights.config)
        if reason is None:
            weights = apply(weights)
        else:
            _log.warning("%s is left out: %s", name, reason)
    return weights.build(model)


def _always(_: TransformerConfig) -> None:
    return None


def _why_norms_stay(config: TransformerConfig) -> str | None:
    biased = config.norm == "layer" and config.norm_bias and config.experts is not None
    return "the experts have no biases that could take over those of the norms" if biased else None


_STEPS: list[tuple[str, Callable[[TransformerConfig], str | None], Callable[[Weights], Weights]]] = [
    ("fold_scales", _always, folded_scales),
    ("fold_ln", _why_norms_stay, folded_norms),
    ("center_writing_weights", why_writers_stay, centred_writers),
    ("center_unembed", why_unembed_stays, centred_unembed),
    ("fold_value_biases", why_value_biases_stay, folded_value_biases),
    ("refactor_factored_attn_matrices", why_attention_stays, refactored_attention),
]
