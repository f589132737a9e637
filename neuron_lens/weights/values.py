"""Value biases into the output bias, and attention's matrix pairs in a canonical form."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.model import Transformer
from neuron_lens.weights.factored import FactoredMatrix
from neuron_lens.weights.tensors import Weights

__all__ = [
    "fold_value_biases",
    "folded_value_biases",
    "refactor_factored_attn_matrices",
    "refactored_attention",
    "why_attention_stays",
    "why_value_biases_stay",
]


def fold_value_biases(model: Transformer) -> Transformer:
    """A new model without value biases: each row of a pattern sums to 1, so b_V adds W_O b_V, whatever the pattern.

    Raises RequestError where that does not hold (attention sinks, clipped values).
    """
    return folded_value_biases(Weights.of(model)).build(model)


def refactor_factored_attn_matrices(model: Transformer) -> Transformer:
    """A new model with W_Q W_Kᵀ and W_V W_O of each head refactored by their SVD; the same function.

    W_Q and W_K get orthogonal columns of equal norms (biases ride along as one more row); W_O becomes a rotation and
    W_V takes its scale. Value biases are folded first. Raises RequestError for rotary positions, norms of queries or
    keys, clipping, shared key/value heads.
    """
    return refactored_attention(Weights.of(model)).build(model)


def why_value_biases_stay(config: TransformerConfig) -> str | None:
    """Why value biases cannot be folded; None when they can."""
    if config.attention_sinks:
        return "attention sinks take probability, so patterns do not sum to 1"
    return "values are clipped after their bias" if config.clip_qkv is not None else None


def why_attention_stays(config: TransformerConfig) -> str | None:
    """Why queries and keys cannot be refactored; None when they can."""
    if config.position == "rotary":
        return "rotary positions stand between W_Q and W_K"
    if config.qk_norm != "none":
        return "queries and keys are normalised between W_Q and W_K"
    if config.n_kv_heads != config.n_heads:
        return "several heads share W_K and W_V"
    return why_value_biases_stay(config)


def folded_value_biases(weights: Weights) -> Weights:
    """`fold_value_biases` on tensors."""
    config = weights.config
    if not config.qkv_bias:
        return weights
    reason = why_value_biases_stay(config)
    if reason is not None:
        raise RequestError(f"cannot fold the value biases: {reason}")
    changes = {}
    for layer in range(config.n_layers):
        attn = f"blocks.{layer}.attn"
        bias = weights.tensors[f"{attn}.v.bias"]
        per_head = bias.float().unflatten(0, (config.n_kv_heads, config.d_head))
        per_head = per_head.repeat_interleave(config.n_heads // config.n_kv_heads, 0)
        added = weights.tensors[f"{attn}.out.weight"].float() @ per_head.flatten()
        changes[f"{attn}.out.bias"] = (weights.bias(f"{attn}.out").float() + added).to(bias.dtype)
        changes[f"{attn}.v.bias"] = torch.zeros_like(bias)
    return weights.changed(changes, out_bias=True)


def refactored_attention(weights: Weights) -> Weights:
    """`refactor_factored_attn_matrices` on tensors."""
    reason = why_attention_stays(weights.config)
    if reason is not None:
        raise RequestError(f"cannot refactor the attention matrices: {reason}")
    weights = folded_value_biases(weights)
    config, changes = weights.config, {}
    for layer in range(config.n_layers):
        attn = f"blocks.{layer}.attn"
        # [head, d_model + 1, d_head]: the bias as one more row of the input
        q, k = (_with_bias(weights, f"{attn}.{name}") for name in "qk")
        even = FactoredMatrix(q, k.mT).make_even()
        for name, half in (("q", even.A), ("k", even.B.mT)):
            changes[f"{attn}.{name}.weight"] = half[:, :-1].mT.flatten(0, 1)
            if config.qkv_bias:
                changes[f"{attn}.{name}.bias"] = half[:, -1].flatten()
        v = weights.tensors[f"{attn}.v.weight"].unflatten(0, (config.n_heads, config.d_head)).mT
        out = (
            weights.tensors[f"{attn}.out.weight"]
            .unflatten(1, (config.n_heads, config.d_head))
            .permute(1, 2, 0)
        )
        left, scale, right = FactoredMatrix(v, out).svd()
        changes[f"{attn}.v.weight"] = (left * scale[:, None, :]).mT.flatten(0, 1)
        changes[f"{attn}.out.weight"] = right.permute(1, 0, 2).flatten(1)
    return weights.changed(changes)


def _with_bias(weights: Weights, linear: str) -> Tensor:
    config = weights.config
    weight = weights.tensors[f"{linear}.weight"].unflatten(0, (config.n_heads, config.d_head)).mT
    bias = weights.bias(linear).unflatten(0, (config.n_heads, 1, config.d_head))
    return torch.cat((weight, bias), 1)
