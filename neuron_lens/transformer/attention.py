"""Attention: a fast path through `scaled_dot_product_attention`, and an explicit one with a site at every step."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuron_lens.hooks import AttentionHooks
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.frame import Frame
from neuron_lens.transformer.functional import alibi_slopes, softcap
from neuron_lens.transformer.norm import Norm
from neuron_lens.transformer.rotary import rotate

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head attention with any number of key/value heads.

    Weights are in the layout of nn.Linear: q [head · d_head, d_model], k and v [kv_head · d_head, d_model],
    out [d_model, head · d_head].
    """

    slopes: Tensor

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        query, key_value = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
        self.q = nn.Linear(config.d_model, query, bias=config.qkv_bias)
        self.k = nn.Linear(config.d_model, key_value, bias=config.qkv_bias)
        self.v = nn.Linear(config.d_model, key_value, bias=config.qkv_bias)
        self.out = nn.Linear(query, config.d_model, bias=config.out_bias)
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            per_head = config.qk_norm == "per_head"
            self.q_norm = Norm(config, query if full else config.d_head, config.n_heads if per_head else None)
            self.k_norm = Norm(
                config, key_value if full else config.d_head, config.n_kv_heads if per_head else None
            )
        if config.attention_sinks:
            self.sinks = nn.Parameter(torch.zeros(config.n_heads))
        if config.position == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.n_heads), persistent=False)
        self.scale = config.scale(layer)
        self.window = config.window(layer)

    def forward(
        self, q_in: Tensor, k_in: Tensor, v_in: Tensor, hooks: AttentionHooks, frame: Frame, **context: Any
    ) -> Tensor:
        """What attention adds to the stream, [batch, pos, d_model].

        q_in, k_in, v_in: the normalised stream [batch, pos, d_model] (one tensor, three times), or copies for each
        head [batch, pos, head or kv_head, d_model]. Where the frame reads some columns only, q_in has just those.
        """
        q = hooks.q(self._project(q_in, self.q), **context)
        k = hooks.k(self._project(k_in, self.k), **context)
        v = hooks.v(self._clipped(self._project(v_in, self.v)), **context)
        q, k = self._positioned(q, k, hooks, frame, **context)
        # [batch, head, pos, d_head] from here on, as attention computes
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if frame.cache is not None:
            k, v = frame.cache.extend(self.layer, k, v)
        if self._is_explicit(hooks):
            mixed = self.explicit_mix(q, k, v, hooks, frame, **context)
        else:
            mixed = self._fast_mix(q, k, v, frame)
        v_out = hooks.v_out(mixed.transpose(1, 2), **context)
        if hooks.result.acts_at(self.layer):
            weight = self.out.weight.unflatten(1, (self.config.n_heads, self.config.d_head))
            result = hooks.result(torch.einsum("bphe,dhe->bphd", v_out, weight), **context)
            added = result.sum(2)
            return added if self.out.bias is None else added + self.out.bias
        return self.out(v_out.flatten(2))

    def explicit_mix(
        self, q: Tensor, k: Tensor, v: Tensor, hooks: AttentionHooks, frame: Frame, **context: Any
    ) -> Tensor:
        """Values mixed by the attention pattern, every step hooked. [batch, head, pos, d_head]"""
        groups = self.config.n_heads // self.config.n_kv_heads
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        logits = hooks.qk_logits(self._logits(q, k, frame), **context)
        wide = logits.float()
        sinks = self._sink_column(wide) if self.config.attention_sinks else None
        if hooks.qk_softmax_denominator.acts_at(self.layer):
            probs = self._factored_softmax(wide, sinks, hooks, **context)
        elif sinks is not None:
            probs = torch.cat((wide, sinks), -1).softmax(-1)[..., :-1]
        else:
            probs = wide.softmax(-1)
        return hooks.qk_probs(probs.to(q.dtype), **context) @ v

    def _logits(self, q: Tensor, k: Tensor, frame: Frame) -> Tensor:
        """Masked attention scores [batch, head, pos, key_pos]. q, k: [batch, head, pos or key_pos, d_head]"""
        added = frame.masks.added(self.window, q.dtype)
        if self.config.position == "alibi":
            added = added + self._alibi(frame).to(q.dtype)
        if self.config.attention_softcap is not None:
            return softcap(q @ k.transpose(-1, -2) * self.scale, self.config.attention_softcap) + added
        batch, heads, pos, _ = q.shape
        # scaled, masked and written once: scores are the largest tensors of a pass that keeps them
        flat = torch.baddbmm(
            added.expand(batch, heads, -1, -1).flatten(0, 1),
            q.flatten(0, 1),
            k.flatten(0, 1).transpose(1, 2),
            alpha=self.scale,
        )
        return flat.view(batch, heads, pos, -1)

    def _is_explicit(self, hooks: AttentionHooks) -> bool:
        """Whether this layer needs the pattern itself: it is hooked, or the fused kernel cannot compute it."""
        return (
            self.config.attention_softcap is not None
            or self.config.attention_sinks
            or hooks.qk_logits.acts_at(self.layer)
            or hooks.qk_softmax_denominator.acts_at(self.layer)
            or hooks.qk_probs.acts_at(self.layer)
        )

    def _fast_mix(self, q: Tensor, k: Tensor, v: Tensor, frame: Frame) -> Tensor:
        grouped = self.config.n_kv_heads != self.config.n_heads
        mask: Tensor | None = None
        causal = frame.masks.is_plain_causal(self.window)
        if self.config.position == "alibi":
            allowed = frame.masks.allowed(self.window)
            mask, causal = self._alibi(frame).to(q.dtype).masked_fill(~allowed, -torch.inf), False
        elif not causal and not frame.masks.sees_everything(self.window):
            mask = frame.masks.allowed(self.window)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped
        )

    def _project(self, x: Tensor, linear: nn.Linear) -> Tensor:
        """x through a projection, split into heads: [batch, pos, head, d_head]."""
        heads = linear.out_features // self.config.d_head
        if x.dim() == 3:
            projected = linear(x).unflatten(-1, (heads, self.config.d_head))
        else:  # each head reads a copy of its own
            projected = torch.einsum(
                "bphd,hed->bphe", x, linear.weight.unflatten(0, (heads, self.config.d_head))
            )
            if linear.bias is not None:
                projected = projected + linear.bias.unflatten(0, (heads, self.config.d_head))
        return projected

    def _clipped(self, x: Tensor) -> Tensor:
        clip = self.config.clip_qkv
        return x if clip is None else x.clamp(-clip, clip)

    def _positioned(
        self, q: Tensor, k: Tensor, hooks: AttentionHooks, frame: Frame, **context: Any
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys after their norms, clipping and rotary positions."""
        if self.config.qk_norm == "full":
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        elif self.config.qk_norm != "none":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self._clipped(q), self._clipped(k)
        if self.config.rotary is None:
            return q, k
        local = self.window is not None
        q = rotate(q, frame.query_rotary(local), self.config.rotary)
        k = rotate(k, frame.rotary(local), self.config.rotary)
        return hooks.rot_q(q, **context), hooks.rot_k(k, **context)

    def _alibi(self, frame: Frame) -> Tensor:
        return -self.slopes[None, :, None, None] * frame.masks.distances()

    def _sink_column(self, logits: Tensor) -> Tensor:
        return self.sinks.float().reshape(1, -1, 1, 1).expand(*logits.shape[:-1], 1)

    def _factored_softmax(
        self, logits: Tensor, sinks: Tensor | None, hooks: AttentionHooks, **context: Any
    ) -> Tensor:
        """Softmax as numerator over a hooked denominator."""
        highest = logits.amax(-1, keepdim=True).detach()
        numerator = (logits - highest).exp()
        denominator = numerator.sum(-1, keepdim=True)
        if sinks is not None:
            denominator = denominator + (sinks - highest).exp()
        return numerator / hooks.qk_softmax_denominator(denominator, **context)
