"""Standard sparse autoencoder: relu(h) (Bricken et al. 2023, Cunningham et al. 2023)."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.autoencoders.activations.base import LatentActivation, LatentIndex

__all__ = ["ReLU"]


class ReLU(LatentActivation):
    """relu(h)."""

    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """See LatentActivation."""
        return h.relu()
