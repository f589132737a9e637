"""Gated autoencoder: one affine map says which latents are on, another how strongly (Rajamanoharan 2024).

    latents = 1[x W_enc + b_gate > 0] * relu(x (W_enc exp(r_mag)) + b_mag)

The maps share W_enc up to a scale per latent, so both come from h = x W_enc, and there is no b_enc.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from neuron_lens.autoencoders.activations.base import LatentActivation, LatentIndex

__all__ = ["Gated"]


class Gated(LatentActivation):
    """See the module docstring; each of its vectors is [d_latent]."""

    has_encoder_bias: ClassVar[bool] = False

    def __init__(self, d_latent: int) -> None:
        super().__init__()
        self.b_gate = nn.Parameter(torch.zeros(d_latent))
        self.b_mag = nn.Parameter(torch.zeros(d_latent))
        self.r_mag = nn.Parameter(torch.zeros(d_latent))  # log of the magnitude map's scale

    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """See LatentActivation."""
        b_gate, b_mag, r_mag = (
            vector if latents is None else vector[latents] for vector in (self.b_gate, self.b_mag, self.r_mag)
        )
        is_on = (h + b_gate > 0).to(h.dtype)
        return is_on * torch.relu(h * r_mag.exp() + b_mag)
