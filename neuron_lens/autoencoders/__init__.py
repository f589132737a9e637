"""Sparse autoencoders and transcoders: one canonical form, a loader per published format.

Works on any tensor and knows no transformer; `splice` puts one into a tree of hooks.
"""

from __future__ import annotations

from neuron_lens.autoencoders.autoencoder import Autoencoder
from neuron_lens.autoencoders.clt import CrossLayerTranscoder
from neuron_lens.autoencoders.config import (
    AutoencoderConfig,
    CrossLayerTranscoderConfig,
    Provenance,
    Site,
)
from neuron_lens.autoencoders.load import (
    load_autoencoder,
    load_autoencoders,
    load_cross_layer_transcoder,
)
from neuron_lens.autoencoders.normalisation import DecodeState
from neuron_lens.autoencoders.save import save_autoencoder, save_circuit_tracer, save_saelens
from neuron_lens.autoencoders.self_check import SelfCheck, check_autoencoder, explained_variance
from neuron_lens.autoencoders.sparse import SparseLatents
from neuron_lens.autoencoders.splice import Splice, reference_errors, splice
from neuron_lens.autoencoders.splice_cross_layer import CrossLayerSplice, splice_cross_layer

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "CrossLayerSplice",
    "CrossLayerTranscoder",
    "CrossLayerTranscoderConfig",
    "DecodeState",
    "Provenance",
    "SelfCheck",
    "Site",
    "SparseLatents",
    "Splice",
    "check_autoencoder",
    "explained_variance",
    "load_autoencoder",
    "load_autoencoders",
    "load_cross_layer_transcoder",
    "reference_errors",
    "save_autoencoder",
    "save_circuit_tracer",
    "save_saelens",
    "splice",
    "splice_cross_layer",
]
