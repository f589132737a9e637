"""Sparse autoencoders and transcoders: one canonical form, a loader per published format.

Works on any tensor and knows no transformer.
"""

from __future__ import annotations

from neuron_lens.autoencoders.autoencoder import Autoencoder
from neuron_lens.autoencoders.config import (
    AutoencoderConfig,
    CrossLayerTranscoderConfig,
    Provenance,
    Site,
)
from neuron_lens.autoencoders.normalisation import DecodeState
from neuron_lens.autoencoders.self_check import SelfCheck, check_autoencoder, explained_variance
from neuron_lens.autoencoders.sparse import SparseLatents

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CrossLayerTranscoderConfig",
    "DecodeState",
    "Provenance",
    "SelfCheck",
    "Site",
    "SparseLatents",
    "check_autoencoder",
    "explained_variance",
]
