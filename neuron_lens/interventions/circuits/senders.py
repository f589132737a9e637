"""What each sender of the graph writes to the stream, in one forward pass.

Where a norm stands behind attention or the MLP, what heads and neurons write is their own output through that norm
with its divisor held at the one of the same run, so that they add up to what the sublayer adds. (Attention's bias, which
the divisor then scales, is shared equally by its heads.) What no sender owns, attention's bias elsewhere and that of a
norm behind it, is the same in all runs and stays in the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.circuits.nodes import GraphShape, Units
from neuron_lens.interventions.circuits.units import Copies, UnitHooks, open_units, through_norm

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["LiveSenders", "sender_outputs"]


def sender_outputs(
    model: Transformer,
    tokens: Tensor,
    hooks: TransformerHooks | None = None,
    *,
    shape: GraphShape | None = None,
    autoencoders: Mapping[str, Autoencoder] | None = None,
    pad: Tensor | None = None,
) -> Tensor:
    """What each sender writes to the stream. [sender, batch, pos, d_model]

    tokens: [batch, pos]. pad: true where a column is padding. shape: the graph; None for one without chosen units.
    """
    with torch.no_grad():
        live = LiveSenders(model, shape or GraphShape.of(model.config), hooks, autoencoders)
        model(tokens, hooks=live.tree, pad=pad, logits_at=-1)
    return torch.cat(live.written)


def _one_stream(units: Units, x: Tensor) -> None:
    """All units read what the rest of their part reads."""


class LiveSenders:
    """Keeps what each sender writes as the pass goes on: `written` is a list of [some senders, batch, pos, d_model].

    Args:
        hooks: further hooks, which act first. copies: the streams that units read; see `UnitHooks`.
    """

    def __init__(
        self,
        model: Transformer,
        shape: GraphShape,
        hooks: TransformerHooks | None = None,
        autoencoders: Mapping[str, Autoencoder] | None = None,
        copies: Copies = _one_stream,
    ) -> None:
        self.blocks: Any = model.blocks
        self.scale = model.config.residual_scale
        self.written: list[Tensor] = []
        self._results: Tensor | None = None
        self._divisor: Tensor | None = None
        self.tree = TransformerHooks() if hooks is None else hooks.copy()
        opened = open_units(model, shape, autoencoders)
        self.units = {(one.units.layer, one.units.place): one for one in opened}
        self.unit_hooks = UnitHooks(opened, self.tree, copies)
        self.tree.append_to_path("resid.post_emb.fwd2", self._embedding)
        self.tree.append_to_path("attn.result.fwd2", self._keep_results)
        self.tree.append_to_path("resid.torso.delta_attn.fwd2", self._heads)
        behind = [] if model.config.norm_place == "pre" or model.config.norm == "none" else ["attn"]
        if model.config.mlp != "none":
            self.tree.append_to_path("resid.torso.delta_mlp.fwd2", self._mlp)
            behind += ["mlp"] if behind else []
        for sublayer in behind:
            self.tree.append_to_path(f"resid.torso.ln_{sublayer}_out.scale.fwd2", self._keep_divisor)
        if any(place == "block" for _, place in self.units):
            self.tree.append_to_path("resid.torso.post_mlp.fwd", self._latents_behind_block)

    def _embedding(self, x: Tensor) -> None:
        self.written = [x[None]]

    def _keep_results(self, x: Tensor) -> None:
        self._results = x

    def _keep_divisor(self, x: Tensor) -> None:
        self._divisor = x

    def _heads(self, x: Tensor, layer: int) -> None:
        assert self._results is not None, "the heads' results come before what attention adds"
        block = self.blocks[layer]
        results, self._results = self._results.movedim(2, 0), None
        if block.ln_attn_out is not None and block.attn.out.bias is not None:
            results = results + block.attn.out.bias / len(results)
        self.written.append(self._behind_norm(block.ln_attn_out, results))

    def _mlp(self, x: Tensor, layer: int) -> None:
        one = self.units.get((layer, "mlp"))
        if one is None:
            self.written.append(x[None])
            return
        parts = self._parts(one.directions, self.unit_hooks.live[layer, "mlp"])
        if one.units.part == "neuron":
            parts = self._behind_norm(self.blocks[layer].ln_mlp_out, parts)
        self.written += [x[None] - parts.sum(0), parts]

    def _behind_norm(self, norm: Any, parts: Tensor) -> Tensor:
        """What parts of a sublayer's output [part, batch, pos, d_model] are in the stream."""
        if norm is not None:
            assert self._divisor is not None, "the norm comes before what the sublayer adds"
            parts = through_norm(norm, parts, self._divisor)
        return parts if self.scale == 1.0 else parts * self.scale

    def _latents_behind_block(self, x: Tensor, layer: int) -> None:
        one = self.units.get((layer, "block"))
        if one is not None:
            live, remaining = (of[layer, "block"] for of in (self.unit_hooks.live, self.unit_hooks.remaining))
            whole = remaining @ one.directions.to(x.device)
            self.written += [self._parts(one.directions, live), -whole[None]]

    @staticmethod
    def _parts(directions: Tensor, values: Tensor) -> Tensor:
        """[unit, batch, pos, d_model]"""
        return torch.einsum("bpu,ud->ubpd", values, directions.to(values.device))
