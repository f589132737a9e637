"""OpenAI's sparse_autoencoder `.pt` files (GPT-2 small).

`activation` "ReLU" files (v1, v4) read activations as they are; "TopK" files (v5) read them layer-normalised,
and the reconstruction is scaled back. OpenAI's code infers the one from the other, and so does this.
"""

from __future__ import annotations

from typing import Any

from neuron_lens.autoencoders.config import AutoencoderConfig, Site
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.autoencoders.formats.source import (
    Checkpoint,
    Loaded,
    LoadOptions,
    check_names,
    integer,
    layer_in_path,
    take_field,
)
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "openai"
EXPECTS = "a .pt file with encoder.weight, pre_bias and latent_bias"

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_DECODERS = ("decoder.weight", "decoder.linear.weight")  # the second: tied to the encoder
_SITES = {
    "mlp_post_act": "mlp.post_act",
    "resid_delta_attn": "resid.torso.delta_attn",
    "resid_post_attn": "resid.torso.post_attn",
    "resid_delta_mlp": "resid.torso.delta_mlp",
    "resid_post_mlp": "resid.torso.post_mlp",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this file is of this format."""
    name = _file(checkpoint)
    return name is not None and {"pre_bias", "latent_bias"} <= checkpoint.tensors(name).keys()


def _file(checkpoint: Checkpoint) -> str | None:
    found = [name for name in checkpoint.names if name.endswith(".pt")]
    return found[0] if checkpoint.path.is_file() and found else None


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    name = _file(checkpoint)
    if name is None:
        raise CheckpointError(f"{checkpoint.path}: expected {EXPECTS}")
    where, tensors = str(checkpoint.path), checkpoint.tensors(name)
    decoder = next((each for each in _DECODERS if each in tensors), _DECODERS[0])
    check_names(
        tensors,
        ["encoder.weight", decoder, "pre_bias", "latent_bias", "activation"],
        where,
        optional=[*_STATISTICS, "activation_state_dict"],
    )
    enc = tensors["encoder.weight"]
    dec = tensors[decoder]
    weights: Weights = {
        "W_enc": enc.T,
        "b_enc": tensors["latent_bias"],
        # a tied decoder is a linear layer that holds the encoder's own [d_latent, d] weight
        "W_dec": dec if decoder == "decoder.linear.weight" and dec.shape == enc.shape else dec.T,
        "b_dec": tensors["pre_bias"],
    }
    path = next((path for word, path in _SITES.items() if word in where), None)
    layer = layer_in_path(checkpoint.path)
    config = AutoencoderConfig(
        d_in=enc.shape[1],
        d_latent=enc.shape[0],
        input_bias="decoder_bias",
        site_in=Site(path=path, layer=layer) if path and layer is not None else None,
        model_name="gpt2",
        **_activation(tensors, where),
    )
    source = {each: value for each, value in tensors.items() if isinstance(value, str | int | float)}
    return Loaded(config=config, weights=weights, source_config=source)


def _activation(tensors: dict[str, Any], where: str) -> dict[str, Any]:
    kind, state = tensors["activation"], tensors.get("activation_state_dict") or {}
    if kind == "ReLU":
        return {"activation": "relu"}
    if kind != "TopK":
        raise CheckpointError(f"{where} has the activation {kind!r}; expected 'ReLU' or 'TopK'")
    after = state.get("postact_fn", "ReLU")
    if after not in ("ReLU", "Identity"):
        raise CheckpointError(f"{where} has the postact_fn {after!r}; expected 'ReLU' or 'Identity'")
    return {
        "activation": "topk",
        "k": integer(take_field(state, "k", where), "k", where),
        "relu_after_selection": after == "ReLU",
        "normalisation": "layer_norm",
    }
