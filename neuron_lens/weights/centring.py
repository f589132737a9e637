"""Centring: removing directions that cannot matter.

A layer norm ignores the mean over d_model of what it reads, so nothing that writes to the stream needs to write any; a
softmax ignores a constant added to all logits, so the unembedding needs no mean over the vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.model import Transformer
from neuron_lens.weights.tensors import Weights

__all__ = [
    "center_unembed",
    "center_writing_weights",
    "centred_unembed",
    "centred_writers",
    "why_unembed_stays",
    "why_writers_stay",
]


def center_writing_weights(model: Transformer) -> Transformer:
    """A new model whose embeddings and output maps write with mean 0 over d_model; the same function.

    Raises RequestError for models whose stream is not read through layer norms alone.
    """
    return centred_writers(Weights.of(model)).build(model)


def center_unembed(model: Transformer) -> Transformer:
    """A new model with logits of mean 0 over the vocabulary for every input: the same probabilities.

    Raises RequestError for a soft cap of the logits, which sees the constant.
    """
    return centred_unembed(Weights.of(model)).build(model)


def why_writers_stay(config: TransformerConfig) -> str | None:
    """Why centring what writes to the stream would change the function; None when it would not."""
    if config.norm != "layer":
        return f"norm {config.norm!r} sees the mean of the stream; only layer norms ignore it"
    if config.norm_place != "pre":
        return f"norms placed {config.norm_place!r} leave part of the stream unnormalised before it is read"
    if not config.final_norm:
        return "the unembedding reads the stream without a norm"
    return None


def why_unembed_stays(config: TransformerConfig) -> str | None:
    """Why centring the unembedding would change the probabilities; None when it would not."""
    return (
        None if config.logit_softcap is None else "the soft cap of the logits is not invariant to a constant"
    )


def centred_writers(weights: Weights) -> Weights:
    """`center_writing_weights` on tensors."""
    config = weights.config
    reason = why_writers_stay(config)
    if reason is not None:
        raise RequestError(f"cannot centre the writing weights: {reason}")
    writers = ["embed.weight", "pos_embed.weight"]
    changes = {name: _centred(weights.tensors[name], -1) for name in writers if name in weights.tensors}
    for layer in range(config.n_layers):
        for linear in (f"blocks.{layer}.attn.out", f"blocks.{layer}.mlp.down"):
            for name in (f"{linear}.weight", f"{linear}.bias", f"{linear}_bias"):
                if name in weights.tensors:
                    changes[name] = _centred(weights.tensors[name], 0)
        if config.mlp == "experts":
            down = f"blocks.{layer}.mlp.down"
            changes[down] = _centred(weights.tensors[down], 1)
            if f"{down}_bias" in weights.tensors:
                changes[f"{down}_bias"] = _centred(weights.tensors[f"{down}_bias"], 1)
    return weights.changed(changes, tied=False)


def centred_unembed(weights: Weights) -> Weights:
    """`center_unembed` on tensors."""
    reason = why_unembed_stays(weights.config)
    if reason is not None:
        raise RequestError(f"cannot centre the unembedding: {reason}")
    names = [name for name in ["unembed.weight", "unembed.bias"] if name in weights.tensors]
    changes = {name: _centred(weights.tensors[name], 0) for name in names}
    return weights.changed(changes, tied=False)


def _centred(x: Tensor, dim: int) -> Tensor:
    wide = x.float()
    return (wide - wide.mean(dim, keepdim=True)).to(x.dtype)
