"""Top-k: k latents are kept, and the squared error is all there is to minimise (Gao et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, sparse_pass
from neuron_lens.autoencoders import Autoencoder

__all__ = ["TopKObjective"]


class TopKObjective(Objective):
    """‖x − x̂‖²."""

    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """See Objective."""
        latents, state = autoencoder.encode_sparse(x, sparse_gradient=True)
        reconstruction = autoencoder.decode(latents, state)
        return sparse_pass(self.unexplained(target, reconstruction), reconstruction, latents, autoencoder)
