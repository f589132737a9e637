"""Weights to weights: folding norms, centring, value biases, factored matrices. Models given are left unchanged."""

from __future__ import annotations

from neuron_lens.weights.centring import center_unembed, center_writing_weights
from neuron_lens.weights.factored import FactoredMatrix
from neuron_lens.weights.norms import fold_layer_norm
from neuron_lens.weights.process import Processing, process
from neuron_lens.weights.scales import fold_scales
from neuron_lens.weights.values import fold_value_biases, refactor_factored_attn_matrices

__all__ = [
    "FactoredMatrix",
    "Processing",
    "center_unembed",
    "center_writing_weights",
    "fold_layer_norm",
    "fold_scales",
    "fold_value_biases",
    "process",
    "refactor_factored_attn_matrices",
]
