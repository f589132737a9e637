"""Directions at a site: how far the activation reaches along a vector that somebody named."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.sources.base import Caught, Cut, UnitSource
from neuron_lens.harvest.sources.embeddings import through_norm
from neuron_lens.hooks import AtLayers, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Direction", "DirectionSource"]

_STREAM = ("pre_attn", "delta_attn", "post_attn", "delta_mlp", "post_mlp")


class Direction:
    """A named vector `[width]` at a site of a layer; only its direction counts.

    Raises RequestError for a vector that is zero, not finite, or not a vector.
    """

    def __init__(self, name: str, vector: Tensor, site: str, layer: int) -> None:
        if vector.ndim != 1 or not bool(vector.isfinite().all()) or float(vector.norm()) == 0.0:
            raise RequestError(
                f"the direction {name!r} must be a finite vector [width] other than zero; got {list(vector.shape)}"
            )
        self.name, self.site, self.layer = name, site, layer
        self.vector = vector.detach().float() / vector.detach().float().norm()

    @property
    def dictionary(self) -> str:
        """What its unit is filed under: the name and the first digits of a hash of the vector."""
        digest = hashlib.blake2b(self.vector.cpu().numpy().tobytes(), digest_size=4)
        return f"{self.name}-{digest.hexdigest()}"


class DirectionSource(UnitSource):
    """A direction (unit 0) and, to compare it with, a random one at a right angle to it (unit 1)."""

    kind = "direction"

    def __init__(self, model: Transformer, direction: Direction) -> None:
        super().__init__(
            model,
            site=direction.site,
            layer=direction.layer,
            n_units=2,
            dictionary=direction.dictionary,
        )
        width = {"mlp.post_act": model.config.d_mlp, "mlp.pre_act": model.config.d_mlp}.get(
            direction.site, model.config.d_model
        )
        if len(direction.vector) != width:
            raise RequestError(
                f"the direction {direction.name!r} is {len(direction.vector)} wide, but {direction.site} of this "
                f"model is {width} wide"
            )
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(width, generator=generator)
        own = direction.vector.cpu()
        other = other - (other @ own) * own
        self.vectors = torch.stack([own, other / other.norm()]).to(model.embed.weight.device)

    def take(self, cut: Cut) -> Caught:
        """Projections onto the directions."""
        return Caught(self._pop(self.site).float() @ self.vectors.T)

    def replacing(self, index: int, value: float | Tensor, where: Tensor) -> TransformerHooks:
        """Move the activation along the direction until its projection is `value`."""

        def replace(x: Tensor) -> Tensor:
            along = self.vectors[index]
            change = torch.where(where, value - x.float() @ along, torch.zeros((), device=x.device))
            return (x.float() + change[..., None] * along).to(x.dtype)

        return TransformerHooks().append_to_path(f"{self.site}.fwd", AtLayers(self.layer).append(replace))

    def written(self) -> Tensor | None:
        """The directions themselves, where the site is the stream."""
        return self.vectors if self.site.removeprefix("resid.torso.") in _STREAM else None

    def read(self) -> Tensor | None:
        """The directions themselves, where the site holds the stream."""
        return through_norm(self.model, self.vectors, self.site, self.layer)
