"""circuit-tracer transcoders: one `layer_i.safetensors` per layer, beside the set's `config.yaml`.

W_enc is stored [d_latent, d_in]; W_skip [d_out, d_in], used as x @ W_skip.T. With
`activation_function.threshold` the activation is h * (h > threshold), without it relu, or top-k where `k` is
given (in the file or the set's config). Cross-layer transcoders are in `cross_layer`.
"""

from __future__ import annotations

import re
from typing import Any

from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.autoencoders.formats.source import (
    Checkpoint,
    Loaded,
    LoadOptions,
    check_names,
    integer,
)
from neuron_lens.autoencoders.sites import site_from_name
from neuron_lens.errors import CheckpointError, MissingExtraError

__all__ = ["EXPECTS", "LAYER_FILE", "NAME", "load", "read_set_config", "recognises"]

NAME = "circuit_tracer"
EXPECTS = "a layer_N.safetensors (its set's config.yaml beside it)"

LAYER_FILE = r"layer_(\d+)\.safetensors"
_THRESHOLD = "activation_function.threshold"


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether this is a layer's file, or a folder of them."""
    return bool(checkpoint.matching(LAYER_FILE))


def load(checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
    """See the module docstring. A folder must hold one layer only; `load_autoencoders` reads them all."""
    files = checkpoint.matching(LAYER_FILE)
    if len(files) != 1:
        raise CheckpointError(
            f"{checkpoint.path} holds {len(files)} layers' transcoders: name one file "
            f"({', '.join(list(files.values())[:4])}, …), or read all with load_autoencoders"
        )
    ((layer, name),) = files.items()
    where, tensors = str(checkpoint.folder / name), checkpoint.tensors(name)
    check_names(tensors, ["W_enc", "W_dec", "b_enc", "b_dec"], where, optional=[_THRESHOLD, "W_skip", "k"])
    source = read_set_config(checkpoint)
    weights: Weights = {
        "W_enc": tensors["W_enc"].T,
        "W_dec": tensors["W_dec"],
        "b_enc": tensors["b_enc"],
        "b_dec": tensors["b_dec"],
    }
    fields: dict[str, Any] = {"activation": "relu"}
    k = tensors.get("k", source.get("k"))
    if _THRESHOLD in tensors:
        fields = {"activation": "jumprelu", "relu_after_selection": False}
        weights["activation.threshold"] = tensors[_THRESHOLD]
    elif k is not None or source.get("activation") == "topk":
        fields = {"activation": "topk", "k": integer(k, "k", where)}
    if "W_skip" in tensors:
        weights["W_skip"] = tensors["W_skip"].T
    config = AutoencoderConfig(
        d_in=tensors["W_enc"].shape[1],
        d_latent=tensors["W_enc"].shape[0],
        d_out=tensors["b_dec"].shape[0],
        has_skip="W_skip" in tensors,
        site_in=site_from_name(str(source.get("feature_input_hook") or ""), layer),
        site_out=site_from_name(str(source.get("feature_output_hook") or ""), layer),
        model_name=source.get("model_name"),
        **fields,
    )
    return Loaded(config=config, weights=weights, source_config=source)


def read_set_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The set's `config.yaml`, beside the layers; empty when there is none."""
    path = checkpoint.folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError("pyyaml", "hf", "reading circuit-tracer's config.yaml") from error
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = re.sub(r"\s+", " ", str(error))
        raise CheckpointError(f"cannot read {path} as YAML: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a YAML {type(value).__name__}, not a mapping")
    checkpoint.files_read.append("config.yaml")
    return value
