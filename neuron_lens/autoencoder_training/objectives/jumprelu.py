"""Jump-ReLU: thresholds are trained through a kernel around the jump (Rajamanoharan et al. 2024, jumping ahead)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, dense_pass
from neuron_lens.autoencoders import Autoencoder
from neuron_lens.autoencoders.activations import JumpReLU

__all__ = ["JumpReLUObjective", "step_function"]

_FIRST_THRESHOLD = 0.1  # of pre-activations, whose spread is about 1 at the start


class JumpReLUObjective(Objective):
    """‖x − x̂‖² / variance + sparsity · (number of active latents)."""

    def prepare(self, autoencoder: Autoencoder) -> None:
        """See Objective."""
        torch.nn.init.constant_(_threshold(autoencoder), _FIRST_THRESHOLD)

    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """See Objective."""
        h, state = autoencoder.pre_activations_with_state(x)
        gate = step_function(h, _threshold(autoencoder), self.settings.bandwidth)
        latents = h.relu() * gate
        reconstruction = autoencoder.decode(latents, state)
        penalty = self.sparsity(progress) * gate.sum(-1).float().mean()
        return dense_pass(self.unexplained(target, reconstruction) + penalty, reconstruction, latents)


def _threshold(autoencoder: Autoencoder) -> Tensor:
    assert isinstance(autoencoder.activation, JumpReLU), "the objective is chosen by the activation"
    return autoencoder.activation.threshold


class _StepFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, threshold)
        ctx.bandwidth = bandwidth
        return (h > threshold).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        h, threshold = ctx.saved_tensors
        near = ((h - threshold).abs() < ctx.bandwidth / 2).to(gradient.dtype)
        return None, -(near * gradient).sum(0) / ctx.bandwidth, None


def step_function(h: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """1[h > θ] [batch, d_latent]; θ [d_latent] gets the pseudo-derivative −K((h − θ) / bandwidth) / bandwidth.

    K is the rectangle of width and area 1, and h gets no gradient (equation 12 of the paper). Times h, the product
    rule gives −h K / bandwidth, the paper's −θ K / bandwidth (equation 11) up to half a bandwidth.
    """
    result: Tensor = _StepFunction.apply(h, threshold, bandwidth)  # type: ignore[no-untyped-call]
    return result
