"""Jump-ReLU: a pre-activation passes unchanged above its latent's threshold (Rajamanoharan et al. 2024).

Projects disagree below zero when a threshold is negative: Gemma Scope and circuit-tracer give h * (h > θ),
SAELens and dictionary_learning relu(h) * (h > θ).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuron_lens.autoencoders.activations.base import LatentActivation, LatentIndex

__all__ = ["JumpReLU"]


class JumpReLU(LatentActivation):
    """h where h > threshold [d_latent], else 0; with `relu`, also 0 where h < 0."""

    def __init__(self, d_latent: int, *, relu: bool = True) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(d_latent))
        self.relu = relu

    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """See LatentActivation."""
        threshold = self.threshold if latents is None else self.threshold[latents]
        passed = h.relu() if self.relu else h
        return passed * (h > threshold).to(h.dtype)
