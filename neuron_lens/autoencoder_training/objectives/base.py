"""What all objectives share: the unexplained share of variance, and a way back for dead latents."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoders import Autoencoder, SparseLatents

__all__ = ["Objective", "Pass", "auxiliary_loss"]

_RAMP = 0.05  # share of the steps until the sparsity penalty is whole


class Pass(NamedTuple):
    """One pass of a batch [batch, d_in] through an autoencoder in training."""

    loss: Tensor  # what is minimised, apart from the auxiliary loss; a share of the variance
    reconstruction: Tensor  # [batch, d_out]
    fired: Tensor  # which latents were active for some token [d_latent], bool
    active: Tensor  # active latents per token, on average


class Objective(ABC):
    """Squared error as a share of the variance, and what makes latents sparse."""

    def __init__(self, settings: TrainingSettings, variance: float) -> None:
        self.settings, self.variance = settings, variance

    def prepare(self, autoencoder: Autoencoder) -> None:  # noqa: B027 - most have nothing to set
        """Set what should not start at zero; called once, before the first step of a new run."""

    @abstractmethod
    def __call__(self, autoencoder: Autoencoder, x: Tensor, target: Tensor, progress: float) -> Pass:
        """Run a batch (scaled).

        Args:
            x: [batch, d_in], what is encoded.
            target: [batch, d_out], what is to be reconstructed: x itself, or a transcoder's other site.
            progress: share of all steps that are done.
        """

    def drive(self, autoencoder: Autoencoder, x: Tensor, latents: Tensor) -> Tensor:
        """What some latents [n] learn through when they are dead [batch, n]."""
        return autoencoder.pre_activations(x, latents)

    def sparsity(self, progress: float) -> float:
        """The weight of the sparsity penalty; it grows at the start, since a whole one at once kills latents."""
        return (self.settings.sparsity or 0.0) * min(1.0, progress / _RAMP)

    def unexplained(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """‖target − reconstruction‖² per token, as a share of the variance."""
        return (target - reconstruction.to(target.dtype)).square().sum(-1).mean() / self.variance


def dense_pass(loss: Tensor, reconstruction: Tensor, latents: Tensor) -> Pass:
    """A pass whose latents [batch, d_latent] are dense."""
    on = latents.detach() != 0
    return Pass(loss, reconstruction, on.any(0), on.sum(-1).float().mean())


def sparse_pass(
    loss: Tensor, reconstruction: Tensor, latents: SparseLatents, autoencoder: Autoencoder
) -> Pass:
    """A pass whose latents [batch, active] are sparse; zeros among them are not active."""
    on = latents.values.detach() > 0
    fired = torch.zeros(autoencoder.config.d_latent, dtype=torch.bool, device=on.device)
    fired[latents.indices[on]] = True
    return Pass(loss, reconstruction, fired, on.sum(-1).float().mean())


def auxiliary_loss(
    objective: Objective,
    autoencoder: Autoencoder,
    x: Tensor,
    target: Tensor,
    done: Pass,
    dead: Tensor,
    k: int,
) -> Tensor:
    """How badly the k most active dead latents of each token predict what the living ones leave over.

    AuxK of Gao et al. 2024 (appendix A.2), as a share of the error's own variance; zero when none is dead.

    Args:
        dead: which latents are dead [d_latent], bool.
        k: dead latents used per token; all when there are fewer.
    """
    which = dead.nonzero()[:, 0]
    if not len(which):
        return x.new_zeros(())
    error = (target - done.reconstruction.to(target.dtype)).detach()
    h = objective.drive(autoencoder, x, which)
    if k < len(which):
        values, index = h.topk(k, dim=-1)
        latents = torch.zeros_like(h).scatter(-1, index, values.relu())
    else:
        latents = h.relu()
    predicted = (latents @ autoencoder.W_dec[which].to(latents.dtype)).to(target.dtype)
    spread = (error - error.mean(0)).square().sum(-1).mean()
    return (error - predicted).square().sum(-1).mean() / spread.clamp(min=torch.finfo(target.dtype).tiny)
