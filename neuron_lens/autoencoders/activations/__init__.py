"""From pre-activations to latents: one file per activation, chosen by the config's `activation`."""

from __future__ import annotations

from neuron_lens.autoencoders.activations.base import LatentActivation, RankedActivation
from neuron_lens.autoencoders.activations.batch_topk import BatchTopK, keep_batch_topk
from neuron_lens.autoencoders.activations.gated import Gated
from neuron_lens.autoencoders.activations.groupmax import GroupMax
from neuron_lens.autoencoders.activations.jumprelu import JumpReLU
from neuron_lens.autoencoders.activations.relu import ReLU
from neuron_lens.autoencoders.activations.topk import AbsTopK, TopK
from neuron_lens.autoencoders.config import AutoencoderConfig, CrossLayerTranscoderConfig

__all__ = [
    "AbsTopK",
    "BatchTopK",
    "Gated",
    "GroupMax",
    "JumpReLU",
    "LatentActivation",
    "RankedActivation",
    "ReLU",
    "TopK",
    "build_activation",
    "keep_batch_topk",
]


def build_activation(config: AutoencoderConfig | CrossLayerTranscoderConfig) -> LatentActivation:
    """The module for `config.activation`, its own weights not yet loaded."""
    k = config.k or 0  # the config has checked that it is there where it is needed
    match config.activation:
        case "relu":
            return ReLU()
        case "gated":
            return Gated(config.d_latent)
        case "topk":
            return TopK(k, relu=config.relu_after_selection)
        case "abs_topk":
            return AbsTopK(k)
        case "batch_topk":
            return BatchTopK()
        case "jumprelu":
            return JumpReLU(config.d_latent, relu=config.relu_after_selection)
        case "groupmax":
            return GroupMax(k)
