"""Rewriting an autoencoder's parts into its weights without changing what it computes.

Formats differ in what they can say; a part that one cannot say is folded away. Each function takes and
returns weights under canonical names (`Autoencoder.state_dict`), and changes nothing it was given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.autoencoders.config import AutoencoderConfig

__all__ = ["Weights", "fold_input_bias", "fold_latent_scale", "fold_scale"]

Weights = dict[str, Tensor]

# What multiplies with the latents, besides the columns of W_enc.
_PER_LATENT = ("b_enc", "activation.b_gate", "activation.b_mag", "activation.threshold")


def fold_scale(
    config: AutoencoderConfig, weights: Weights, scale_in: float, scale_out: float
) -> tuple[AutoencoderConfig, Weights]:
    """Fold x * scale_in before the encoder and division by scale_out after the decoder into the weights.

    With x' = s_in x: h = (s_in x − b_pre) W_enc + b_enc = (x − b_pre / s_in)(s_in W_enc) + b_enc, so
    pre-activations, thresholds and latents keep their values. The skip term reads x itself and stays.
    """
    folded = dict(weights)
    folded["W_enc"] = weights["W_enc"] * scale_in
    folded["W_dec"] = weights["W_dec"] / scale_out
    folded["b_dec"] = weights["b_dec"] / scale_out
    if "own_b_pre" in weights:
        folded["own_b_pre"] = weights["own_b_pre"] / scale_in
    update: dict[str, object] = {"scale_in": 1.0, "scale_out": 1.0}
    if config.normalisation == "scale":
        update["normalisation"] = "none"
    if config.input_bias == "decoder_bias" and scale_in != scale_out:
        folded["own_b_pre"] = weights["b_dec"] / scale_in  # no longer the output's bias
        update["input_bias"] = "own"
    return config.model_copy(update=update), folded


def fold_input_bias(config: AutoencoderConfig, weights: Weights) -> tuple[AutoencoderConfig, Weights]:
    """Fold −b_pre @ W_enc into the encoder's biases, leaving no input bias (b_dec stays the output's)."""
    if config.input_bias == "none":
        return config, dict(weights)
    folded = dict(weights)
    b_pre = folded.pop("own_b_pre", weights["b_dec"])
    moved = b_pre @ weights["W_enc"]
    if config.activation == "gated":
        folded["activation.b_gate"] = weights["activation.b_gate"] - moved
        folded["activation.b_mag"] = weights["activation.b_mag"] - moved * weights["activation.r_mag"].exp()
    else:
        folded["b_enc"] = weights["b_enc"] - moved
    return config.model_copy(update={"input_bias": "none"}), folded


def fold_latent_scale(weights: Weights, factor: Tensor | float) -> Weights:
    """Latents multiplied by `factor` (positive, a scalar or [d_latent]) and decoder rows divided by it.

    Thresholds scale along, so which latents are active does not change where each stands on its own.
    """
    folded = dict(weights)
    vector = torch.as_tensor(factor, dtype=weights["W_dec"].dtype, device=weights["W_dec"].device)
    folded["W_enc"] = weights["W_enc"] * vector
    folded["W_dec"] = weights["W_dec"] / (vector[:, None] if vector.ndim else vector)
    for name in _PER_LATENT:
        if name in weights:
            folded[name] = weights[name] * vector
    return folded
