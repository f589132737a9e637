"""Neurons of an MLP, as its output projection reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.sources.base import Caught, Cut, UnitSource
from neuron_lens.harvest.sources.embeddings import through_norm
from neuron_lens.hooks import AtLayers, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["NeuronSource"]


class NeuronSource(UnitSource):
    """All neurons of one layer (at `mlp.post_act`)."""

    kind = "neuron"

    def __init__(self, model: Transformer, layer: int, site: str = "mlp.post_act") -> None:
        config = model.config
        if config.mlp == "none" or config.mlp == "experts":
            raise RequestError(f"this model's layers have no neurons to explain (its MLP is {config.mlp!r})")
        super().__init__(model, site=site, layer=layer, n_units=config.d_mlp)

    def take(self, cut: Cut) -> Caught:
        """The neurons' activations."""
        return Caught(self._pop(self.site))

    def replacing(self, index: int, value: float | Tensor, where: Tensor) -> TransformerHooks:
        """Set one column of the site."""

        def replace(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., index] = torch.where(
                where, torch.as_tensor(value, dtype=x.dtype, device=x.device), x[..., index]
            )
            return x

        return TransformerHooks().append_to_path(f"{self.site}.fwd", AtLayers(self.layer).append(replace))

    def written(self) -> Tensor | None:
        """The neurons' output weights."""
        block: Any = self.model.blocks[self.layer]
        return block.mlp.down.weight.T if self.site == "mlp.post_act" else None

    def read(self) -> Tensor | None:
        """The neurons' input weights behind the norm before the MLP; of gated MLPs those of the gate, which decides
        whether a neuron fires."""
        if self.site not in ("mlp.post_act", "mlp.pre_act"):
            return None
        mlp: Any = self.model.blocks[self.layer].mlp
        own = mlp.gate if self.model.config.mlp == "gated" else mlp.up
        return through_norm(self.model, own.weight, "resid.torso.post_ln_mlp", self.layer)
