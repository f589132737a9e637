"""dictionary_learning (Marks, Karvonen et al.): `ae.pt` + `config.json`, told apart by `trainer.dict_class`.

A finished `ae.pt` is a state dict whose biases and threshold already carry the norm factor of training. One
saved during training is {step, ae, optimizer, config, norm_factor} and does not: it is folded here, by
multiplying biases and thresholds with norm_factor, so that both read activations at their own scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from neuron_lens.autoencoders.config import AutoencoderConfig, Site
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
from neuron_lens.errors import CheckpointError, did_you_mean

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "dictionary_learning"
EXPECTS = "ae.pt + config.json"

_WEIGHTS, _CONFIG = "ae.pt", "config.json"
_BIASES = ("b_enc", "b_dec", "activation.b_gate", "activation.b_mag", "activation.threshold")

_SUBMODULES = [  # how a submodule's name ends before `layer_N`, and its site
    (r"resid(_post)?", "resid.torso.post_mlp"),
    (r"resid_mid", "resid.torso.post_attn"),
    (r"resid_pre", "resid.torso.pre_attn"),
    (r"mlp(_out)?", "resid.torso.delta_mlp"),
    (r"(attn|attention)(_out)?", "resid.torso.delta_attn"),
]

_Parsed = tuple[dict[str, Any], Weights]  # fields of the config, weights


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether these files are of this format."""
    return _WEIGHTS in checkpoint and _CONFIG in checkpoint


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    where = str(checkpoint.folder / _CONFIG)
    source = checkpoint.json(_CONFIG)
    trainer = source.get("trainer")
    if not isinstance(trainer, dict):
        raise CheckpointError(f"{where} lacks the section 'trainer'; it has {', '.join(sorted(source))}")
    kind = str(take_field(trainer, "dict_class", where))
    if kind not in _CLASSES:
        raise CheckpointError(
            f"{where} has the dict_class {kind!r}, which is not supported: {did_you_mean(kind, _CLASSES)}"
        )
    tensors, norm_factor, notes = checkpoint.tensors(_WEIGHTS), None, []
    if isinstance(tensors.get("ae"), dict):
        norm_factor = number(take_field(tensors, "norm_factor", where), "norm_factor", str(checkpoint.path))
        tensors = tensors["ae"]
    fields, weights = _CLASSES[kind](tensors, trainer, str(checkpoint.folder / _WEIGHTS))
    if norm_factor is not None:
        weights = {name: w * norm_factor if name in _BIASES else w for name, w in weights.items()}
        notes.append(f"saved during training: folded its norm factor {norm_factor} into the biases")
    buffer = source.get("buffer") or {}
    config = AutoencoderConfig(
        d_in=weights["W_enc"].shape[0],
        d_latent=weights["W_enc"].shape[1],
        site_in=_site(trainer),
        model_name=trainer.get("lm_name"),
        context_size=buffer.get("ctx_len"),
        **fields,
    )
    return Loaded(config=config, weights=weights, source_config=source, notes=notes)


def _site(trainer: dict[str, Any]) -> Site | None:
    name, layer = str(trainer.get("submodule_name") or ""), trainer.get("layer")
    hit = re.fullmatch(r"(.*?)_?layer_?(\d+)", name)
    if hit is None or not isinstance(layer, int) or int(hit[2]) != layer:
        return None
    path = next((path for pattern, path in _SUBMODULES if re.fullmatch(pattern, hit[1])), None)
    return None if path is None else Site(path=path, layer=layer)


def _auto_encoder(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    check_names(tensors, ["encoder.weight", "encoder.bias", "decoder.weight", "bias"], where)
    weights = _linear(tensors) | {"b_enc": tensors["encoder.bias"], "b_dec": tensors["bias"]}
    return {"activation": "relu", "input_bias": "decoder_bias"}, weights


def _auto_encoder_new(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    check_names(tensors, ["encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"], where)
    weights = _linear(tensors) | {"b_enc": tensors["encoder.bias"], "b_dec": tensors["decoder.bias"]}
    return {"activation": "relu"}, weights


def _gated(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    required = ["encoder.weight", "decoder.weight", "decoder_bias", "gate_bias", "mag_bias", "r_mag"]
    check_names(tensors, required, where)
    weights = _linear(tensors) | {
        "b_dec": tensors["decoder_bias"],
        "activation.b_gate": tensors["gate_bias"],
        "activation.b_mag": tensors["mag_bias"],
        "activation.r_mag": tensors["r_mag"],
    }
    return {"activation": "gated", "input_bias": "decoder_bias"}, weights


def _topk(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    required = ["encoder.weight", "encoder.bias", "decoder.weight", "b_dec"]
    check_names(tensors, required, where, optional=["k", "threshold"])
    weights = _linear(tensors) | {"b_enc": tensors["encoder.bias"], "b_dec": tensors["b_dec"]}
    return {"activation": "topk", "input_bias": "decoder_bias", "k": _k(tensors, trainer, where)}, weights


def _batch_topk(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    required = ["encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "threshold"]
    check_names(tensors, required, where, optional=["k"])
    weights = _linear(tensors) | {
        "b_enc": tensors["encoder.bias"],
        "b_dec": tensors["b_dec"],
        "activation.threshold": tensors["threshold"].reshape(()),
    }
    return {
        "activation": "batch_topk",
        "input_bias": "decoder_bias",
        "k": _k(tensors, trainer, where),
    }, weights


def _matryoshka(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    check_names(
        tensors, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"], where, optional=["k", "group_sizes"]
    )
    weights: Weights = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    weights["activation.threshold"] = tensors["threshold"].reshape(())
    sizes = tensors.get("group_sizes", trainer.get("group_sizes"))
    fields = {"activation": "batch_topk", "input_bias": "decoder_bias", "k": _k(tensors, trainer, where)}
    if sizes is not None:
        fields["group_sizes"] = tuple(int(size) for size in sizes)
    return fields, weights


def _jumprelu(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> _Parsed:
    check_names(tensors, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"], where)
    weights: Weights = {name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    weights["activation.threshold"] = tensors["threshold"]
    return {"activation": "jumprelu"}, weights


_CLASSES: dict[str, Callable[[dict[str, Any], dict[str, Any], str], _Parsed]] = {
    "AutoEncoder": _auto_encoder,
    "AutoEncoderNew": _auto_encoder_new,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}


def _linear(tensors: dict[str, Any]) -> Weights:
    return {"W_enc": tensors["encoder.weight"].T, "W_dec": tensors["decoder.weight"].T}


def _k(tensors: dict[str, Any], trainer: dict[str, Any], where: str) -> int:
    return integer(tensors["k"] if "k" in tensors else take_field(trainer, "k", where), "k", where)
