"""ActivationCache: what a forward pass recorded, and what each head and neuron contributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_lens.analysis.residual import head_results, neuron_results, norm_of_part
from neuron_lens.cache import Slice, SliceInput
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.cache_decomposition import Stack, StreamDecomposition

__all__ = ["ActivationCache"]


class ActivationCache(StreamDecomposition):
    """Activations by name, and decompositions of the stream.

    Made by `run_with_cache`. Contributions are what is really added to the stream: where a norm stands behind a
    sublayer (Gemma 2), they are taken through it with its recorded divisor.
    """

    def compute_head_results(self) -> None:
        """Add `blocks.{i}.attn.hook_result` of all layers: each head's output, [*batch and pos, head, d_model]."""
        layers = range(self.model.cfg.n_layers)
        if all(f"blocks.{i}.attn.hook_result" in self.cache_dict for i in layers):
            return
        self.need([f"blocks.{i}.attn.hook_z" for i in layers], "compute_head_results")
        for i in layers:
            self.cache_dict[f"blocks.{i}.attn.hook_result"] = self._head_result(i, Slice(None))

    def _head_result(self, layer: int, pos_slice: Slice) -> Tensor:
        name = f"blocks.{layer}.attn.hook_result"
        if name in self.cache_dict:
            return pos_slice.apply(self[name], dim=-3)
        z = pos_slice.apply(self[f"blocks.{layer}.attn.hook_z"], dim=-3)
        return head_results(z, self.model.blocks[layer].attn.W_O.detach())

    def _added(self, results: Tensor, layer: int, sublayer: str, pos_slice: Slice) -> Tensor:
        """What reaches the stream of a sublayer's parts: themselves, unless a norm stands behind the sublayer.

        results: [*batch and pos, part, d_model].
        """
        config = self.model.engine.config
        scaled = results * config.residual_scale if config.residual_scale != 1.0 else results
        if config.norm_place == "pre" or config.norm == "none":
            return scaled
        suffix = "_post" if config.norm_place == "sandwich" else ""
        name = f"blocks.{layer}.{'ln1' if sublayer == 'attn' else 'ln2'}{suffix}.hook_scale"
        self.need([name], "contributions through the norm behind a sublayer")
        block = self.model.engine.blocks[layer]
        norm: Any = block.ln_attn_out if sublayer == "attn" else block.ln_mlp_out
        scale = pos_slice.apply(self[name], dim=-2)[..., None, :]
        weight = norm._true_weight()
        weight = None if weight is None else weight.detach()
        return norm_of_part(scaled, scale, centre=config.norm == "layer", weight=weight)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: SliceInput = None,
        apply_ln: bool = False,
    ) -> Stack:
        """What each head below `layer` added. [head (+ remainder), *batch and pos, d_model], labels L0H0 …"""
        until, chosen = self._until(layer), Slice(pos_slice)
        names = [
            f"blocks.{i}.attn.hook_z"
            for i in range(until)
            if f"blocks.{i}.attn.hook_result" not in self.cache_dict
        ]
        self.need(names, "stack_head_results")
        parts = []
        for i in range(until):
            added = self._added(self._head_result(i, chosen), i, "attn", chosen)
            parts += list(added.unbind(-2))
        labels = [f"L{i}H{h}" for i in range(until) for h in range(self.model.cfg.n_heads)]
        return self._with_remainder(
            parts, labels, until, False, incl_remainder, apply_ln, chosen, return_labels
        )

    def stack_activation(
        self, activation_name: str, layer: int | None = -1, sublayer_type: str | None = None
    ) -> Tensor:
        """One activation of every layer below `layer`, [layer, …]"""
        keys = [(activation_name, i, sublayer_type) for i in range(self._until(layer))]
        self.need([self.full_name(key) for key in keys], "stack_activation")
        return torch.stack([self[key] for key in keys])

    def get_neuron_results(
        self,
        layer: int,
        neuron_slice: SliceInput = None,
        pos_slice: SliceInput = None,
        project_output_onto: Tensor | None = None,
    ) -> Tensor:
        """What neurons of one layer added: activation times row of W_out, without the bias.

        Returns [*batch and pos, neuron, d_model]; dot with `project_output_onto` ([d_model] or [d_model, out]) if given.
        """
        if self.model.cfg.attn_only or self.model.engine.config.mlp == "experts":
            raise RequestError(
                f"this model has no neurons to take apart: its MLP is {self.model.engine.config.mlp!r}"
            )
        chosen, neurons = Slice(pos_slice), Slice(neuron_slice)
        # positions first: an int would take the axis of neurons out of its place
        post = neurons.apply(chosen.apply(self["post", layer], dim=-2), dim=-1)
        W_out = neurons.apply(self.model.blocks[layer].mlp.W_out.detach(), dim=0)
        if self.model.engine.config.norm_place == "pre":
            return neuron_results(post, W_out, project_output_onto)
        if neurons.mode == "int":
            post, W_out = post[..., None], W_out[None]
        added = self._added(neuron_results(post, W_out), layer, "mlp", chosen)
        added = added if project_output_onto is None else added @ project_output_onto
        return added[..., 0, :] if neurons.mode == "int" and project_output_onto is None else added

    def stack_neuron_results(
        self,
        layer: int | None = -1,
        pos_slice: SliceInput = None,
        neuron_slice: SliceInput = None,
        return_labels: bool = False,
        incl_remainder: bool = False,
        apply_ln: bool = False,
        project_output_onto: Tensor | None = None,
        mlp_input: bool = False,
    ) -> Stack:
        """What each neuron below `layer` added. [neuron (+ remainder), *batch and pos, d_model (or out)], labels L0N0 …

        mlp_input: with apply_ln, the norm before the MLP of `layer` is the one applied.
        """
        until, chosen, neurons = self._until(layer), Slice(pos_slice), Slice(neuron_slice)
        if neurons.mode == "int":
            neurons = Slice([neurons.slice])
        names = [f"blocks.{i}.mlp.hook_post" for i in range(until)]
        self.need(names, "stack_neuron_results")
        d_mlp = self.model.engine.config.d_mlp
        labels = [f"L{i}N{n}" for i in range(until) for n in neurons.apply(torch.arange(d_mlp)).tolist()]
        parts = []
        for i in range(until):
            parts += list(self.get_neuron_results(i, neurons, chosen).unbind(-2))
        stacked = self._with_remainder(
            parts, labels, until, mlp_input, incl_remainder, apply_ln, chosen, True
        )
        return _projected(stacked, project_output_onto, return_labels)

    def _with_remainder(
        self,
        parts: list[Tensor],
        labels: list[str],
        until: int,
        mlp_input: bool,
        incl_remainder: bool,
        apply_ln: bool,
        pos_slice: Slice,
        return_labels: bool,
    ) -> Stack:
        if incl_remainder:
            name = self._stream_name(until, mlp_input)
            if name not in self.cache_dict and until > 0 and not mlp_input:
                name = f"blocks.{until - 1}.hook_resid_post"
            self.need([name], "the remainder")
            stream = pos_slice.apply(self[name], dim=-2)
            parts = [*parts, stream - sum(parts, torch.zeros_like(stream))]
            labels = [*labels, "remainder"]
        norm = (until, mlp_input) if apply_ln else None
        return self._finished(parts, labels, None, norm, pos_slice, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = True,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Stack:
        """The stream entering `layer` as heads, neurons (or MLPs), embeddings and the sum of biases.

        Returns [component, *batch and pos, d_model (or out)]. It is checked against the recorded stream: see
        `residual_error`.
        """
        until, chosen, config = self._until(layer), Slice(pos_slice), self.model.engine.config
        with_own_attention = mlp_input and not self._parallel and until < config.n_layers
        heads, labels = self.stack_head_results(until + int(with_own_attention), True, pos_slice=chosen)
        stacks = [heads]
        if config.mlp != "none" and until > 0:
            if expand_neurons and config.mlp != "experts":
                more, more_labels = self.stack_neuron_results(until, chosen, return_labels=True)
            else:
                more, more_labels = self.decompose_resid(
                    until, mode="mlp", incl_embeds=False, pos_slice=chosen, return_labels=True
                )
            stacks.append(more)
            labels = labels + more_labels
        names, embed_labels = self._embedding_names()
        self.need(names, "get_full_resid_decomposition")
        stacks += [chosen.apply(self[name], dim=-2)[None] for name in names]
        neurons = expand_neurons and config.mlp != "experts"
        bias = self._bias_part(until, with_own_attention, neurons, heads, chosen)
        stack = torch.cat([*stacks, bias[None]])
        labels = [*labels, *embed_labels, "bias"]
        self._check(stack, self._stream_name(until, mlp_input), chosen)
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, until, mlp_input, chosen, has_batch_dim=self.has_batch_dim)
        return _projected((stack, labels), project_output_onto, return_labels)

    def _bias_part(
        self, until: int, own_attention: bool, neurons: bool, like: Tensor, pos_slice: Slice
    ) -> Tensor:
        """What output biases add, through norms behind sublayers where there are any. [*batch and pos, d_model]"""
        total = like.new_zeros(like.shape[1:])
        for i in range(until + int(own_attention)):
            block = self.model.blocks[i]
            total = total + self._bias_of(block.attn.b_O.detach(), i, "attn", total, pos_slice)
            if neurons and i < until and hasattr(block, "mlp"):
                total = total + self._bias_of(block.mlp.b_out.detach(), i, "mlp", total, pos_slice)
        return total

    def _bias_of(self, bias: Tensor, layer: int, sublayer: str, like: Tensor, pos_slice: Slice) -> Tensor:
        part = bias.expand_as(like)[..., None, :]
        added = self._added(part, layer, sublayer, pos_slice)[..., 0, :]
        config = self.model.engine.config
        norm: Any = None
        if config.norm_place != "pre" and config.norm != "none":
            block = self.model.engine.blocks[layer]
            norm = block.ln_attn_out if sublayer == "attn" else block.ln_mlp_out
        return added if norm is None or norm.bias is None else added + norm.bias.detach()

    def logit_lens(
        self, layer: int | None = None, incl_mid: bool = False, pos_slice: SliceInput = None
    ) -> Tensor:
        """Logits that each layer's stream would give at once, [component, *batch and pos, d_vocab]"""
        stack = self.accumulated_resid(layer, incl_mid, pos_slice=pos_slice)
        assert isinstance(stack, Tensor), "labels were not asked for"
        normed = self.apply_ln_to_stack(stack, None, recompute_ln=True, has_batch_dim=self.has_batch_dim)
        return self.model.engine.unembed(normed) * self.model.engine.config.logit_scale


def _projected(stacked: Stack, directions: Tensor | None, return_labels: bool) -> Stack:
    assert isinstance(stacked, tuple), "labels were asked for"
    stack, labels = stacked
    stack = stack if directions is None else stack @ directions
    return (stack, labels) if return_labels else stack
