"""What a training run is told. Every number that changes the result is here, and nothing else is."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from neuron_lens.autoencoders.config import Frozen

__all__ = ["TrainedActivation", "TrainingSettings"]

TrainedActivation = Literal["relu", "topk", "batch_topk", "jumprelu", "gated"]

_RANKED = ("topk", "batch_topk")
# tuned at a width of 2^14 latents; the best rate falls with the root of the width (Gao et al. 2024, figure 3)
_RATE_AT_WIDTH = (2e-4, 2**14)


class TrainingSettings(Frozen):
    """How an autoencoder is trained. Counts are of tokens; activations are scaled to a mean norm of √d_in first."""

    site: str = "resid.torso.post_mlp"
    layer: int | None = Field(default=None, ge=0)  # None for sites outside the blocks
    site_out: str | None = None  # a transcoder: the site that is predicted from `site`
    layer_out: int | None = Field(default=None, ge=0)  # of site_out; None: `layer`
    skip: bool = False  # a transcoder with a linear map from what it reads to what it predicts
    d_latent: int = Field(gt=0)
    activation: TrainedActivation = "topk"
    k: int | None = Field(default=None, gt=0)  # active latents per token (topk), on average (batch_topk)
    group_sizes: tuple[int, ...] | None = None  # with batch_topk: matryoshka, latents of each nested group
    # relu, gated: weight of the sum of latents against the squared error (1 to 10 are usual);
    # jumprelu: weight of each active latent against the share of unexplained variance (about 1e-3)
    sparsity: float | None = Field(default=None, ge=0)
    bandwidth: float = Field(default=0.1, gt=0)  # jumprelu: width of the kernel that trains thresholds
    n_tokens: int = Field(gt=0)
    batch_tokens: int = Field(default=2048, gt=0)
    buffer_tokens: int = Field(default=65_536, gt=0)  # activations held and shuffled at once
    learning_rate: float | None = Field(default=None, gt=0)  # None: 2e-4 at 2^14 latents, less for more
    warm_up: float = Field(default=0.02, ge=0, le=1)  # share of all steps until the rate is reached
    decay: float = Field(default=0.2, ge=0, le=1)  # share of all steps in which it falls to zero
    dead_after: int = Field(default=200_000, gt=0)  # a latent is dead that did not fire in so many tokens
    auxiliary_k: int | None = Field(default=None, gt=0)  # dead latents that learn per token; None: d_in / 2
    auxiliary_weight: float = Field(default=1 / 32, ge=0)
    autocast: bool = False  # products in bfloat16
    seed: int = 0

    @model_validator(mode="after")
    def _agree(self) -> Self:
        ranked = self.activation in _RANKED
        rules = [
            (
                self.site_out is None and (self.layer_out is not None or self.skip),
                "layer_out and skip are for transcoders: give site_out, the site that is predicted",
            ),
            (
                self.site_out == self.site and self.layer_out in (None, self.layer),
                f"site_out is {self.site!r}, which is read already; leave it out to train an autoencoder",
            ),
            (
                self.site_out is not None and self.activation == "gated",
                "no format holds a gated transcoder: train it with relu, topk, batch_topk or jumprelu",
            ),
            (
                self.site_out is not None
                and self.activation == "topk"
                and (self.layer is None or self.layer_out not in (None, self.layer)),
                "a top-k transcoder is saved in circuit-tracer's format, which holds one layer: leave layer_out "
                "out, or train with batch_topk",
            ),
            (ranked and self.k is None, f"activation {self.activation!r} needs k"),
            (not ranked and self.k is not None, f"k is for {' and '.join(_RANKED)}, not {self.activation!r}"),
            (
                not ranked and self.sparsity is None,
                f"activation {self.activation!r} needs sparsity, the weight of its penalty",
            ),
            (ranked and self.sparsity is not None, f"sparsity is not for {self.activation!r}: k says it"),
            (
                self.group_sizes is not None and self.activation != "batch_topk",
                "group_sizes (matryoshka) are trained with batch_topk",
            ),
            (self.warm_up + self.decay > 1, "warm_up and decay are shares of the steps: together at most 1"),
            (self.n_tokens < self.batch_tokens, "n_tokens is less than one batch (batch_tokens)"),
        ]
        wrong = [message for broken, message in rules if broken]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def target(self) -> tuple[str, int | None] | None:
        """The site and layer a transcoder predicts."""
        if self.site_out is None:
            return None
        return self.site_out, self.layer if self.layer_out is None else self.layer_out

    @property
    def n_steps(self) -> int:
        """Optimiser steps, each on a whole batch."""
        return self.n_tokens // self.batch_tokens

    @property
    def peak_rate(self) -> float:
        """The learning rate between warm-up and decay."""
        if self.learning_rate is not None:
            return self.learning_rate
        rate, width = _RATE_AT_WIDTH
        return rate * (width / self.d_latent) ** 0.5

    def rate_at(self, step: int) -> float:
        """The learning rate of a step: up in a line, level, down in a line."""
        rising = (step + 1) / max(1.0, self.warm_up * self.n_steps)
        falling = (self.n_steps - step) / max(1.0, self.decay * self.n_steps)
        return self.peak_rate * min(1.0, rising, falling)
