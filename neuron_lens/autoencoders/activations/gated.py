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
        return self.open_gates(h, self.magnitudes(h, latents), latents)

    def magnitudes(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """The second map's pre-activations, of h's shape."""
        r_mag, b_mag = (v if latents is None else v[latents] for v in (self.r_mag, self.b_mag))
        return h * r_mag.exp() + b_mag

    def open_gates(self, h: Tensor, magnitudes: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """relu(magnitudes) where the gate of h is open, else zero."""
        b_gate = self.b_gate if latents is None else self.b_gate[latents]
        return (h + b_gate > 0).to(h.dtype) * magnitudes.relu()
