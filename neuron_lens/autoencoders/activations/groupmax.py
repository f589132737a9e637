"""Group-max: the latents are cut into k runs of neighbours, each keeps its largest (sparsify)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.autoencoders.activations.base import RankedActivation
from neuron_lens.autoencoders.sparse import SparseLatents

__all__ = ["GroupMax"]


class GroupMax(RankedActivation):
    """The largest of relu(h) in each of k groups of d_latent / k neighbours."""

    def select(self, h: Tensor, rank_by: Tensor | None = None) -> SparseLatents:
        """See RankedActivation; [..., k], one per group in order."""
        acts = h.relu()
        ranked = acts if rank_by is None else rank_by
        size = h.shape[-1] // self.k
        within = ranked.reshape(*h.shape[:-1], self.k, size).argmax(dim=-1)  # [..., k]
        first = torch.arange(self.k, device=h.device) * size
        indices = within + first
        return SparseLatents(acts.gather(-1, indices), indices)
