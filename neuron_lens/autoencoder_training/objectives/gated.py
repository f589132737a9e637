"""Gated: an auxiliary reconstruction trains the gate, which passes no gradient (Rajamanoharan et al. 2024)."""

from __future__ import annotations

from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, dense_pass
from neuron_lens.autoencoders import Autoencoder
from neuron_lens.autoencoders.activations import Gated

__all__ = ["GatedObjective"]


class GatedObjective(Objective):
    """‖x − x̂‖² + sparsity · Σ relu(gate) + ‖x − frozen decoder of relu(gate)‖²."""

    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """See Objective."""
        activation = autoencoder.activation
        assert isinstance(activation, Gated), "the objective is chosen by the activation"
        h, state = autoencoder.pre_activations_with_state(x)
        latents = activation(h)
        reconstruction = autoencoder.decode(latents, state)
        gate = (h + activation.b_gate).relu()
        by_gate = gate.to(autoencoder.dtype) @ autoencoder.W_dec.detach() + autoencoder.b_dec.detach()
        by_gate = by_gate + state.offset.detach()
        penalty = self.sparsity(progress) * gate.sum(-1).float().mean() / self.variance
        loss = self.unexplained(target, reconstruction) + penalty + self.unexplained(target, by_gate)
        return dense_pass(loss, reconstruction, latents)

    def drive(self, autoencoder: Autoencoder, x: Tensor, latents: Tensor) -> Tensor:
        """See Objective: of the gate."""
        assert isinstance(autoencoder.activation, Gated), "the objective is chosen by the activation"
        return autoencoder.pre_activations(x, latents) + autoencoder.activation.b_gate[latents]
