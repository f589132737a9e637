"""What is made of recorded tensors with the model's own matrices: projections, weighted and reduced patterns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.analysis.attention_blocks import Reduction, attention_blocks, value_weighted_pattern
from neuron_lens.analysis.residual import head_results
from neuron_lens.faces.hooked_model.positions import ResolvedPositions

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = [
    "block_reduction",
    "projected",
    "projected_gradient",
    "weighted",
    "weighted_gradient",
    "write_matrix",
]


def write_matrix(model: Transformer, layer: int) -> Tensor:
    """Each head's part of the output projection, [head, d_head, d_model]."""
    block: Any = model.blocks[layer]
    weight: Tensor = block.attn.out.weight.detach()
    return weight.unflatten(1, (model.config.n_heads, model.config.d_head)).permute(1, 2, 0)


def projected(model: Transformer, layer: int, head: int, vectors: Tensor) -> Tensor:
    """One head's vectors [batch, pos, d_head] through its part of the output projection. [batch, pos, d_model]"""
    matrix = write_matrix(model, layer)[head : head + 1]
    return head_results(vectors[:, :, None], matrix)[:, :, 0]


def projected_gradient(model: Transformer, layer: int, head: int, gradients: Tensor) -> Tensor:
    """Gradients of projected vectors [batch, pos, d_model] from those of the head's own [batch, pos, d_head].

    A projected vector x W moves only within the image of W, so its gradient is the one there: the shortest g with
    (dx W) · g = dx · gradient for every dx, which is gradient · (W⁺)ᵀ.
    """
    matrix = write_matrix(model, layer)[head]
    return gradients @ torch.linalg.pinv(matrix.float()).mT.to(gradients.dtype)


def weighted(model: Transformer, layer: int, heads: list[int], pattern: Tensor, values: Tensor) -> Tensor:
    """Patterns [batch, chosen head, query, key] weighted by the norms of the keys' projected values.

    values: [batch, key, kv_head, d_head].
    """
    group = model.config.n_heads // model.config.n_kv_heads
    read = values[:, :, [head // group for head in heads]]
    return value_weighted_pattern(pattern, read, write_matrix(model, layer)[heads])


def weighted_gradient(
    model: Transformer, layer: int, heads: list[int], gradients: Tensor, values: Tensor
) -> Tensor:
    """Gradients of weighted patterns from those of the patterns: an entry is A · ‖v W_O‖, the norm held as it is.

    Zero where the value is. Shapes as in `weighted`.
    """
    norms = weighted(model, layer, heads, torch.ones_like(gradients), values)
    return torch.where(norms > 0, gradients / norms, 0.0)


def block_reduction(
    pattern: Tensor, rows: ResolvedPositions, columns: ResolvedPositions, reduction: Reduction
) -> Tensor:
    """Patterns [batch, head, query, key] reduced to [batch, head, row group, column group]."""

    def of_groups(where: ResolvedPositions) -> tuple[list[Tensor], list[Tensor]]:
        widths = [len(group) for group in where.groups]
        columns, mask = where.columns.to(pattern.device), where.mask.to(pattern.device)
        # columns of one row count up by one like positions do, and both groups share the row's offset
        offset = where.starts.to(pattern.device)[:, None]
        return list((columns - offset).split(widths, 1)), list(mask.split(widths, 1))

    queries, query_masks = of_groups(rows)
    keys, key_masks = of_groups(columns)
    return attention_blocks(pattern, queries, keys, query_masks, key_masks, reduction)
