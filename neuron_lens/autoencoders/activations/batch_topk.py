"""Batch top-k: k latents per position on average over a batch (Bussmann et al. 2024).

In training the batch's largest are kept (`keep_batch_topk`), which makes a position's latents depend on its
neighbours. Afterwards a threshold estimated in training takes the place of the ranking: relu(h) is kept
where it exceeds the threshold, and a row gives the same latents alone as in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron_lens.autoencoders.activations.base import LatentActivation, LatentIndex

__all__ = ["BatchTopK", "keep_batch_topk"]


class BatchTopK(LatentActivation):
    """Inference: relu(h) where it is above one threshold for all latents."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(()), requires_grad=False)  # a statistic, not trained

    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """See LatentActivation."""
        acts = h.relu()
        return acts * (acts > self.threshold).to(acts.dtype)


def keep_batch_topk(h: Tensor, k: int) -> Tensor:
    """Training: the k * positions largest of relu(h) over the whole batch, zero elsewhere.

    Args:
        h: pre-activations [..., d_latent].
        k: latents kept per position on average.
    """
    acts = h.relu().flatten()
    count = min(k * (h.numel() // h.shape[-1]), acts.numel())
    values, indices = acts.topk(count, sorted=False)
    return torch.zeros_like(acts).scatter(0, indices, values).reshape(h.shape)
