"""Multipliers of the configuration moved into the weights they multiply, so that parts of the stream add up plainly."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.transformer.model import Transformer
from neuron_lens.weights.tensors import Weights

__all__ = ["fold_scales", "folded_scales"]


def fold_scales(model: Transformer) -> Transformer:
    """A new model without embedding, residual and logit multipliers and without norm offsets; the same function."""
    return folded_scales(Weights.of(model)).build(model)


def folded_scales(weights: Weights) -> Weights:
    """`fold_scales` on tensors."""
    config = weights.config
    changes: dict[str, Tensor] = {}
    choices: dict[str, object] = {}
    if config.norm_offset:
        norms = [name for name in weights.tensors if name.endswith(".weight") and _is_norm(name)]
        changes |= {name: weights.tensors[name] + 1 for name in norms}
        choices |= {"norm_offset": False}
    if config.embedding_scale != 1.0:
        # rounded as the model rounds it, so that the product is the same number
        scale = weights.tensors["embed.weight"].new_tensor(config.embedding_scale)
        changes["embed.weight"] = weights.tensors["embed.weight"] * scale
        choices |= {"embedding_scale": 1.0, "tied": False}
    if config.logit_scale != 1.0:
        names = [name for name in ("unembed.weight", "unembed.bias") if name in weights.tensors]
        changes |= {name: weights.tensors[name] * config.logit_scale for name in names}
        choices |= {"logit_scale": 1.0, "tied": False}
    if config.residual_scale != 1.0:
        writers = [name for name in weights.tensors if _writes(name, config.norm_place != "pre")]
        changes |= {
            name: changes.get(name, weights.tensors[name]) * config.residual_scale for name in writers
        }
        choices |= {"residual_scale": 1.0}
    return weights.changed(changes, **choices) if choices else weights


def _writes(name: str, behind_norm: bool) -> bool:
    """Whether a tensor is the last linear thing before the stream: an output map, or the norm behind it."""
    owner = name.split(".")
    if len(owner) < 4 or owner[0] != "blocks":
        return False
    if behind_norm:
        return owner[2] in ("ln_attn_out", "ln_mlp_out")
    return owner[2:4] == ["attn", "out"] or (owner[2] == "mlp" and owner[3] in ("down", "down_bias"))


def _is_norm(name: str) -> bool:
    return name.split(".")[-2] in (
        "ln_f",
        "ln_attn",
        "ln_mlp",
        "ln_attn_out",
        "ln_mlp_out",
        "q_norm",
        "k_norm",
        "embed_norm",
    )
