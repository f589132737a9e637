"""One block: attention and MLP around the residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from neuron_lens.errors import HookError
from neuron_lens.hooks import FwdBwdHooks, NormalizationHooks, TransformerHooks
from neuron_lens.transformer.attention import Attention
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.frame import Frame
from neuron_lens.transformer.mlp import MLP
from neuron_lens.transformer.moe import Experts
from neuron_lens.transformer.norm import Norm

__all__ = ["Block"]

# Sites on the way to queries, keys and values: they hold all columns, however few leave the block.
_SEES_ALL_COLUMNS = frozenset(
    [f"resid.torso.{site}" for site in ("pre_attn", "attn_in", "post_ln_attn")]
    + [f"resid.torso.ln_attn.{part}" for part in ("post_mean_subtraction", "scale", "post_scale")]
    + [f"attn.{site}" for site in ("q_in", "k_in", "v_in", "k", "v", "rot_k")]
)


class Block(nn.Module):
    """Reads the stream twice and adds to it twice.

        x ── ln_attn ── attn ── (ln_attn_out) ──(+)── ln_mlp ── mlp ── (ln_mlp_out) ──(+)──
         └───────────────────────────────────────┘ └────────────────────────────────────┘

    Parallel blocks feed both from the entering stream. Which norms exist is `config.norm_place`.
    """

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        has_norm, has_mlp = config.norm != "none", config.mlp != "none"
        before, after = config.norm_place != "post", config.norm_place != "pre"
        own_mlp_norm = has_mlp and not config.shared_norm

        def norm(wanted: bool) -> Norm | None:
            return Norm(config, config.d_model) if has_norm and wanted else None

        self.ln_attn = norm(before)
        self.attn = Attention(config, layer)
        self.ln_attn_out = norm(after)
        self.ln_mlp = norm(before and own_mlp_norm)
        self.mlp = (Experts(config) if config.mlp == "experts" else MLP(config)) if has_mlp else None
        self.ln_mlp_out = norm(after and has_mlp)

    def forward(self, x: Tensor, hooks: TransformerHooks, frame: Frame, **context: Any) -> Tensor:
        """The stream entering the block -> the stream leaving it, [batch, pos, d_model].

        Where the frame reads some columns only, the stream leaving is that of those columns; nothing behind the
        inputs of attention may be hooked then (`needs_all_columns`).
        """
        torso = hooks.resid.torso
        x = torso.pre_attn(x, **context)
        q_in, k_in, v_in = self._attention_inputs(x, hooks, **context)
        if frame.read is not None:
            x, q_in = frame.wanted(x), frame.wanted(q_in)
        added = self.attn(q_in, k_in, v_in, hooks.attn, frame, **context)
        added = self._scaled(_normed(self.ln_attn_out, added, torso.ln_attn_out, **context))
        entering = x
        x = x + torso.delta_attn(added, **context)
        if self.mlp is None:
            return torso.post_mlp(torso.post_attn(x, **context), **context)
        if not self.config.parallel:
            entering = x = torso.post_attn(x, **context)
        read = torso.mlp_in(_own(entering, torso.mlp_in), **context)
        ln_mlp = self.ln_attn if self.config.shared_norm else self.ln_mlp
        read = torso.post_ln_mlp(
            _own(_normed(ln_mlp, read, torso.ln_mlp, **context), torso.post_ln_mlp), **context
        )
        added = self.mlp(read, hooks.mlp, **context)
        added = self._scaled(_normed(self.ln_mlp_out, added, torso.ln_mlp_out, **context))
        return torso.post_mlp(x + torso.delta_mlp(added, **context), **context)

    def needs_all_columns(self, hooks: TransformerHooks) -> bool:
        """Whether something is hooked here that would see fewer columns if only some were computed."""
        return any(
            site.path not in _SEES_ALL_COLUMNS and site.acts_at(self.layer) for site in hooks.hooked_sites()
        )

    def _scaled(self, added: Tensor) -> Tensor:
        return added if self.config.residual_scale == 1.0 else added * self.config.residual_scale

    def _attention_inputs(
        self, x: Tensor, hooks: TransformerHooks, **context: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values are made from: the normalised stream, or copies for each head if hooked."""
        torso, attn = hooks.resid.torso, hooks.attn
        sites = (torso.attn_in, attn.q_in, attn.k_in, attn.v_in)
        if not any(site.acts_at(self.layer) for site in sites):
            read = _normed(self.ln_attn, x, torso.ln_attn, **context)
            read = torso.post_ln_attn(_own(read, torso.post_ln_attn), **context)
            return read, read, read
        norm_hooked = torso.ln_attn.acts_at(self.layer) and not torso.ln_attn.per_head
        if norm_hooked or torso.post_ln_attn.acts_at(self.layer):
            raise HookError(
                f"layer {self.layer}: resid.torso.ln_attn and post_ln_attn cannot be hooked together with attn_in, q_in, k_in or "
                f"v_in, which give every head a norm of its own; hook one kind or the other"
            )

        def per_head(source: Tensor, heads: int) -> Tensor:
            return source.unsqueeze(2).expand(-1, -1, heads, -1).clone()

        query_heads, kv_heads = self.config.n_heads, self.config.n_kv_heads
        if torso.attn_in.acts_at(self.layer):
            shared = torso.attn_in(per_head(x, query_heads), **context)
            copies = [shared, shared.clone(), shared.clone()]
        else:
            copies = [per_head(x, query_heads), per_head(x, kv_heads), per_head(x, kv_heads)]
        hooked = [site(copy, **context) for site, copy in zip(sites[1:], copies, strict=True)]
        q_in, k_in, v_in = (_normed(self.ln_attn, copy, torso.ln_attn, **context) for copy in hooked)
        return q_in, k_in, v_in


def _normed(norm: Norm | None, x: Tensor, hooks: NormalizationHooks, **context: Any) -> Tensor:
    return x if norm is None else norm(x, hooks, **context)


def _own(x: Tensor, site: FwdBwdHooks) -> Tensor:
    """A copy for a hooked site that may stand on the very tensor of the stream: its hooks may edit in place."""
    return x.clone() if site.has_any() else x
