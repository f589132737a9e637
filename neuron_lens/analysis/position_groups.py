"""Means over groups of positions, moments of the stream, and means that grow batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["group_means", "joined_means", "stream_moments"]


def group_means(values: Tensor, groups: Sequence[Sequence[int]], mask: Tensor) -> Tensor:
    """The mean of each group of positions, row by row.

    values: [batch, pos, ...]. groups: indices along pos. mask: false where a row has no such position [batch, pos]; every
    group has one in every row. Returns [batch, group, ...].
    """
    means = []
    for group in groups:
        part, real = values[:, list(group)], mask[:, list(group)]
        weight = real.view(*real.shape, *[1] * (values.dim() - 2))
        means.append(part.masked_fill(~weight, 0).sum(1) / weight.sum(1))
    return torch.stack(means, 1).to(values.dtype)


def stream_moments(stream: Tensor) -> dict[str, Tensor]:
    """Mean, variance (biased) and second moment over the last axis, in float32. stream: [..., d_model]; each [...]."""
    wide = stream.float()
    return {
        "mean": wide.mean(-1),
        "variance": wide.var(-1, unbiased=False),
        "second_moment": wide.square().mean(-1),
    }


def joined_means(means: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The mean of all examples from means over parts of them, each weighted by how many it stands for."""
    total = means[0].double() * counts[0]
    for mean, count in zip(means[1:], counts[1:], strict=True):
        total = total + mean.double() * count
    return (total / sum(counts)).to(means[0].dtype)
