"""The named transforms of tensors: one tensor in, one or several out, views of the input wherever that is possible."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from neuron_lens.loading.definitions import TRANSFORMS, Transform
from neuron_lens.transformer.config import TransformerConfig

__all__ = ["apply_transforms"]


def apply_transforms(
    tensors: list[Tensor], transforms: tuple[Transform, ...], config: TransformerConfig
) -> list[Tensor]:
    """Run transforms one after another, each on every tensor (stack: on all together).

    Raises ValueError saying what does not fit; the caller knows the names.
    """
    for transform in transforms:
        if transform.name == "stack":
            tensors = [torch.stack(tensors)]
        else:
            function = _FUNCTIONS[transform.name]
            tensors = [made for tensor in tensors for made in function(tensor, config, *transform.numbers)]
    return tensors


def _transpose(tensor: Tensor, config: TransformerConfig) -> list[Tensor]:
    """Swap the last two axes: weights stored [in, out]."""
    if tensor.dim() < 2:
        raise ValueError(f"a tensor of shape {list(tensor.shape)} cannot be transposed")
    return [tensor.transpose(-1, -2)]


def _split(tensor: Tensor, config: TransformerConfig, parts: float, axis: float = 0) -> list[Tensor]:
    """Equal parts along an axis."""
    length = tensor.shape[int(axis)]
    if length % int(parts):
        raise ValueError(f"{length} rows do not split into {int(parts)} equal parts")
    return list(tensor.split(length // int(parts), int(axis)))


def _split_qkv(tensor: Tensor, config: TransformerConfig) -> list[Tensor]:
    """Rows of all queries, then all keys, then all values."""
    sizes = [
        config.n_heads * config.d_head,
        config.n_kv_heads * config.d_head,
        config.n_kv_heads * config.d_head,
    ]
    if tensor.shape[0] != sum(sizes):
        raise ValueError(f"{tensor.shape[0]} rows do not split into queries, keys and values of {sizes}")
    return list(tensor.split(sizes))


def _split_qkv_by_head(tensor: Tensor, config: TransformerConfig) -> list[Tensor]:
    """Rows interleaved by key/value head: its queries, its key, its value, then the next head's (NeoX, BLOOM, Falcon)."""
    group = config.n_heads // config.n_kv_heads
    expected = config.n_kv_heads * (group + 2) * config.d_head
    if tensor.shape[0] != expected:
        raise ValueError(
            f"{tensor.shape[0]} rows are not the {expected} of {config.n_kv_heads} groups of heads"
        )
    grouped = tensor.unflatten(0, (config.n_kv_heads, group + 2, config.d_head))
    return [part.flatten(0, 2) for part in grouped.split([group, 1, 1], 1)]


def _alternate(tensor: Tensor, config: TransformerConfig, parts: float, axis: float = 0) -> list[Tensor]:
    """Every n-th entry along an axis, from the first, the second, … (GPT-OSS)."""
    length = tensor.shape[int(axis)]
    if length % int(parts):
        raise ValueError(f"{length} rows do not deal out to {int(parts)} equal parts")
    index = [slice(None)] * (int(axis) % tensor.dim())
    return [tensor[(*index, slice(first, None, int(parts)))] for first in range(int(parts))]


def _offset(tensor: Tensor, config: TransformerConfig, amount: float) -> list[Tensor]:
    """Every entry plus a number."""
    return [tensor + amount]


_FUNCTIONS: dict[str, Callable[..., list[Tensor]]] = {
    "transpose": _transpose,
    "split": _split,
    "split_qkv": _split_qkv,
    "split_qkv_by_head": _split_qkv_by_head,
    "alternate": _alternate,
    "offset": _offset,
}
assert _FUNCTIONS.keys() | {"stack"} == TRANSFORMS.keys(), "every named transform has a function"
