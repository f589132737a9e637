"""Batch top-k (Bussmann et al. 2024), and with nested groups of latents matryoshka (Bussmann et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, sparse_pass
from neuron_lens.autoencoders import Autoencoder, SparseLatents
from neuron_lens.autoencoders.activations import BatchTopK

__all__ = ["BatchTopKObjective"]

_THRESHOLD_MEMORY = 0.99  # share of the old threshold kept at each step


class BatchTopKObjective(Objective):
    """‖x − x̂‖²; with group_sizes, its mean over the reconstructions from the first group, the first two, … all.

    The threshold that inference uses is a moving average of the smallest latent that a batch keeps.
    """

    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """See Objective."""
        assert self.settings.k is not None, "the settings have seen to it"
        latents, state = autoencoder.encode_batch_topk(x, self.settings.k)
        values, indices = latents
        self._follow_threshold(autoencoder, values.detach())
        if self.settings.group_sizes is None:
            reconstruction = autoencoder.decode(latents, state)
            return sparse_pass(self.unexplained(target, reconstruction), reconstruction, latents, autoencoder)
        reconstruction, begin, losses = autoencoder.b_dec + state.offset, 0, []
        for size in self.settings.group_sizes:
            inside = (indices >= begin) & (indices < begin + size)
            reconstruction = reconstruction + autoencoder.decode_rows(SparseLatents(values * inside, indices))
            losses.append(self.unexplained(target, reconstruction))
            begin += size
        return sparse_pass(torch.stack(losses).mean(), reconstruction, latents, autoencoder)

    def _follow_threshold(self, autoencoder: Autoencoder, latents: Tensor) -> None:
        activation = autoencoder.activation
        assert isinstance(activation, BatchTopK), "the objective is chosen by the activation"
        positive = latents[latents > 0]
        if not autoencoder.training or not len(positive):
            return
        smallest, known = positive.min().to(activation.threshold.dtype), activation.threshold
        mixed = known * _THRESHOLD_MEMORY + smallest * (1 - _THRESHOLD_MEMORY)
        # zero: no batch has been seen yet
        known.data.copy_(torch.where(known > 0, mixed, smallest))
