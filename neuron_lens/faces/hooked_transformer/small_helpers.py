"""Helpers around objects, devices and special tokens, under the names people import."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError

__all__ = [
    "USE_DEFAULT_VALUE",
    "filter_dict_by_prefix",
    "get_best_available_device",
    "get_device",
    "get_input_with_manually_prepended_bos",
    "get_nested_attr",
    "get_tokenizer_with_bos",
    "get_tokens_with_bos_removed",
    "is_library_available",
    "override_or_use_default_value",
    "print_gpu_mem",
    "set_nested_attr",
    "temporarily_swap_parameter",
    "warn_if_mps",
]

USE_DEFAULT_VALUE = None


def override_or_use_default_value(default_flag: Any, override: Any = None) -> Any:
    """The override, or the default where that is None."""
    return default_flag if override is None else override


def get_device() -> torch.device:
    """A CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def get_best_available_device(cfg: Any = None) -> torch.device:
    """`cfg.device` with its number, or `get_device()`."""
    return get_device() if cfg is None or cfg.device is None else torch.device(cfg.device)


def warn_if_mps(device: Any) -> None:
    """Nothing: the engine computes the same on every device torch has."""


def print_gpu_mem(step_name: str = "") -> None:
    """Print the memory torch holds on the CUDA device, in GiB; without one, say so."""
    if not torch.cuda.is_available():
        print(f"{step_name} no CUDA device".strip())
        return
    print(f"{step_name} {torch.cuda.memory_allocated() / 2**30:.2f} GiB on the CUDA device".strip())


def is_library_available(name: str) -> bool:
    """Whether a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def get_nested_attr(obj: Any, attr_str: str) -> Any:
    """`obj.a.b.c` for "a.b.c"; numbers index lists."""
    for part in attr_str.split("."):
        obj = obj[int(part)] if part.isdigit() else getattr(obj, part)
    return obj


def set_nested_attr(obj: Any, attr_str: str, value: Any) -> None:
    """`obj.a.b.c = value` for "a.b.c"."""
    above, _, last = attr_str.rpartition(".")
    setattr(get_nested_attr(obj, above) if above else obj, last, value)


def filter_dict_by_prefix(dictionary: dict[str, Any], prefix: str) -> dict[str, Any]:
    """The entries whose name begins with `prefix.`, named without it."""
    start = prefix if prefix.endswith(".") else f"{prefix}."
    return {name.removeprefix(start): value for name, value in dictionary.items() if name.startswith(start)}


@contextmanager
def temporarily_swap_parameter(parameter: nn.Parameter, new_value: Tensor) -> Iterator[nn.Parameter]:
    """Other values in a parameter inside a `with` block; the object stays, and its values come back.

    Raises RequestError for another shape or dtype.
    """
    if not isinstance(parameter, nn.Parameter):
        raise RequestError(f"expected a parameter; got {type(parameter).__name__}")
    if new_value.shape != parameter.shape or new_value.dtype != parameter.dtype:
        raise RequestError(
            f"the parameter is {parameter.dtype} {list(parameter.shape)}, the new value {new_value.dtype} {list(new_value.shape)}"
        )
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.copy_(new_value)
    try:
        yield parameter
    finally:
        with torch.no_grad():
            parameter.copy_(before)


def get_tokenizer_with_bos(tokenizer: Any) -> Any:
    """The tokenizer itself: a model here never needs one that was changed; `to_tokens` puts the BOS token first."""
    return tokenizer


def get_input_with_manually_prepended_bos(bos_token: Any, input: str | list[str]) -> str | list[str]:
    """Texts with the BOS token before them. bos_token: its text, or a tokenizer that has one; None adds nothing."""
    text = getattr(bos_token, "bos_token", bos_token)
    if text is None:
        return input
    return text + input if isinstance(input, str) else [text + each for each in input]


def get_tokens_with_bos_removed(tokenizer: Any, tokens: Tensor, padding_side: str | None = None) -> Tensor:
    """Ids [batch, pos] without each row's BOS token, which stands behind the padding on the left. [batch, pos - 1]"""
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if bos is None:
        return tokens
    if (padding_side or getattr(tokenizer, "padding_side", "right")) == "right":
        return tokens[..., 1:]
    padding = (tokens != pad).cumsum(-1).eq(0).sum(-1)  # where BOS pads, too, it is the last of the run
    place = padding - 1 if bos == pad else (tokens == bos).int().argmax(-1)
    keep = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, place.unsqueeze(-1), False)
    return tokens[keep].view(*tokens.shape[:-1], tokens.shape[-1] - 1)
