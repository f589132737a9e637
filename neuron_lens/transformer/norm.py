"""Layer norm and RMS norm, computed in float32, with a site at every step of the explicit path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lens.hooks import NormalizationHooks
from neuron_lens.hooks.chain import edited_in_place, version_of
from neuron_lens.transformer.config import TransformerConfig

__all__ = ["Norm"]


class Norm(nn.Module):
    """(x − mean) / sqrt(variance + eps) · weight + bias, or x / sqrt(mean square + eps) · weight.

    Args:
        config: says which norm, its eps, and whether weight and bias exist.
        width: length of the normalised axis.
        heads: number of heads with a weight of their own (per-head norms of queries and keys); else None.
    """

    def __init__(self, config: TransformerConfig, width: int, heads: int | None = None) -> None:
        super().__init__()
        self.center = config.norm == "layer"
        self.eps = config.norm_eps
        self.offset = config.norm_offset
        shape = (width,) if heads is None else (heads, width)
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if config.norm_weight:
            self.weight = nn.Parameter(torch.zeros(shape) if self.offset else torch.ones(shape))
        if config.norm_bias and self.center and heads is None:
            self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, hooks: NormalizationHooks | None = None, **context: Any) -> Tensor:
        """x: [batch, pos, …, width] -> the same shape and dtype."""
        if hooks is not None and hooks.acts_at(context.get("layer")):
            return self.explicit(x, hooks, **context)
        weight = self._true_weight()
        if x.dtype == torch.float32 and (weight is None or weight.dim() == 1):
            if self.center:
                return F.layer_norm(x, x.shape[-1:], weight, self.bias, self.eps)
            return F.rms_norm(x, x.shape[-1:], weight, self.eps)
        wide = x.float()
        normalize = F.layer_norm if self.center else F.rms_norm
        wide = normalize(wide, x.shape[-1:], eps=self.eps)
        return self._scaled(wide).to(x.dtype)

    def explicit(self, x: Tensor, hooks: NormalizationHooks, **context: Any) -> Tensor:
        """The same, step by step, with a hook call after each."""
        centre_hooked = hooks.post_mean_subtraction.acts_at(context.get("layer"))
        if self.center and not centre_hooked and x.dtype == torch.float32 and not torch.is_grad_enabled():
            return self._scaled(self._normalized_at_once(x, hooks, **context))
        wide = x.float()
        centred = wide - wide.mean(-1, keepdim=True) if self.center else wide
        if centre_hooked:
            # a copy where nothing was subtracted: hooks may edit it in place, and x is the residual stream itself
            centred = centred.to(x.dtype) if self.center else x.clone()
            centred = hooks.post_mean_subtraction(centred, **context).float()
        elif x.dtype != torch.float32:
            centred = centred.to(x.dtype).float()
        scale = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        scale = hooks.scale(scale.to(x.dtype), **context).float()
        normalized = hooks.post_scale((centred / scale).to(x.dtype), **context).float()
        return self._scaled(normalized).to(x.dtype)

    def _normalized_at_once(self, x: Tensor, hooks: NormalizationHooks, **context: Any) -> Tensor:
        """The hooked steps of a layer norm by the fused kernel, which gives the scale besides: one pass over x.

        Where no gradients are computed: they would not flow through the scale.
        """
        normalized, mean, inverse = torch.native_layer_norm(x, x.shape[-1:], None, None, self.eps)
        scale = inverse.reciprocal()
        version = version_of(scale)
        hooked = hooks.scale(scale, **context)
        if hooked is not scale or edited_in_place(scale, version):
            normalized = (x - mean) / hooked
        return hooks.post_scale(normalized, **context)

    def _true_weight(self) -> Tensor | None:
        return self.weight + 1 if self.offset and self.weight is not None else self.weight

    def _scaled(self, normalized: Tensor) -> Tensor:
        weight = self._true_weight()
        if weight is not None and self.bias is not None:
            return torch.addcmul(self.bias.float(), normalized, weight.float())
        if weight is not None:
            return normalized * weight.float()
        return normalized if self.bias is None else normalized + self.bias.float()
