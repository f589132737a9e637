"""Three small formats, each one `.pt` file of plain weights and relu.

- Goodfire: `encoder_linear.*`, `decoder_linear.*`; no input bias.
- qresearch (DeepSeek R1): `encoder.*`, `decoder.*`; no input bias.
- ckkissane's attention autoencoders: `X.pt` (W_enc, b_enc, W_dec, b_dec) + `X_cfg.json`; reads the heads'
  outputs side by side and subtracts b_dec.
"""

from __future__ import annotations

from pathlib import Path
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
from neuron_lens.autoencoders.sites import site_from_name
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "plain_pickles"
EXPECTS = (
    "a .pt file with encoder_linear.weight (Goodfire) or encoder.weight and decoder.bias (qresearch), or "
    "X.pt + X_cfg.json with W_enc (ckkissane)"
)

# prefix of the encoder's and decoder's names
_LINEAR = {"goodfire": ("encoder_linear", "decoder_linear"), "qresearch": ("encoder", "decoder")}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this file is of one of these formats."""
    if not checkpoint.path.is_file() or checkpoint.path.suffix not in (".pt", ".pth"):
        return False
    held = checkpoint.tensors(checkpoint.path.name).keys()
    return _linear_prefixes(held) is not None or ("W_enc" in held and _config_beside(checkpoint).is_file())


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    if not checkpoint.path.is_file():
        raise CheckpointError(f"{checkpoint.path} is a folder; expected {EXPECTS}")
    tensors, where = checkpoint.tensors(checkpoint.path.name), str(checkpoint.path)
    prefixes = _linear_prefixes(tensors.keys())
    if prefixes is None:
        return _hook_z(checkpoint, tensors, where)
    encoder, decoder = prefixes
    check_names(tensors, [f"{each}.{part}" for each in prefixes for part in ("weight", "bias")], where)
    weights: Weights = {
        "W_enc": tensors[f"{encoder}.weight"].T,
        "b_enc": tensors[f"{encoder}.bias"],
        "W_dec": tensors[f"{decoder}.weight"].T,
        "b_dec": tensors[f"{decoder}.bias"],
    }
    layer = layer_in_path(checkpoint.path)
    site = None if layer is None else Site(path="resid.torso.post_mlp", layer=layer)
    config = AutoencoderConfig(
        d_in=weights["W_enc"].shape[0], d_latent=weights["W_enc"].shape[1], activation="relu", site_in=site
    )
    note = "the layer is read from the file's name; both projects publish residual stream autoencoders"
    return Loaded(config=config, weights=weights, notes=[note])


def _hook_z(checkpoint: Checkpoint, tensors: dict[str, Any], where: str) -> Loaded:
    beside = _config_beside(checkpoint)
    if not beside.is_file():
        raise CheckpointError(f"{where} needs its config beside it, {beside.name}")
    source = checkpoint.json(beside.name)
    names = ["W_enc", "b_enc", "W_dec", "b_dec"]
    check_names(tensors, names, where)
    config = AutoencoderConfig(
        d_in=integer(take_field(source, "act_size", str(beside)), "act_size", str(beside)),
        d_latent=integer(take_field(source, "dict_size", str(beside)), "dict_size", str(beside)),
        activation="relu",
        input_bias="decoder_bias",
        flatten_heads=True,
        site_in=site_from_name(str(source.get("act_name") or "")),
        model_name=source.get("model_name"),
    )
    return Loaded(config=config, weights={name: tensors[name] for name in names}, source_config=source)


def _config_beside(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.with_name(f"{checkpoint.path.stem}_cfg.json")


def _linear_prefixes(held: Any) -> tuple[str, str] | None:
    for encoder, decoder in _LINEAR.values():
        # `encoder.weight` alone is in other formats too: those have biases of other names
        if {f"{encoder}.weight", f"{encoder}.bias", f"{decoder}.weight", f"{decoder}.bias"} <= set(held):
            return encoder, decoder
    return None
