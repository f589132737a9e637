"""Gemma Scope: version 1 `params.npz` (Gemma 2), version 2 `params.safetensors` + `config.json` (Gemma 3).

    h = x @ W_enc + b_enc;  latents = h * (h > threshold);  output = latents @ W_dec + b_dec [+ x @ A]

without any input bias. Version 1 tells its site in the folders' names only. The skip matrix A is
[d_in, d_out] and used as it is (a loader elsewhere transposes it). Cross-layer ones are in `cross_layer`.
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
    layer_in_path,
)
from neuron_lens.errors import CheckpointError

__all__ = ["EXPECTS", "NAME", "load", "recognises", "sites_in_path"]

NAME = "gemma_scope"
EXPECTS = "params.npz, or params.safetensors + config.json"

_POST, _MLP, _HEADS = "resid.torso.post_mlp", "resid.torso.delta_mlp", "attn.v_out"
# Words in a folder's name -> (site read, site written). A transcoder of version 1 reads the normalised stream
# before the norm's weight, one of version 2 what the MLP is given.
_WORDS: dict[int, list[tuple[str, str, str]]] = {
    1: [
        ("transcoder", "resid.torso.ln_mlp.post_scale", _MLP),
        ("embedding", "emb.tok", "emb.tok"),
        ("res", _POST, _POST),
        ("mlp", _MLP, _MLP),
        ("att", _HEADS, _HEADS),
    ],
    2: [
        ("transcoder", "resid.torso.post_ln_mlp", _MLP),
        ("clt", "resid.torso.post_ln_mlp", _MLP),
        ("resid_post", _POST, _POST),
        ("attn_out", _HEADS, _HEADS),
        ("mlp_out", _MLP, _MLP),
    ],
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether these files are of this format."""
    return _file(checkpoint) is not None


def _file(checkpoint: Checkpoint) -> str | None:
    archives = [name for name in checkpoint.names if name.endswith(".npz") and "/" not in name]
    if "params.npz" in archives:
        return "params.npz"
    if checkpoint.path.is_file() and archives:
        return archives[0]
    return "params.safetensors" if "params.safetensors" in checkpoint else None


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring."""
    name = _file(checkpoint)
    if name is None:
        raise CheckpointError(f"{checkpoint.path}: expected {EXPECTS}")
    return _version_1(checkpoint, name) if name.endswith(".npz") else _version_2(checkpoint, name)


def sites_in_path(path: Path, version: int) -> tuple[Site | None, Site | None, list[str]]:
    """The sites that folder names tell (read, written), and notes where they do not."""
    layer = layer_in_path(path)
    for part in reversed(path.absolute().parts):
        words = part.replace("-", "_").split("_")
        for word, path_in, path_out in _WORDS[version]:
            if word in words or f"{word}s" in words or ("_" in word and word in part):
                if path_in == "emb.tok":
                    note = "an embedding autoencoder reads token embeddings before Gemma's factor √d_model"
                    return Site(path=path_in), Site(path=path_out), [note]
                if layer is not None:
                    return Site(path=path_in, layer=layer), Site(path=path_out, layer=layer), []
    return None, None, [f"no site: the folder names in {path} do not tell which it is"]


def _version_1(checkpoint: Checkpoint, name: str) -> Loaded:
    tensors = checkpoint.tensors(name)
    check_names(tensors, ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"], str(checkpoint.folder / name))
    site_in, site_out, notes = sites_in_path(checkpoint.path, 1)
    return Loaded(
        config=_config(tensors["W_enc"], tensors["W_dec"], site_in, site_out, False, None),
        weights=_weights(tensors, "W_enc", "W_dec"),
        notes=notes,
    )


def _version_2(checkpoint: Checkpoint, name: str) -> Loaded:
    if not (checkpoint.folder / "config.json").is_file():
        raise CheckpointError(f"{checkpoint.folder} has {name} but not its config.json")
    source = checkpoint.json("config.json")
    if source.get("architecture") != "jump_relu":
        raise CheckpointError(
            f"{checkpoint.folder / 'config.json'} has the architecture {source.get('architecture')!r}; "
            "Gemma Scope's is 'jump_relu'"
        )
    tensors = checkpoint.tensors(name)
    check_names(
        tensors,
        ["w_enc", "w_dec", "b_enc", "b_dec", "threshold"],
        str(checkpoint.folder / name),
        optional=["affine_skip_connection"],
    )
    site_in, site_out, notes = sites_in_path(checkpoint.path, 2)
    skip = tensors.get("affine_skip_connection")
    weights = _weights(tensors, "w_enc", "w_dec")
    if skip is not None:
        weights["W_skip"] = skip
    config = _config(
        tensors["w_enc"], tensors["w_dec"], site_in, site_out, skip is not None, source.get("model_name")
    )
    return Loaded(config=config, weights=weights, source_config=source, notes=notes)


def _config(
    W_enc: Any, W_dec: Any, site_in: Site | None, site_out: Site | None, has_skip: bool, model: str | None
) -> AutoencoderConfig:
    return AutoencoderConfig(
        d_in=W_enc.shape[0],
        d_latent=W_enc.shape[1],
        d_out=W_dec.shape[-1],
        activation="jumprelu",
        relu_after_selection=False,
        has_skip=has_skip,
        flatten_heads=site_in is not None and site_in.path == _HEADS,
        site_in=site_in,
        site_out=site_out,
        model_name=model,
        prepend_bos=True,
    )


def _weights(tensors: dict[str, Any], encoder: str, decoder: str) -> Weights:
    return {
        "W_enc": tensors[encoder],
        "W_dec": tensors[decoder],
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
        "activation.threshold": tensors["threshold"],
    }
