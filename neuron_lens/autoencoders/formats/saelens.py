"""SAELens folders: `cfg.json` + `sae_weights.safetensors`, of version 6 and of the flat configs before it.

Architectures: standard, gated, topk, abstopk, jumprelu, and the transcoders (relu or jumprelu, with or
without a skip term). W_skip is stored [d_out, d_in] and used as x @ W_skip.T. Batch top-k and matryoshka
are saved by SAELens as jumprelu with one threshold.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.folding import Weights, fold_scale
from neuron_lens.autoencoders.formats.source import (
    Checkpoint,
    Loaded,
    LoadOptions,
    check_names,
    integer,
    number,
    take_field,
)
from neuron_lens.autoencoders.sites import site_from_name
from neuron_lens.errors import CheckpointError, did_you_mean

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "saelens"
EXPECTS = "cfg.json + sae_weights.safetensors"

_CONFIG, _WEIGHTS, _SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"

# SAELens' architecture -> (activation, is a transcoder, has a skip term)
_ARCHITECTURES = {
    "standard": ("relu", False, False),
    "gated": ("gated", False, False),
    "topk": ("topk", False, False),
    "abstopk": ("abs_topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    "transcoder": ("relu", True, False),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
_NORMALISATIONS = {
    "none": "none",
    "expected_average_only_in": "none",  # folded into the weights below
    "constant_norm_rescale": "constant_norm_rescale",
    "layer_norm": "layer_norm",
}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether these files are of this format."""
    return _CONFIG in checkpoint and _WEIGHTS in checkpoint


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    where = str(checkpoint.folder / _CONFIG)
    source = checkpoint.json(_CONFIG)
    cfg = source if _is_version_6(source) else _modernised(source, where)
    architecture = str(cfg.get("architecture", "standard"))
    if architecture not in _ARCHITECTURES:
        raise CheckpointError(
            f"{where} has the architecture {architecture!r}, which is not supported: "
            f"{did_you_mean(architecture, _ARCHITECTURES)}"
        )
    normalisation = str(cfg.get("normalize_activations") or "none")
    if normalisation not in _NORMALISATIONS:
        raise CheckpointError(
            f"{where} has normalize_activations {normalisation!r}, which is not supported: "
            f"{did_you_mean(normalisation, _NORMALISATIONS)}"
        )
    config = _config(cfg, architecture, _NORMALISATIONS[normalisation], where)
    weights = _weights(checkpoint, config, cfg)
    loaded = Loaded(config=config, weights=weights, source_config=source)
    if normalisation == "expected_average_only_in":
        factor = _scaling_factor(checkpoint, options, where)
        loaded.config, loaded.weights = fold_scale(config, weights, factor, factor)
        loaded.notes.append(f"folded the activation scaling factor {factor} into the weights")
    return loaded


def _is_version_6(cfg: dict[str, Any]) -> bool:
    version = cfg.get("sae_lens_version") or (cfg.get("metadata") or {}).get("sae_lens_version")
    major = re.match(r"\d+", str(version))
    return major is not None and int(major[0]) >= 6


def _modernised(source: dict[str, Any], where: str) -> dict[str, Any]:
    """A flat config of before version 6 with version 6's names and defaults."""
    cfg = {_OLD_NAMES.get(name, name): value for name, value in source.items()}
    activation = cfg.get("activation_fn") or "relu"
    kept = (cfg.get("activation_fn_kwargs") or {}).get("k")
    if activation == "topk" and kept is not None:
        cfg.update(architecture="topk", k=kept)
    elif activation != "relu":
        raise CheckpointError(f"{where} has activation_fn {activation!r}; expected 'relu' or 'topk' with k")
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    hook_name = str(cfg.get("hook_name") or "")
    cfg.setdefault("reshape_activations", "hook_z" if "hook_z" in hook_name else "none")
    # A head index means that the site was already narrowed to one head: there is nothing to flatten.
    if cfg.get("hook_head_index") is not None:
        cfg["reshape_activations"] = "none"
    fields = ("hook_name", "hook_head_index", "model_name", "context_size", "prepend_bos")
    return {**cfg, "metadata": {"prepend_bos": True, **{name: cfg[name] for name in fields if name in cfg}}}


def _config(cfg: dict[str, Any], architecture: str, normalisation: str, where: str) -> AutoencoderConfig:
    activation, is_transcoder, has_skip = _ARCHITECTURES[architecture]
    subtracts = bool(cfg.get("apply_b_dec_to_input", not is_transcoder))
    if is_transcoder and subtracts:
        raise CheckpointError(f"{where}: a transcoder cannot have apply_b_dec_to_input")
    d_in = integer(take_field(cfg, "d_in", where), "d_in", where)
    d_out = integer(take_field(cfg, "d_out", where), "d_out", where) if is_transcoder else d_in
    ranked = activation in ("topk", "abs_topk")
    metadata = cfg.get("metadata") or {}
    head, head_out = metadata.get("hook_head_index"), metadata.get("hook_head_index_out")
    name = str(metadata.get("hook_name") or "")
    fields = {
        "d_in": d_in,
        "d_latent": integer(take_field(cfg, "d_sae", where), "d_sae", where),
        "d_out": d_out,
        "activation": activation,
        "k": integer(take_field(cfg, "k", where), "k", where) if ranked else None,
        "decoder_norm": "scale_latents" if ranked and cfg.get("rescale_acts_by_decoder_norm") else "ignore",
        "input_bias": "decoder_bias" if subtracts else "none",
        "normalisation": normalisation,
        "has_skip": has_skip,
        "flatten_heads": cfg.get("reshape_activations") == "hook_z",
        "site_in": site_from_name(name, head=head),
        "site_out": site_from_name(str(metadata.get("hook_name_out") or name), head=head_out or head),
        "model_name": metadata.get("model_name"),
        "context_size": metadata.get("context_size"),
        "prepend_bos": metadata.get("prepend_bos"),
    }
    return AutoencoderConfig(**fields)


def _weights(checkpoint: Checkpoint, config: AutoencoderConfig, cfg: dict[str, Any]) -> Weights:
    where = str(checkpoint.folder / _WEIGHTS)
    tensors = checkpoint.tensors(_WEIGHTS)
    required = ["W_enc", "W_dec", "b_dec"]
    required += ["b_gate", "b_mag", "r_mag"] if config.activation == "gated" else ["b_enc"]
    required += ["threshold"] if config.activation == "jumprelu" else []
    required += ["W_skip"] if config.has_skip else []
    check_names(tensors, required, where, optional=["scaling_factor"])
    weights: Weights = {}
    for name in required:
        of_activation = name in ("b_gate", "b_mag", "r_mag", "threshold")
        weights[f"activation.{name}" if of_activation else name] = tensors[name]
    if config.has_skip:
        weights["W_skip"] = tensors["W_skip"].T
    factor = tensors.get("scaling_factor")
    if factor is not None and not torch.allclose(factor, torch.ones_like(factor)):
        if not cfg.get("finetuning_scaling_factor"):
            raise CheckpointError(
                f"{where} has a scaling_factor that is not 1, but its config does not say "
                "finetuning_scaling_factor: whether latents are multiplied with it is unknown"
            )
        weights["W_dec"] = weights["W_dec"] * factor[:, None]  # it multiplied latents as they were decoded
    return weights


def _scaling_factor(checkpoint: Checkpoint, options: LoadOptions, where: str) -> float:
    """What training multiplied activations with, from the caller or the file beside a checkpoint."""
    if options.scaling_factor is not None:
        return options.scaling_factor
    beside = checkpoint.folder / _SCALER
    if _SCALER in checkpoint:
        factor = checkpoint.json(_SCALER).get("scaling_factor")
        if factor is not None:
            return number(factor, "scaling_factor", str(beside))
    raise CheckpointError(
        f"{where} says that activations were scaled to a common norm (expected_average_only_in), but "
        f"{beside} does not tell the factor; give scaling_factor=√d_in / mean norm, or 1.0 where it is "
        "already folded in"
    )
