"""The setters of activation patching by their usual names: each writes one slice of a clean activation into another.

`setter(corrupted_activation, index, clean_activation)` edits the first in place and returns it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

__all__ = [
    "SETTER_AXES",
    "Setter",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
]

Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]


def layer_pos_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """index (layer, pos): that position of [batch, pos, …]."""
    corrupted[:, index[1]] = clean[:, index[1]]
    return corrupted


def layer_pos_head_vector_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """index (layer, pos, head): that head at that position of [batch, pos, head, d_head]."""
    corrupted[:, index[1], index[2]] = clean[:, index[1], index[2]]
    return corrupted


def layer_head_vector_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """index (layer, head): that head at all positions of [batch, pos, head, d_head]."""
    corrupted[:, :, index[1]] = clean[:, :, index[1]]
    return corrupted


def layer_head_pattern_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """index (layer, head): that head's pattern in [batch, head, pos, key_pos]."""
    corrupted[:, index[1]] = clean[:, index[1]]
    return corrupted


def layer_head_pos_pattern_patch_setter(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """index (layer, head, dest): that query's row of that head's pattern."""
    corrupted[:, index[1], index[2]] = clean[:, index[1], index[2]]
    return corrupted


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted: Tensor, index: Sequence[int], clean: Tensor
) -> Tensor:
    """index (layer, head, dest, src): that one entry of that head's pattern."""
    corrupted[:, index[1], index[2], index[3]] = clean[:, index[1], index[2], index[3]]
    return corrupted


# What each setter's index means, so that it can be declared instead of called.
SETTER_AXES: dict[Setter, tuple[str, ...]] = {
    layer_pos_patch_setter: ("layer", "position"),
    layer_pos_head_vector_patch_setter: ("layer", "position", "head"),
    layer_head_vector_patch_setter: ("layer", "head"),
    layer_head_pattern_patch_setter: ("layer", "head"),
    layer_head_pos_pattern_patch_setter: ("layer", "head", "position"),
    layer_head_dest_src_pos_pattern_patch_setter: ("layer", "head", "position", "key"),
}
