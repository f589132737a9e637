"""What units read of the embeddings, by their weights alone: the counterpart of `logits_written`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["embeddings_read", "through_norm"]

_BEFORE_NORM = {"pre_attn", "attn_in", "post_attn", "mlp_in", "post_mlp"}
_BEHIND_NORM = {"post_ln_attn": "ln_attn", "post_ln_mlp": "ln_mlp"}


def through_norm(model: Transformer, vectors: Tensor, site: str, layer: int) -> Tensor | None:
    """Vectors `[unit, d_model]` that are multiplied with what a site holds, as vectors of the residual stream.

    Behind a norm they are multiplied by its weight, and lose their mean where the norm takes the stream's mean
    out; division by the stream's size is left out. None for a site that does not hold the stream.
    """
    name = site.removeprefix("resid.torso.")
    vectors = vectors.detach().float()
    if vectors.shape[-1] != model.config.d_model or name not in {*_BEFORE_NORM, *_BEHIND_NORM}:
        return None
    if name in _BEFORE_NORM:
        return vectors
    block: Any = model.blocks[layer]
    norm = getattr(block, "ln_attn" if model.config.shared_norm else _BEHIND_NORM[name])
    if norm is None:
        return vectors
    if norm.weight is not None:
        vectors = vectors * (norm.weight.detach().float() + (1.0 if model.config.norm_offset else 0.0))
    return vectors - vectors.mean(-1, keepdim=True) if model.config.norm == "layer" else vectors


@torch.no_grad()
def embeddings_read(model: Transformer, read: Tensor) -> Tensor:
    """What the embedding of every token alone adds to units' inputs `[unit, d_vocab]`; `read` as of `through_norm`.

    transformer-debugger's token-in weights, W_E diag(ln.w) W_in; centred over the vocabulary, since what all tokens
    add alike says nothing of any.
    """
    embedded = model.embed.weight.detach().float()
    if model.config.embedding_scale != 1.0:
        embedded = embedded * model.config.embedding_scale
    if model.embed_norm is not None:
        embedded = model.embed_norm(embedded)
    added = read.to(embedded.device) @ embedded.T
    return added - added.mean(-1, keepdim=True)
