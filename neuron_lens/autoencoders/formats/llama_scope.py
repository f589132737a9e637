"""Llama Scope (OpenMOSS), its three layouts.

1. `hyperparams.json` + `checkpoints/final.safetensors`: jump-relu with one threshold τ. The dataset's average
   norms are folded in so that latents stay at the raw scale:
   latents = JumpReLU_τ(x @ W_enc + b_enc / s_in);  output = latents @ (W_dec s_in / s_out) + b_dec / s_out,
   with s = √d_model / norm.
2. `config.json` + `sae_weights.safetensors` with `log_jumprelu_threshold` (the distilled R1 release).
3. the same files with `W_E`, `W_D` (Llamascopium): x s_in goes in, the output is divided by s_out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.folding import Weights
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
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "llama_scope"
EXPECTS = "hyperparams.json + checkpoints/final.safetensors, or config.json + sae_weights.safetensors"

_V1_CONFIG, _V1_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_CONFIG, _WEIGHTS = "config.json", "sae_weights.safetensors"
_LINEAR = ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"]
_NORM = "dataset_average_activation_norm."
_LOG_THRESHOLD = "activation_function.log_jumprelu_threshold"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether these files are of this format."""
    newer = _CONFIG in checkpoint and _WEIGHTS in checkpoint
    return newer or (_V1_CONFIG in checkpoint and _V1_WEIGHTS in checkpoint)


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    if _V1_CONFIG in checkpoint:
        return _version_1(checkpoint)
    tensors = checkpoint.tensors(_WEIGHTS)
    return _llamascopium(checkpoint) if "W_E" in tensors else _distilled(checkpoint)


def _version_1(checkpoint: Checkpoint) -> Loaded:
    where = str(checkpoint.folder / _V1_CONFIG)
    source, tensors = checkpoint.json(_V1_CONFIG), checkpoint.tensors(_V1_WEIGHTS)
    check_names(tensors, _LINEAR, str(checkpoint.folder / _V1_WEIGHTS))
    if source.get("act_fn", "jumprelu") != "jumprelu":
        raise CheckpointError(f"{where} has the act_fn {source['act_fn']!r}; expected 'jumprelu'")
    _refuse(source, where, "use_glu_encoder", "apply_decoder_bias_to_pre_encoder")
    d_model = integer(take_field(source, "d_model", where), "d_model", where)
    d_latent = integer(take_field(source, "d_sae", where), "d_sae", where)
    norms = take_field(source, "dataset_average_activation_norm", where)
    scale_in, scale_out = (
        d_model**0.5 / number(take_field(norms, side, where), f"norm {side}", where) for side in ("in", "out")
    )
    tau = number(take_field(source, "jump_relu_threshold", where), "jump_relu_threshold", where)
    weights: Weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"] / scale_in,
        "W_dec": tensors["decoder.weight"].T * (scale_in / scale_out),
        "b_dec": tensors["decoder.bias"] / scale_out,
        "activation.threshold": torch.full((d_latent,), tau),
    }
    config = AutoencoderConfig(d_in=d_model, d_latent=d_latent, activation="jumprelu", **_sites(source))
    notes = [f"folded the dataset's norms into the weights: s_in {scale_in}, s_out {scale_out}"]
    return Loaded(config=config, weights=weights, source_config=source, notes=notes)


def _distilled(checkpoint: Checkpoint) -> Loaded:
    where = str(checkpoint.folder / _CONFIG)
    source, tensors = checkpoint.json(_CONFIG), checkpoint.tensors(_WEIGHTS)
    check_names(tensors, [*_LINEAR, "log_jumprelu_threshold"], str(checkpoint.folder / _WEIGHTS))
    d_model = integer(take_field(source, "d_model", where), "d_model", where)
    factor = integer(take_field(source, "expansion_factor", where), "expansion_factor", where)
    weights: Weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["decoder.bias"],
        "activation.threshold": tensors["log_jumprelu_threshold"].exp(),
    }
    config = AutoencoderConfig(
        d_in=d_model, d_latent=d_model * factor, activation="jumprelu", **_sites(source)
    )
    return Loaded(config=config, weights=weights, source_config=source)


def _llamascopium(checkpoint: Checkpoint) -> Loaded:
    where = str(checkpoint.folder / _CONFIG)
    source, tensors = checkpoint.json(_CONFIG), checkpoint.tensors(_WEIGHTS)
    _refuse(source, where, "use_glu_encoder", "apply_decoder_bias_to_pre_encoder")
    kind = str(source.get("act_fn", "jumprelu"))
    required = ["W_E", "b_E", "W_D", "b_D", *([_LOG_THRESHOLD] if kind == "jumprelu" else [])]
    norms = [name for name in tensors if name.startswith(_NORM)]
    check_names(tensors, required, str(checkpoint.folder / _WEIGHTS), optional=norms)
    weights: Weights = {
        "W_enc": tensors["W_E"],
        "b_enc": tensors["b_E"],
        "W_dec": tensors["W_D"],
        "b_dec": tensors["b_D"],
    }
    includes_norm = bool(source.get("sparsity_include_decoder_norm"))
    fields: dict[str, Any] = {"activation": kind}
    if kind == "jumprelu":
        threshold = tensors[_LOG_THRESHOLD].exp()
        # h * ‖W_D‖ > θ is h > θ / ‖W_D‖
        rows = tensors["W_D"].norm(dim=-1).clamp(min=1e-8)
        weights["activation.threshold"] = threshold / rows if includes_norm else threshold
    elif kind == "topk":
        fields["k"] = integer(take_field(source, "top_k", where), "top_k", where)
        fields["decoder_norm"] = "select_only" if includes_norm else "ignore"
    elif kind != "relu":
        raise CheckpointError(f"{where} has the act_fn {kind!r}; expected 'jumprelu', 'topk' or 'relu'")
    d_in, d_latent = tensors["W_E"].shape
    if norms:
        fields |= _scales(source, tensors, (d_in, tensors["W_D"].shape[1]), where)
    config = AutoencoderConfig(
        d_in=d_in, d_latent=d_latent, d_out=tensors["W_D"].shape[1], **fields, **_sites(source)
    )
    return Loaded(config=config, weights=weights, source_config=source)


def _scales(
    source: dict[str, Any], tensors: dict[str, Tensor], widths: tuple[int, int], where: str
) -> dict[str, Any]:
    """Fields of normalisation "scale" from the norms stored per hook point."""
    hook_in = str(take_field(source, "hook_point_in", where))
    hooks = (hook_in, str(source.get("hook_point_out") or hook_in))
    check_names([name for name in tensors if name.startswith(_NORM)], {_NORM + h for h in hooks}, where)
    scales = [
        width**0.5 / number(tensors[_NORM + hook], _NORM + hook, where)
        for width, hook in zip(widths, hooks, strict=True)
    ]
    return {"normalisation": "scale", "scale_in": scales[0], "scale_out": scales[1]}


def _sites(source: dict[str, Any]) -> dict[str, Any]:
    name = str(source.get("hook_point_in") or "")
    return {
        "site_in": site_from_name(name),
        "site_out": site_from_name(str(source.get("hook_point_out") or name)),
        "model_name": source.get("model_name"),
    }


def _refuse(source: dict[str, Any], where: str, *options: str) -> None:
    used = [name for name in options if source.get(name)]
    if used:
        raise CheckpointError(f"{where} uses {', '.join(used)}, which is not supported")
