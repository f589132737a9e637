"""Top-k: each position keeps its k largest pre-activations (Gao et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.autoencoders.activations.base import RankedActivation
from neuron_lens.autoencoders.sparse import SparseLatents

__all__ = ["AbsTopK", "TopK"]


class TopK(RankedActivation):
    """The k largest pre-activations; with `relu`, those of them below zero become zero."""

    def __init__(self, k: int, *, relu: bool = True) -> None:
        super().__init__(k)
        self.relu = relu

    def select(self, h: Tensor, rank_by: Tensor | None = None) -> SparseLatents:
        """See RankedActivation."""
        indices = (h if rank_by is None else rank_by).topk(self.k, dim=-1, sorted=False).indices
        values = h.gather(-1, indices)
        return SparseLatents(values.relu() if self.relu else values, indices)


class AbsTopK(RankedActivation):
    """The k pre-activations largest in magnitude, with their signs."""

    def select(self, h: Tensor, rank_by: Tensor | None = None) -> SparseLatents:
        """See RankedActivation."""
        indices = (h if rank_by is None else rank_by).abs().topk(self.k, dim=-1, sorted=False).indices
        return SparseLatents(h.gather(-1, indices), indices)
