"""Open a checkpoint: a name, a folder, a remote path, or a model object of Hugging Face's library."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.files.hub import resolve_checkpoint
from neuron_lens.files.safetensors import TensorSource, open_tensors
from neuron_lens.loading.config_map import map_config
from neuron_lens.loading.definitions import Definition
from neuron_lens.loading.registry import definition_for
from neuron_lens.loading.weight_map import fill, plan_filling
from neuron_lens.tokenizers import as_tokenizer, load_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = ["load"]

_log = logging.getLogger(__name__)
_TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer.json", "vocab.json")


def load(
    name_or_path_or_model: Any,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = "its own",
    revision: str | None = None,
) -> Transformer:
    """Open a checkpoint as a Transformer.

    Nothing is changed on the way: norms are not folded, nothing is centred. Parameters view the mapped file where dtype
    and layout allow it, so memory is touched when it is first used and no second copy is made.

    Args:
        name_or_path_or_model: a shipped or hub name (`pico`, `EleutherAI/pythia-160m`), a folder in Hugging Face's layout, a
            remote folder (`https://`, `gs://`, `az://`), or a model object of `transformers`, whose weights are copied:
            neither model can change the other's.
        device: where the parameters go.
        dtype: of the parameters. None: the checkpoint's own, but float32 instead of float16 on the CPU, where
            half-precision arithmetic is slow and overflows.
        tokenizer: by default the checkpoint's own, where it has one that can be read; None for none; else a tokenizer, or
            the name or path of one.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: files that are missing, damaged or contradict each other, an unknown architecture,
            config fields nobody reads, tensors without a place.
    """
    device = torch.device(device)
    if isinstance(name_or_path_or_model, str | os.PathLike):
        return _load_folder(name_or_path_or_model, device, dtype, tokenizer, revision)
    if hasattr(name_or_path_or_model, "state_dict") and hasattr(name_or_path_or_model, "config"):
        return _from_object(name_or_path_or_model, device, dtype, tokenizer)
    raise RequestError(
        f"cannot load {type(name_or_path_or_model).__name__}: expected a name, a path, or a model of transformers"
    )


def _load_folder(
    name: str | os.PathLike[str],
    device: torch.device,
    dtype: torch.dtype | str | None,
    tokenizer: Any,
    revision: str | None,
) -> Transformer:
    folder = resolve_checkpoint(name, revision=revision)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the folder that holds config.json and the weights")
    raw = _read_config(folder / "config.json")
    source = str(folder / "config.json")
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{source}: the weights are quantised ({str(raw['quantization_config'])[:120]}), which is not supported; give "
            f"an unquantised checkpoint, such as one saved by transformers after dequantising"
        )
    definition = definition_for(raw, source)
    config = map_config(raw, definition, source=source, name=_model_name(name))
    tensors = open_tensors(folder)
    wanted = _parameter_dtype(dtype, device, tensors.dtype(_largest(tensors)))

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=wanted)

    def get(name: str, copied: bool) -> Tensor:
        viewed = not copied and device.type == "cpu" and tensors.dtype(name) == wanted
        return tensors.get(name) if viewed else tensors.read(name)

    model = _built(config, definition, tensors.names(), get, convert, str(folder))
    model.tokenizer = _tokenizer(tokenizer, folder)
    if dtype is None and revision is None and isinstance(tokenizer, str) and tokenizer == "its own":
        model.loaded_from = str(name)
    return model


def _from_object(
    given: Any, device: torch.device, dtype: torch.dtype | str | None, tokenizer: Any
) -> Transformer:
    """From a model object: its own config and weights, copied."""
    source = f"the {type(given).__name__} object"
    raw = dict(given.config.to_dict())
    raw["architectures"] = [type(given).__name__]
    definition = definition_for(raw, source)
    config = map_config(raw, definition, source=source, name=_model_name(raw.get("_name_or_path") or ""))
    state = _saved_state(given)
    wanted = _parameter_dtype(dtype, device, max(state.values(), key=Tensor.numel).dtype)

    def convert(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=wanted, copy=True)

    model = _built(config, definition, list(state), lambda name, copied: state[name], convert, source)
    model.tokenizer = None if tokenizer == "its own" else _tokenizer(tokenizer, None)
    return model


def _saved_state(given: Any) -> dict[str, Tensor]:
    """The state dict under the names of the files: transformers 5 holds some models otherwise in memory."""
    state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in given.state_dict().items()}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4, or an object of something else that looks like its models
        return state
    return dict(revert_weight_conversion(given, state))


def _built(
    config: TransformerConfig,
    definition: Definition,
    names: list[str],
    get: Callable[[str, bool], Tensor],
    convert: Callable[[Tensor], Tensor],
    source: str,
) -> Transformer:
    fillings = plan_filling(names, definition, source)
    with torch.device("meta"):
        model = Transformer(config, seed=None)
    fill(model, fillings, get, convert, source)
    return model.eval()


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} holds no config.json; it says what the weights beside it are"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; download or save it again") from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(raw).__name__}; expected an object with 'architectures'"
        )
    return raw


def _largest(tensors: TensorSource) -> str:
    return max(tensors.names(), key=lambda name: torch.Size(tensors.shape(name)).numel())


def _parameter_dtype(
    asked: torch.dtype | str | None, device: torch.device, stored: torch.dtype
) -> torch.dtype:
    if asked is None:
        return torch.float32 if stored == torch.float16 and device.type == "cpu" else stored
    dtype = getattr(torch, asked, None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise RequestError(
            f"dtype {asked!r} is no floating-point dtype; expected float32, bfloat16, float16 or float64"
        )
    return dtype


def _tokenizer(asked: Any, folder: Path | None) -> Any:
    if asked is None:
        return None
    if asked != "its own":
        return as_tokenizer(asked)
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        _log.info("%s has no tokenizer that can be read; the model takes token ids only", folder)
        return None
    return load_tokenizer(folder)


def _model_name(name: str | os.PathLike[str]) -> str:
    return os.fspath(name).rstrip("/").rsplit("/", 1)[-1]
