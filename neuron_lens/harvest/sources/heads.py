"""Attention heads, one figure a token: how much the head writes there, and from which token it takes it.

The write norm of transformer-debugger's `attn_write_norm`: at a destination token t, |Σ_s A[t, s] v_s W_O|;
the source token shown with it is the s of the largest A[t, s] |v_s W_O|. Norms are taken of what the output
projection gives, before a norm some models put behind attention, without the projection's bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.harvest.sources.base import Caught, Cut, UnitSource
from neuron_lens.hooks import AtLayers, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["HeadSource"]


class HeadSource(UnitSource):
    """All heads of one layer.

    A head is taken out whole: what it writes is set to zero (its mean is a vector, not a mean of norms), and it
    writes in many directions, so that it has no single list of promoted tokens.
    """

    kind = "head"
    has_partners = True
    replaced_by: Literal["zero", "mean"] = "zero"

    def __init__(self, model: Transformer, layer: int) -> None:
        super().__init__(model, site="attn.v_out", layer=layer, n_units=model.config.n_heads)
        attention: Any = model.blocks[layer].attn
        weight = attention.out.weight.detach().float().unflatten(1, (model.config.n_heads, -1))
        # |v W_O|^2 = v (W_O W_O^T) v^T: products of d_head x d_head, not of d_head x d_model.
        self._gram = torch.einsum("dhe,dhf->hef", weight, weight)  # [head, d_head, d_head]

    @property
    def reads(self) -> tuple[str, ...]:
        """The pattern, the values and their mix."""
        return ("attn.qk_probs", "attn.v", "attn.v_out")

    def take(self, cut: Cut) -> Caught:
        """Write norms, and how many tokens back the strongest source lies."""
        probs, values, mix = (self._pop(path) for path in self.reads)
        norms = self._norms(mix)  # [batch, pos, head]
        groups = self.n_units // values.shape[2]
        strengths = self._norms(values.repeat_interleave(groups, 2)).permute(
            0, 2, 1
        )  # [batch, head, key_pos]
        source = (probs.float() * strengths[:, :, None]).argmax(-1).permute(0, 2, 1)  # [batch, pos, head]
        here = torch.arange(source.shape[1], device=source.device)[None, :, None]
        return Caught(norms, (here - source).clamp(min=0).to(torch.int16))

    def _norms(self, vectors: Tensor) -> Tensor:
        """|v W_O| for vectors `[batch, pos, head, d_head]`: `[batch, pos, head]`."""
        wide = vectors.float()
        return torch.einsum("bphe,hef,bphf->bph", wide, self._gram, wide).clamp(min=0).sqrt()

    def replacing(self, index: int, value: float | Tensor, where: Tensor) -> TransformerHooks:
        """Scale what the head writes to the norm `value` (0: nothing)."""

        def replace(x: Tensor) -> Tensor:
            norms = self._norms(x)[:, :, index]
            scale = torch.where(where, value / norms.clamp(min=1e-12), torch.ones_like(norms))
            x = x.clone()
            x[:, :, index] = x[:, :, index] * scale[:, :, None].to(x.dtype)
            return x

        return TransformerHooks().append_to_path("attn.v_out.fwd", AtLayers(self.layer).append(replace))
