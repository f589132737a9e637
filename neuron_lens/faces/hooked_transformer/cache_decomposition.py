"""Decomposing the stream that a cache recorded: into sublayers, into everything before a layer, with the norm applied."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.analysis.residual import check_sum, norm_of_part
from neuron_lens.cache import Slice, SliceInput
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.cache_mapping import CacheMapping

__all__ = ["StreamDecomposition"]

Stack = Tensor | tuple[Tensor, list[str]]


class StreamDecomposition(CacheMapping):
    """Methods about whole sublayers. Every decomposition into all parts is checked against the recorded stream:
    `residual_error` is its relative error, and past rounding it raises."""

    def _until(self, layer: int | None) -> int:
        """Number of blocks below the stream meant: None and -1 stand for the end."""
        n_layers = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return n_layers
        if not isinstance(layer, int) or not 0 <= layer <= n_layers:
            raise RequestError(f"layer must be None, -1 or 0 to {n_layers}; got {layer!r}")
        return layer

    @property
    def _parallel(self) -> bool:
        return self.model.engine.config.parallel

    def _stream_name(self, layer: int, mlp_input: bool) -> str:
        """Name of the stream entering a block (its MLP)."""
        if layer == self.model.cfg.n_layers:
            return f"blocks.{layer - 1}.hook_resid_post"
        return f"blocks.{layer}.hook_resid_{'mid' if mlp_input and not self._parallel else 'pre'}"

    def _finished(
        self,
        parts: list[Tensor],
        labels: list[str],
        whole: tuple[int, bool] | None,
        norm: tuple[int, bool] | None,
        pos_slice: Slice,
        return_labels: bool,
    ) -> Stack:
        """Stack parts; check them against the stream entering `whole`, apply the norm before `norm`."""
        stack = torch.stack(parts) if parts else self._empty(pos_slice)
        if whole is not None:
            self._check(stack, self._stream_name(*whole), pos_slice)
        if norm is not None:
            layer, mlp_input = norm
            stack = self.apply_ln_to_stack(
                stack, layer, mlp_input, pos_slice=pos_slice, has_batch_dim=self.has_batch_dim
            )
        return (stack, labels) if return_labels else stack

    def _empty(self, pos_slice: Slice) -> Tensor:
        some = next(
            (self[name] for name in self if name.endswith(("resid_pre", "resid_post", "hook_embed"))), None
        )
        if some is None:
            raise RequestError(
                "a decomposition without parts, of a cache without the stream: its shape is not known"
            )
        shape = pos_slice.apply(some, dim=-2).shape
        return some.new_zeros(0, *shape)

    def _check(self, stack: Tensor, name: str, pos_slice: Slice) -> None:
        """Hold a complete decomposition against the stream, where that was cached."""
        self.residual_error = None
        if name in self.cache_dict:
            self.residual_error = check_sum(
                stack, pos_slice.apply(self[name], dim=-2), f"the decomposition of {name}"
            )

    def accumulated_resid(
        self,
        layer: int | None = None,
        incl_mid: bool = False,
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        mlp_input: bool = False,
        return_labels: bool = False,
    ) -> Stack:
        """The stream entering each block up to `layer`, and at the end the one leaving the last (logit lens).

        apply_ln: pass each through the norm that the last one meets; before the unembedding with statistics of
            its own, as the logit lens does, else with the divisor recorded there.

        Returns [component, *batch and pos, d_model], and labels ("0_pre", "0_mid", …, "final_post") if asked.
        """
        until, chosen, n_layers = self._until(layer), Slice(pos_slice), self.model.cfg.n_layers
        names, labels = [], []
        for i in range(until + 1):
            if i == n_layers:
                names.append(self._stream_name(i, False))
                labels.append("final_post")
                continue
            names.append(f"blocks.{i}.hook_resid_pre")
            labels.append(f"{i}_pre")
            if ((incl_mid and i < until) or (mlp_input and i == until)) and not self._parallel:
                names.append(f"blocks.{i}.hook_resid_mid")
                labels.append(f"{i}_mid")
        self.need(names, "accumulated_resid")
        stack = torch.stack([chosen.apply(self[name], dim=-2) for name in names])
        if apply_ln:
            stack = self.apply_ln_to_stack(
                stack,
                until,
                mlp_input,
                chosen,
                has_batch_dim=self.has_batch_dim,
                recompute_ln=until == n_layers,
            )
        return (stack, labels) if return_labels else stack

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Stack:
        """What the embeddings and each sublayer wrote to the stream entering `layer`.

        Returns [component, *batch and pos, d_model], and labels ("embed", "0_attn_out", …) if asked.
        """
        if mode not in ("all", "mlp", "attn"):
            raise RequestError(f"mode must be 'all', 'mlp' or 'attn'; got {mode!r}")
        until, chosen = self._until(layer), Slice(pos_slice)
        names, labels = self._embedding_names() if incl_embeds else ([], [])
        for i in range(until + int(mlp_input and not self._parallel and until < self.model.cfg.n_layers)):
            if mode != "mlp":
                names.append(f"blocks.{i}.hook_attn_out")
                labels.append(f"{i}_attn_out")
            if mode != "attn" and not self.model.cfg.attn_only and i < until:
                names.append(f"blocks.{i}.hook_mlp_out")
                labels.append(f"{i}_mlp_out")
        self.need(names, "decompose_resid")
        parts = [chosen.apply(self[name], dim=-2) for name in names]
        whole = (until, mlp_input) if mode == "all" and incl_embeds and parts else None
        return self._finished(
            parts, labels, whole, (until, mlp_input) if apply_ln else None, chosen, return_labels
        )

    def _embedding_names(self) -> tuple[list[str], list[str]]:
        if self.model.engine.config.position == "learned":
            return ["hook_embed", "hook_pos_embed"], ["embed", "pos_embed"]
        return ["hook_embed"], ["embed"]

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Parts of the stream as the norm before `layer` passes them on, with its recorded divisor.

        Args:
            residual_stack: [component, *batch and pos, d_model], sliced by pos_slice already and not by batch_slice.
            layer: block whose norm is meant; None or -1 for the final norm. mlp_input: the norm before its MLP.
            recompute_ln: pass each part through the final norm with statistics of its own (logit lens).

        The norm's weight and bias are not applied (folded models have none); `logit_attrs` applies the weight.
        """
        config, until = self.model.engine.config, self._until(layer)
        if config.norm == "none":
            return residual_stack
        if has_batch_dim:
            residual_stack = Slice(batch_slice).apply(residual_stack, dim=1)
        if recompute_ln and until == self.model.cfg.n_layers:
            final = self.model.engine.ln_f
            return residual_stack if final is None else final(residual_stack)
        scale = self._scale(until, mlp_input, pos_slice, batch_slice)
        return norm_of_part(residual_stack, scale, centre=config.norm == "layer")

    def _scale(self, layer: int, mlp_input: bool, pos_slice: SliceInput, batch_slice: SliceInput) -> Tensor:
        """The recorded divisor of the norm before a layer, sliced."""
        config = self.model.engine.config
        if layer == self.model.cfg.n_layers:
            name = "ln_final.hook_scale"
        else:
            name = f"blocks.{layer}.ln{2 if mlp_input else 1}.hook_scale"
            if config.norm_place == "post":
                raise RequestError(
                    "this model's norms stand behind its sublayers: nothing normalises what enters them"
                )
        self.need([name], "applying the norm")
        scale = self[name]
        if scale.dim() > 2 + self.has_batch_dim:  # recorded for each head, with split inputs
            if not bool((scale == scale[..., :1, :]).all()):
                raise RequestError(f"{name} is of inputs edited for each head: no one divisor is the norm's")
            scale = scale[..., 0, :]
        scale = Slice(pos_slice).apply(scale, dim=-2)
        return Slice(batch_slice).apply(scale, dim=0) if self.has_batch_dim else scale

    def logit_attrs(
        self,
        residual_stack: Tensor,
        tokens: str | int | Tensor,
        incorrect_tokens: str | int | Tensor | None = None,
        pos_slice: SliceInput = None,
        batch_slice: SliceInput = None,
        has_batch_dim: bool = True,
    ) -> Tensor:
        """What each part adds to the logit of a token, or to its difference from that of another.

        Args:
            residual_stack: [component, *batch and pos, d_model], sliced by pos_slice already and not by batch_slice.
            tokens: one token, or ids [batch] or [batch, pos]. incorrect_tokens: of the same shape.

        Returns [component, *batch and pos]. The final norm's weight is applied whether it was folded or not; its bias
        and the unembedding's belong to no part. With a soft cap of the logits, these are parts of the logit before it.
        """
        directions = self.model.tokens_to_residual_directions(tokens)
        if incorrect_tokens is not None:
            others = self.model.tokens_to_residual_directions(incorrect_tokens)
            if others.shape != directions.shape:
                raise RequestError(
                    f"tokens and incorrect_tokens must have the same shape; got {list(directions.shape[:-1])} and "
                    f"{list(others.shape[:-1])}"
                )
            directions = directions - others
        normalised = self.apply_ln_to_stack(
            residual_stack, None, pos_slice=pos_slice, batch_slice=batch_slice, has_batch_dim=has_batch_dim
        )
        final = self.model.engine.ln_f
        weight: Any = None if final is None else final._true_weight()
        if weight is not None:
            normalised = normalised * weight
        if directions.dim() == 2 and normalised.dim() == 4:
            directions = directions[:, None]  # one token for each row: the same at every position
        return (normalised * directions * self.model.engine.config.logit_scale).sum(-1)
