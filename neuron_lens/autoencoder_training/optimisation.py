"""One step of training: from a batch of activations to changed weights. Knows no model and no text.

batch -> objective (+ auxiliary loss) -> gradients of limited length -> Adam -> decoder rows of length 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.autoencoder_training.objectives import Pass, auxiliary_loss, build_objective
from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoders import Autoencoder
from neuron_lens.autoencoders.activations import JumpReLU

__all__ = ["Optimisation"]

_LARGEST_GRADIENT = 1.0  # norm at which gradients are clipped


class Optimisation:
    """An autoencoder in training, with what its optimiser remembers.

    Attributes:
        autoencoder: trained in place. step: how many steps were taken.
        unfired: for how many tokens each latent has not fired [d_latent].
    """

    def __init__(self, autoencoder: Autoencoder, settings: TrainingSettings, variance: float) -> None:
        """variance: total variance of the scaled activations that are reconstructed, summed over d_out."""
        self.autoencoder, self.settings, self.step = autoencoder.train(), settings, 0
        # W_enc column by column in memory, since sparse gradients take whole columns; the optimiser knows it as rows,
        # because torch's fused Adam copies what is not contiguous
        self._columns = nn.Parameter(autoencoder.W_enc.data.T.contiguous())
        autoencoder.W_enc.data = self._columns.data.T
        others = [p for p in autoencoder.parameters() if p.requires_grad and p is not autoencoder.W_enc]
        self.optimiser = torch.optim.Adam([self._columns, *others], lr=settings.peak_rate, fused=True)
        self.objective = build_objective(settings, variance)
        self.unfired = torch.zeros(settings.d_latent, dtype=torch.int64, device=autoencoder.W_dec.device)

    def prepare(self) -> None:
        """Set what should not start at zero; once, before the first step of a new run."""
        self.objective.prepare(self.autoencoder)

    def __call__(self, x: Tensor, target: Tensor) -> dict[str, float]:
        """Take a step.

        Args:
            x: [batch, d_in], scaled, what is encoded. target: [batch, d_out], scaled, what is to be reconstructed.

        Returns:
            step, loss, auxiliary_loss, l0, variance_explained and dead_share, before the step.
        """
        settings, autoencoder = self.settings, self.autoencoder
        for group in self.optimiser.param_groups:
            group["lr"] = settings.rate_at(self.step)
        dead = self.unfired > settings.dead_after
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=settings.autocast):
            done: Pass = self.objective(autoencoder, x, target, self.step / settings.n_steps)
            auxiliary = auxiliary_loss(self.objective, autoencoder, x, target, done, dead, self._auxiliary_k)
        (done.loss + settings.auxiliary_weight * auxiliary).backward()
        _drop_parallel_gradient(autoencoder)
        _clip([p.grad for p in autoencoder.parameters() if p.grad is not None])
        assert autoencoder.W_enc.grad is not None, "every objective reaches the encoder"
        self._columns.grad = autoencoder.W_enc.grad.T.contiguous()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        autoencoder.W_enc.grad = None
        _normalise_rows(autoencoder)
        self.unfired = torch.where(done.fired, 0, self.unfired + len(x))
        self.step += 1
        with torch.no_grad():
            missed = self.objective.unexplained(target, done.reconstruction)
        return {
            "step": float(self.step),
            "loss": float(done.loss.detach()),
            "auxiliary_loss": float(auxiliary.detach()),
            "l0": float(done.active),
            "variance_explained": 1 - float(missed),
            "dead_share": float(dead.float().mean()),
        }

    def state(self) -> dict[str, Any]:
        """What `restore` takes to go on as if nothing had happened."""
        return {
            "autoencoder": self.autoencoder.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "unfired": self.unfired,
            "step": self.step,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take up a `state`."""
        self.autoencoder.load_state_dict(saved["autoencoder"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.unfired = saved["unfired"].to(self.autoencoder.W_dec.device)
        self.step = saved["step"]

    @property
    def _auxiliary_k(self) -> int:
        return self.settings.auxiliary_k or max(1, self.autoencoder.config.d_in // 2)


def _clip(gradients: list[Tensor]) -> None:
    """Bring the norm of all gradients together down to the limit."""
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
    if norm > _LARGEST_GRADIENT:
        for gradient in gradients:
            gradient.mul_(_LARGEST_GRADIENT / norm)


def _drop_parallel_gradient(autoencoder: Autoencoder) -> None:
    """Take out what would only change the length of decoder rows, which is put back to 1 anyway."""
    rows, gradient = autoencoder.W_dec.data, autoencoder.W_dec.grad
    if gradient is not None:
        along = torch.bmm(gradient[:, None], rows[:, :, None])[:, 0]  # [d_latent, 1]
        gradient.addcmul_(along, rows, value=-1)


@torch.no_grad()
def _normalise_rows(autoencoder: Autoencoder) -> None:
    autoencoder.W_dec.div_(autoencoder.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
    if isinstance(autoencoder.activation, JumpReLU):
        autoencoder.activation.threshold.clamp_(min=0)
