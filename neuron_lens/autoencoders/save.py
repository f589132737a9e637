"""Save an autoencoder so that others can read it: as a SAELens (version 6) folder, or as circuit-tracer's transcoder.

What a format cannot say is folded into the weights; what cannot be folded is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from neuron_lens.autoencoders.autoencoder import Autoencoder
from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.folding import Weights, fold_input_bias, fold_scale
from neuron_lens.autoencoders.sites import published_name
from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path, write_json_atomic, write_text_atomic

__all__ = ["save_autoencoder", "save_circuit_tracer", "save_saelens"]

# The version whose layout this is; SAELens reads it to tell its old flat configs from new ones.
_SAELENS_VERSION = "6.0.0"

# (activation, is a transcoder, has a skip term) -> SAELens' architecture
_ARCHITECTURES = {
    ("relu", False, False): "standard",
    ("gated", False, False): "gated",
    ("topk", False, False): "topk",
    ("abs_topk", False, False): "abstopk",
    ("jumprelu", False, False): "jumprelu",
    ("batch_topk", False, False): "jumprelu",
    ("relu", True, False): "transcoder",
    ("relu", True, True): "skip_transcoder",
    ("jumprelu", True, False): "jumprelu_transcoder",
    ("jumprelu", True, True): "jumprelu_skip_transcoder",
    ("batch_topk", True, False): "jumprelu_transcoder",
    ("batch_topk", True, True): "jumprelu_skip_transcoder",
}


def save_autoencoder(autoencoder: Autoencoder, folder: str | Path) -> str:
    """Write it in SAELens' format, or a top-k transcoder, which that does not know, in circuit-tracer's.

    Returns the format's name. Raises RequestError for what neither can express.
    """
    if autoencoder.config.is_transcoder and autoencoder.config.activation == "topk":
        save_circuit_tracer(autoencoder, folder)
        return "circuit_tracer"
    save_saelens(autoencoder, folder)
    return "saelens"


def save_circuit_tracer(autoencoder: Autoencoder, folder: str | Path) -> None:
    """Write `layer_N.safetensors` and the set's `config.yaml` into `folder`.

    For transcoders (relu, top-k, jump-relu that does not clip) within one layer; layers of one set may share a folder.

    Raises:
        RequestError: another architecture, a site without a published name, two layers.
    """
    config = autoencoder.config
    weights: Weights = {name: tensor.detach() for name, tensor in autoencoder.state_dict().items()}
    if config.normalisation == "scale":
        config, weights = fold_scale(config, weights, config.scale_in, config.scale_out)
    config, weights = fold_input_bias(config, weights)
    read, written = config.site_in, config.site_out
    said = config.activation in ("relu", "topk") or (
        config.activation == "jumprelu" and not config.relu_after_selection
    )
    if not said or config.normalisation != "none" or config.decoder_norm != "ignore" or config.flatten_heads:
        raise RequestError(f"circuit-tracer has no place for this autoencoder: {autoencoder.extra_repr()}")
    if read is None or written is None or read.layer is None or read.layer != written.layer:
        raise RequestError(
            f"circuit-tracer's transcoders read and write in one layer; this one reads {read} and writes {written}"
        )
    names = {site.path: published_name(site) for site in (read, written)}
    unknown = [path for path, name in names.items() if name is None]
    if unknown:
        raise RequestError(f"{unknown[0]} has no published name, so it cannot be written down")
    hooks = [str(names[site.path]).removeprefix(f"blocks.{site.layer}.") for site in (read, written)]
    fields = {
        "model_name": config.model_name or "",
        "model_kind": "transcoder_set",
        "feature_input_hook": hooks[0],
        "feature_output_hook": hooks[1],
    }
    tensors = {"W_enc": weights["W_enc"].T, **{name: weights[name] for name in ("W_dec", "b_enc", "b_dec")}}
    if config.activation == "topk":
        fields["activation"], tensors["k"] = "topk", torch.tensor(config.k)
    if config.activation == "jumprelu":
        tensors["activation_function.threshold"] = weights["activation.threshold"]
    if config.has_skip:
        tensors["W_skip"] = weights["W_skip"].T
    _write(tensors, Path(folder) / f"layer_{read.layer}.safetensors")
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    write_text_atomic(Path(folder) / "config.yaml", "\n".join(lines) + "\n")


def save_saelens(autoencoder: Autoencoder, folder: str | Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` into `folder`, each whole or not at all.

    Batch top-k is written as jumprelu with its one threshold, as SAELens does. An input bias of its own and
    normalisation "scale" are folded into the weights.

    Raises:
        RequestError: what SAELens' inference classes cannot express (group-max, top-k transcoders, …).
    """
    config = autoencoder.config
    weights: Weights = {name: tensor.detach() for name, tensor in autoencoder.state_dict().items()}
    architecture = _architecture(config, weights)
    if config.normalisation == "scale":
        config, weights = fold_scale(config, weights, config.scale_in, config.scale_out)
    if config.input_bias == "own" or (config.is_transcoder and config.input_bias != "none"):
        config, weights = fold_input_bias(config, weights)
    tensors = {name.removeprefix("activation."): tensor for name, tensor in weights.items()}
    if config.activation == "batch_topk":
        # SAELens clips with h > θ what is kept here by relu(h) > θ: the same once θ is not below zero
        tensors["threshold"] = tensors["threshold"].clamp(min=0).expand(config.d_latent)
    if config.has_skip:
        tensors["W_skip"] = tensors["W_skip"].T
    _write(tensors, Path(folder) / "sae_weights.safetensors")
    write_json_atomic(Path(folder) / "cfg.json", _config(config, architecture, autoencoder.dtype))


def _write(tensors: Weights, path: Path) -> None:
    from safetensors.torch import save_file

    ready = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(ready, temporary)


def _architecture(config: AutoencoderConfig, weights: Weights) -> str:
    key = (config.activation, config.is_transcoder, config.has_skip)
    if key not in _ARCHITECTURES:
        kind = "transcoder" if config.is_transcoder else "autoencoder"
        skip = " with a skip term" if config.has_skip else ""
        raise RequestError(f"SAELens has no {config.activation} {kind}{skip}, so it cannot be saved for it")
    if config.decoder_norm == "select_only":
        raise RequestError("SAELens cannot rank latents by decoder norm without scaling them too")
    if not config.relu_after_selection and config.activation == "topk":
        raise RequestError("SAELens' top-k always clips at zero; this autoencoder keeps negative latents")
    if not config.relu_after_selection and bool(
        (weights.get("activation.threshold", torch.zeros(1)) < 0).any()
    ):
        raise RequestError("SAELens clips latents at zero; this autoencoder has thresholds below zero")
    return _ARCHITECTURES[key]


def _config(config: AutoencoderConfig, architecture: str, dtype: torch.dtype) -> dict[str, Any]:
    source = (config.provenance.source_config if config.provenance else {}).get("metadata") or {}
    metadata: dict[str, Any] = {
        "sae_lens_version": _SAELENS_VERSION,
        "sae_lens_training_version": source.get("sae_lens_training_version"),
        "model_name": config.model_name,
        "context_size": config.context_size,
        "prepend_bos": config.prepend_bos,
        "hook_name": published_name(config.site_in) if config.site_in else source.get("hook_name"),
        "hook_head_index": config.site_in.head if config.site_in else source.get("hook_head_index"),
    }
    if config.is_transcoder:
        metadata["hook_name_out"] = (
            published_name(config.site_out) if config.site_out else source.get("hook_name_out")
        )
    fields: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.d_latent,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.input_bias == "decoder_bias",
        "normalize_activations": config.normalisation,
        "reshape_activations": "hook_z" if config.flatten_heads else "none",
        "metadata": metadata,
    }
    if config.is_transcoder:
        fields["d_out"] = config.d_out
    if config.activation in ("topk", "abs_topk"):
        fields["k"] = config.k
        fields["rescale_acts_by_decoder_norm"] = config.decoder_norm == "scale_latents"
    return fields
