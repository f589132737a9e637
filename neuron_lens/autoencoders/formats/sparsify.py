"""EleutherAI sparsify: `<hookpoint>/cfg.json` + `sae.safetensors`; the folder's name is the module hooked.

    h = (x − b_dec) @ encoder.weight.T + encoder.bias    (a transcoder does not subtract b_dec)
    latents = top-k or group-max of relu(h);  output = latents @ W_dec + b_dec [+ x @ W_skip.T]

`num_latents` 0 means d_in * expansion_factor. W_dec is [d_latent, d], not transposed.
"""

from __future__ import annotations

from typing import Any

from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.autoencoders.formats.source import (
    Checkpoint,
    Loaded,
    LoadOptions,
    check_names,
    integer,
    take_field,
)
from neuron_lens.autoencoders.sites import site_from_hookpoint
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises"]

NAME = "sparsify"
EXPECTS = "cfg.json + sae.safetensors"

_CONFIG, _WEIGHTS = "cfg.json", "sae.safetensors"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether these files are of this format."""
    return _CONFIG in checkpoint and _WEIGHTS in checkpoint


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    where = str(checkpoint.folder / _CONFIG)
    source, tensors = checkpoint.json(_CONFIG), checkpoint.tensors(_WEIGHTS)
    has_skip, transcode = bool(source.get("skip_connection")), bool(source.get("transcode"))
    required = ["encoder.weight", "encoder.bias", "W_dec", "b_dec", *(["W_skip"] if has_skip else [])]
    check_names(tensors, required, str(checkpoint.folder / _WEIGHTS))
    weights: Weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    if has_skip:
        weights["W_skip"] = tensors["W_skip"].T
    hookpoint = checkpoint.folder.absolute().name
    d_in = integer(take_field(source, "d_in", where), "d_in", where)
    config = AutoencoderConfig(
        d_in=d_in,
        d_latent=_width(source, d_in, where),
        d_out=tensors["b_dec"].shape[0],
        k=integer(take_field(source, "k", where), "k", where),
        input_bias="none" if transcode else "decoder_bias",
        has_skip=has_skip,
        site_in=site_from_hookpoint(hookpoint, of_input=transcode),
        site_out=site_from_hookpoint(hookpoint),
        **_activation(source, where),
    )
    notes = [] if config.site_in else [f"no site: {hookpoint!r} is not a module whose place is known"]
    return Loaded(config=config, weights=weights, source_config=source, notes=notes)


def _width(source: dict[str, Any], d_in: int, where: str) -> int:
    given = integer(source.get("num_latents") or 0, "num_latents", where)
    if given:
        return given
    return d_in * integer(take_field(source, "expansion_factor", where), "expansion_factor", where)


def _activation(source: dict[str, Any], where: str) -> dict[str, str]:
    kind = source.get("activation", "topk")
    if kind not in ("topk", "groupmax"):
        raise CheckpointError(f"{where} has the activation {kind!r}; expected 'topk' or 'groupmax'")
    if source.get("signed"):  # an older option: ranked by magnitude, signs kept
        return {"activation": "abs_topk"}
    return {"activation": str(kind)}
