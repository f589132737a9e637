"""The two kinds of activation: of each latent on its own, and by rank among all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from neuron_lens.autoencoders.sparse import SparseLatents

__all__ = ["LatentActivation", "LatentIndex", "RankedActivation"]

LatentIndex = slice | Tensor  # which latents: a slice, or int64 [n]


class LatentActivation(nn.Module, ABC):
    """Pre-activations [..., d_latent] to latents of the same shape.

    Where `is_elementwise`, a latent depends on its own pre-activation alone, and `forward` takes the
    pre-activations of some latents, given which ones they are.
    """

    is_elementwise: ClassVar[bool] = True
    has_encoder_bias: ClassVar[bool] = True  # whether b_enc is added before the activation

    @abstractmethod
    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """Latents for `h`; `latents` says which columns `h` holds (None: all)."""


class RankedActivation(LatentActivation):
    """An activation that keeps some latents by their rank among all, and so knows which are active."""

    is_elementwise: ClassVar[bool] = False

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    @abstractmethod
    def select(self, h: Tensor, rank_by: Tensor | None = None) -> SparseLatents:
        """The latents kept, [..., k]. Ranked by `rank_by` (default: `h`), valued from `h`."""

    def forward(self, h: Tensor, latents: LatentIndex | None = None) -> Tensor:
        """Dense latents [..., d_latent]; needs all pre-activations."""
        assert latents is None, "a rank needs all pre-activations; select from the result instead"
        return self.select(h).to_dense(h.shape[-1])

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        return f"k={self.k}"
