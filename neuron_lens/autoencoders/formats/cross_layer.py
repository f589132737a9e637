"""Cross-layer transcoders on disk: circuit-tracer's and Gemma Scope 2's, a pair of files or one per layer.

- circuit-tracer: `W_enc_i.safetensors` {W_enc_i [d_latent, d_in], b_enc_i, b_dec_i, threshold_i?} and
  `W_dec_i.safetensors` {W_dec_i [d_latent, n_layers − i, d_out]}. It neither saves nor reads a skip term.
- Gemma Scope 2: `params_layer_i.safetensors`, whose w_dec [d_latent, targets, d_out] counts targets either
  from layer 0 (then n_layers of them, zero before i) or from layer i (then n_layers − i).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_lens.autoencoders.config import CrossLayerTranscoderConfig, Site
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.autoencoders.formats.circuit_tracer import read_set_config
from neuron_lens.autoencoders.formats.source import Checkpoint, Loaded, LoadOptions, check_names
from neuron_lens.autoencoders.sites import site_from_name
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "cross_layer"
EXPECTS = "W_enc_N.safetensors + W_dec_N.safetensors, or params_layer_N.safetensors, for every layer"

_ENCODERS, _DECODERS = r"W_enc_(\d+)\.safetensors", r"W_dec_(\d+)\.safetensors"
_LAYERS = r"params_layer_(\d+)\.safetensors"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this is a folder of such files."""
    return bool(checkpoint.matching(_ENCODERS) or checkpoint.matching(_LAYERS))


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring. All layers from 0 on must be there."""
    encoders, layers = checkpoint.matching(_ENCODERS), checkpoint.matching(_LAYERS)
    found = encoders or layers
    missing = sorted(set(range(max(found, default=0) + 1)) - found.keys())
    if missing:
        raise CheckpointError(f"{checkpoint.path} lacks the files of layers {missing}; fetch them too")
    if encoders:
        return _circuit_tracer(checkpoint, encoders)
    return _gemma_scope(checkpoint, layers)


def _circuit_tracer(checkpoint: Checkpoint, encoders: dict[int, str]) -> Loaded:
    decoders = checkpoint.matching(_DECODERS)
    if decoders.keys() != encoders.keys():
        raise CheckpointError(
            f"{checkpoint.path} has encoders of layers {list(encoders)} but decoders of {list(decoders)}"
        )
    weights: Weights = {}
    thresholds = []
    for i, name in encoders.items():
        tensors, decoder = checkpoint.tensors(name), checkpoint.tensors(decoders[i])
        required = [f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}"]
        check_names(tensors, required, str(checkpoint.folder / name), optional=[f"threshold_{i}"])
        check_names(decoder, [f"W_dec_{i}"], str(checkpoint.folder / decoders[i]))
        weights[f"W_enc.{i}"] = tensors[f"W_enc_{i}"].T
        weights[f"b_enc.{i}"] = tensors[f"b_enc_{i}"]
        weights[f"b_dec.{i}"] = tensors[f"b_dec_{i}"]
        weights[f"W_dec.{i}"] = decoder[f"W_dec_{i}"]
        if f"threshold_{i}" in tensors:
            thresholds.append(i)
            weights[f"activations.{i}.threshold"] = tensors[f"threshold_{i}"].reshape(-1)
    if thresholds and len(thresholds) != len(encoders):
        raise CheckpointError(
            f"{checkpoint.path} has thresholds of layers {thresholds} only, of {len(encoders)} layers"
        )
    source = read_set_config(checkpoint)
    config = _config(
        weights,
        len(encoders),
        "jumprelu" if thresholds else "relu",
        site_in=site_from_name(str(source.get("feature_input_hook") or "")),
        site_out=site_from_name(str(source.get("feature_output_hook") or "")),
        model_name=source.get("model_name"),
    )
    return Loaded(config=config, weights=weights, source_config=source)


def _gemma_scope(checkpoint: Checkpoint, layers: dict[int, str]) -> Loaded:
    source = checkpoint.json("config.json") if "config.json" in checkpoint else {}
    weights: Weights = {}
    skips = []
    for i, name in layers.items():
        tensors, where = checkpoint.tensors(name), str(checkpoint.folder / name)
        required = ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"]
        check_names(tensors, required, where, optional=["affine_skip_connection"])
        weights[f"W_enc.{i}"] = tensors["w_enc"]
        weights[f"b_enc.{i}"] = tensors["b_enc"]
        weights[f"b_dec.{i}"] = tensors["b_dec"]
        weights[f"W_dec.{i}"] = _later_targets(tensors["w_dec"], i, len(layers), where)
        weights[f"activations.{i}.threshold"] = tensors["threshold"]
        if "affine_skip_connection" in tensors:
            skips.append(i)
            weights[f"W_skip.{i}"] = tensors["affine_skip_connection"]
    if skips and len(skips) != len(layers):
        raise CheckpointError(f"{checkpoint.path} has skip matrices of layers {skips} only, of {len(layers)}")
    config = _config(
        weights,
        len(layers),
        "jumprelu",
        has_skip=bool(skips),
        site_in=Site(path="resid.torso.post_ln_mlp"),
        site_out=Site(path="resid.torso.delta_mlp"),
        model_name=source.get("model_name"),
    )
    return Loaded(config=config, weights=weights, source_config=source)


def _later_targets(w_dec: Tensor, layer: int, n_layers: int, where: str) -> Tensor:
    """The decoder counted from its own layer on, [d_latent, n_layers − layer, d_out], however stored."""
    if w_dec.ndim == 3 and w_dec.shape[1] == n_layers - layer:
        return w_dec
    if w_dec.ndim != 3 or w_dec.shape[1] != n_layers:
        raise CheckpointError(
            f"{where}: w_dec is {list(w_dec.shape)}; expected [d_latent, targets, d_out] with {n_layers} "
            f"targets (all layers) or {n_layers - layer} (from layer {layer} on)"
        )
    if bool(w_dec[:, :layer].any()):
        raise CheckpointError(f"{where}: w_dec writes to layers before its own, {layer}")
    return w_dec[:, layer:]


def _config(weights: Weights, n_layers: int, activation: str, **facts: Any) -> CrossLayerTranscoderConfig:
    d_in, d_latent = weights["W_enc.0"].shape
    return CrossLayerTranscoderConfig(
        n_layers=n_layers,
        d_in=d_in,
        d_latent=d_latent,
        d_out=weights["b_dec.0"].shape[0],
        activation=activation,
        relu_after_selection=activation != "jumprelu",
        **facts,
    )
