"""Top-k: k latents are kept, and the squared error is all there is to minimise (Gao et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass
from neuron_lens.autoencoders import Autoencoder, SparseLatents

__all__ = ["TopKObjective"]


class TopKObjective(Objective):
    """‖x − x̂‖²."""

    def __call__(self, autoencoder: Autoencoder, x: Tensor, progress: float) -> Pass:
        """See Objective."""
        assert self.settings.k is not None, "the settings have seen to it"
        h = autoencoder.pre_activations(x)
        values, indices = h.topk(self.settings.k, dim=-1, sorted=False)
        values = values.relu()
        reconstruction = autoencoder.decode(SparseLatents(values, indices))
        on = values.detach() > 0
        fired = torch.zeros(h.shape[-1], dtype=torch.bool, device=h.device)
        fired[indices[on]] = True
        return Pass(self.unexplained(x, reconstruction), reconstruction, h, fired, on.sum(-1).float().mean())
