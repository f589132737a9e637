"""Reductions of attention patterns to blocks of query groups by key groups, and patterns weighted by values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Reduction", "attention_blocks", "value_weighted_pattern"]

Reduction = Literal["mean", "sum", "baseline_ratio"]


def attention_blocks(
    pattern: Tensor,
    query_positions: Sequence[Tensor],
    key_positions: Sequence[Tensor],
    query_masks: Sequence[Tensor],
    key_masks: Sequence[Tensor],
    reduction: Reduction,
) -> Tensor:
    """One number for each block of a pattern.

    "mean": mean probability of the block's cells. "sum": their sum. "baseline_ratio": the probability that the block's queries
    give to its keys, over what uniform causal attention would give: Σ A[q, k] / Σ_q #{k in block: k ≤ q} / (q + 1), so that it is
    1 for uniform causal attention and 2 for a block looked at twice as much. A block with no key before any of its queries has
    no baseline: NaN.

    Args:
        pattern: probabilities of selected queries and keys [batch, head, query, key], the groups one after another.
        query_positions, key_positions: absolute positions of each group [batch, members].
        query_masks, key_masks: false where a row has fewer members [batch, members].

    Returns:
        [batch, head, query group, key group].
    """
    rows = pattern.split([group.shape[1] for group in query_positions], 2)
    blocks = []
    for row, queries, query_mask in zip(rows, query_positions, query_masks, strict=True):
        columns = row.split([group.shape[1] for group in key_positions], 3)
        for column, keys, key_mask in zip(columns, key_positions, key_masks, strict=True):
            cells = query_mask[:, :, None] & key_mask[:, None, :]
            total = (column * cells[:, None]).sum((2, 3))
            if reduction == "mean":
                total = total / cells.sum((1, 2))[:, None]
            elif reduction == "baseline_ratio":
                seen = (cells & (keys[:, None, :] <= queries[:, :, None])).sum(2)
                expected = (seen / (queries + 1)).sum(1)[:, None].to(total.dtype)
                total = torch.where(expected > 0, total / expected, torch.nan)
            blocks.append(total)
    stacked = torch.stack(blocks, -1)
    return stacked.unflatten(-1, (len(query_positions), len(key_positions)))


def value_weighted_pattern(pattern: Tensor, values: Tensor, W_O: Tensor) -> Tensor:
    """A[q, k] · ‖v_k W_O‖, how much each key's value adds (Kobayashi et al. 2020, arXiv 2004.10102).

    pattern: [batch, head, query, key]. values: of the keys, for each query head [batch, key, head, d_head].
    W_O: [head, d_head, d_model]. The norm is taken through the Gram matrix of W_O, without projecting every value.
    """
    gram = W_O @ W_O.mT  # [head, d_head, d_head]
    squares = torch.einsum("bkhe,hef,bkhf->bhk", values, gram, values)
    return pattern * squares.clamp_min(0).sqrt()[:, :, None, :]
