"""Folding the weights and biases of norms into the linear maps that read them.

norm(x) = n(x) · w + b, and a linear map W reads it: W (n · w + b) = (W · w) n + W b. So W takes over w, and its bias
takes over W b. A layer norm also removes the mean of what it reads, so the mean of each row of W has no effect and is
removed. The function computed stays the same; the norm is left with weight 1 and bias 0. (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits", and the weight processing of TransformerLens.)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.model import Transformer
from neuron_lens.weights.tensors import Weights

__all__ = ["fold_layer_norm", "folded_norms"]


def fold_layer_norm(model: Transformer) -> Transformer:
    """A new model in which every norm that stands before linear maps has weight 1 and bias 0; the same function.

    Norms of queries and keys, norms after a sublayer and the norm of the embedding stand before no linear map and stay.
    """
    return folded_norms(Weights.of(model)).build(model)


def folded_norms(weights: Weights) -> Weights:
    """`fold_layer_norm` on tensors. Raises RequestError where a bias would need a place that the experts lack."""
    config = weights.config
    if config.norm == "none":
        return weights
    changes: dict[str, Tensor] = {}
    has_bias = config.norm == "layer" and config.norm_bias
    for norm, readers in readers_of_norms(config):
        if f"{norm}.weight" not in weights.tensors and f"{norm}.bias" not in weights.tensors:
            continue
        for weight_name, bias_name in readers:
            changes |= _read_folded(weights, norm, weight_name, bias_name, has_bias)
        changes |= _identity(weights, norm)
    choices = {"tied": False}
    if has_bias:
        if config.experts is not None and not (config.experts.bias and config.experts.router_bias):
            raise RequestError(
                "the experts have no biases that could take over those of the norms; do not fold the norms"
            )
        choices |= {"unembed_bias": True}
        if config.norm_place != "post":
            choices |= {"qkv_bias": True, "mlp_bias": True}
            changes |= _zero_biases(weights, changes)
    return weights.changed(changes, **choices)


def readers_of_norms(config: TransformerConfig) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every norm before linear maps, with the weight and bias names of those maps."""
    if config.norm_place != "post":
        for layer in range(config.n_layers):
            block = f"blocks.{layer}"
            attention = [(f"{block}.attn.{name}.weight", f"{block}.attn.{name}.bias") for name in "qkv"]
            mlp = _mlp_readers(config, block)
            yield f"{block}.ln_attn", attention + (mlp if config.shared_norm else [])
            if mlp and not config.shared_norm:
                yield f"{block}.ln_mlp", mlp
    if config.final_norm:
        yield "ln_f", [("unembed.weight", "unembed.bias")]


def _mlp_readers(config: TransformerConfig, block: str) -> list[tuple[str, str]]:
    if config.mlp == "none":
        return []
    if config.mlp == "experts":
        names = [(f"{block}.mlp.{name}", f"{block}.mlp.{name}_bias") for name in ("gate", "up")]
        return [(f"{block}.mlp.router.weight", f"{block}.mlp.router.bias"), *names]
    linears = ["up", "gate"] if config.mlp == "gated" else ["up"]
    return [(f"{block}.mlp.{name}.weight", f"{block}.mlp.{name}.bias") for name in linears]


def _read_folded(
    weights: Weights, norm: str, weight_name: str, bias_name: str, has_bias: bool
) -> dict[str, Tensor]:
    reader = weights.tensors[weight_name]
    wide = reader.float()
    folded: dict[str, Tensor] = {}
    if has_bias:
        taken = wide @ weights.tensors[f"{norm}.bias"].float()
        old = weights.tensors.get(bias_name)
        folded[bias_name] = (taken if old is None else taken + old.float()).to(reader.dtype)
    weight = weights.tensors.get(f"{norm}.weight")
    if weight is not None:
        wide = wide * (weight.float() + 1 if weights.config.norm_offset else weight.float())
    if weights.config.norm == "layer":
        wide = wide - wide.mean(-1, keepdim=True)
    return {**folded, weight_name: wide.to(reader.dtype)}


def _identity(weights: Weights, norm: str) -> dict[str, Tensor]:
    ones = torch.zeros_like if weights.config.norm_offset else torch.ones_like
    makers = {f"{norm}.weight": ones, f"{norm}.bias": torch.zeros_like}
    return {name: make(weights.tensors[name]) for name, make in makers.items() if name in weights.tensors}


def _zero_biases(weights: Weights, changes: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the biases that switching biases on brings along (the MLP's way down has no norm before it)."""
    if weights.config.mlp not in ("plain", "gated"):
        return {}
    downs = [f"blocks.{layer}.mlp.down" for layer in range(weights.config.n_layers)]
    return {f"{down}.bias": weights.bias(down) for down in downs if f"{down}.bias" not in changes}
