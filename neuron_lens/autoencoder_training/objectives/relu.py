"""Standard objective: squared error and the sum of latents (Bricken et al. 2023), decoder rows of length 1."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, dense_pass
from neuron_lens.autoencoders import Autoencoder

__all__ = ["ReLUObjective"]


class ReLUObjective(Objective):
    """‖x − x̂‖² + sparsity · Σ latents."""

    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """See Objective."""
        h, state = autoencoder.pre_activations_with_state(x)
        latents = h.relu()
        reconstruction = autoencoder.decode(latents, state)
        penalty = self.sparsity(progress) * latents.sum(-1).float().mean() / self.variance
        return dense_pass(self.unexplained(target, reconstruction) + penalty, reconstruction, latents)
