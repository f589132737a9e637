"""The forward pass of a HookedTransformer: inputs and outputs in every classic form, around one call of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.activation_cache import ActivationCache
from neuron_lens.faces.hooked_transformer.kv_cache import HookedTransformerKeyValueCache
from neuron_lens.faces.hooked_transformer.losses import lm_cross_entropy_loss
from neuron_lens.faces.hooked_transformer.tokenisation import PaddingSide
from neuron_lens.faces.hooked_transformer.translate import hook_tree
from neuron_lens.faces.hooked_transformer.weight_properties import WeightProperties
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import KVCache

__all__ = ["ForwardPass", "Loss", "LossPerToken", "Output", "SingleLoss"]

SingleLoss = Tensor  # one number
LossPerToken = Tensor  # [batch, pos - 1]
Loss = SingleLoss | LossPerToken

_RETURN_TYPES = ("logits", "loss", "both", None)


class Output(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Tensor
    loss: Tensor


class ForwardPass(WeightProperties):
    """`forward` and what wraps it."""

    def forward(
        self,
        input: str | Sequence[str] | Tensor,
        return_type: Literal["logits", "loss", "both"] | None = "logits",
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        shortformer_pos_embed: None = None,
        attention_mask: Tensor | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: HookedTransformerKeyValueCache | None = None,
    ) -> Any:
        """Run the model.

        Args:
            input: a text, several, ids [batch, pos] or [pos]; with `start_at_layer`, the residual stream entering
                that block [batch, pos, d_model].
            return_type: "logits" [batch, pos, d_vocab]; "loss", the mean next-token loss; "both", an `Output`;
                None for nothing (the logits are not computed).
            loss_per_token: the loss [batch, pos - 1] instead of its mean.
            prepend_bos, padding_side: for texts; None follows the model's defaults.
            start_at_layer: run from this block on (negative counts from the end); only these blocks are run.
            tokens: with `start_at_layer`, the ids the loss is about.
            attention_mask: 0 where padding [batch, pos]. None finds padding of texts, and of ids by the pad token.
            stop_at_layer: return the stream entering this block instead (negative counts from the end).
            past_kv_cache: keys and values of earlier tokens; extended unless frozen.

        Raises RequestError for inputs, layers and caches that do not fit, HookError for hooks that do not.
        """
        if return_type not in _RETURN_TYPES:
            raise RequestError(f"return_type must be one of {_RETURN_TYPES}; got {return_type!r}")
        if shortformer_pos_embed is not None:
            raise RequestError("shortformer position embeddings are not offered")
        start = self._layer_number(start_at_layer, "start_at_layer")
        stop = self._layer_number(stop_at_layer, "stop_at_layer")
        if start is None:
            ids, pad = self._ids_and_padding(input, prepend_bos, padding_side, attention_mask, past_kv_cache)
            tokens, given = ids, ids
        else:
            given, pad = self._residual(input, attention_mask)
        tree = self._hook_tree()
        if return_type is None and stop is None and (tree is None or not _end_is_hooked(tree)):
            stop = self.cfg.n_layers
        out = self._engine_pass(given, tree, pad, past_kv_cache, start, stop)
        if stop is not None:
            return None if return_type is None and stop_at_layer is None else out
        if return_type in ("logits", None):
            return out if return_type else None
        if tokens is None:
            raise RequestError(
                f"return_type={return_type!r} with start_at_layer needs tokens=, the ids the loss is about"
            )
        mask = None if pad is None else ~pad
        loss = lm_cross_entropy_loss(out, tokens.to(out.device), mask, loss_per_token)
        return loss if return_type == "loss" else Output(out, loss)

    def _hook_tree(self, *, forward_only: bool = False) -> TransformerHooks | None:
        """The tree of hooks for one forward; None when there are none."""
        return hook_tree(self._slots, forward_only=forward_only)

    def _engine_pass(
        self,
        given: Tensor,
        tree: TransformerHooks | None,
        pad: Tensor | None,
        cache: HookedTransformerKeyValueCache | None,
        start: int | None,
        stop: int | None,
    ) -> Tensor:
        engine = self._running_engine()
        inner: KVCache | None = None
        if cache is not None:
            weight = self.engine.embed.weight
            inner = cache.engine_cache(engine.config, weight.dtype, weight.device)
        if start == 0:  # the engine starts with ids; the given stream takes the place of their embedding
            residual = given

            def put_residual(_: Tensor) -> Tensor:
                return residual

            tree = TransformerHooks() if tree is None else tree
            front = TransformerHooks()
            front.resid.post_emb.append_fwd(put_residual)
            given = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
            return engine(given, hooks=front | tree, pad=pad, kv_cache=inner, stop_at_layer=stop)
        return engine(
            given, hooks=tree, pad=pad, kv_cache=inner, start_at_layer=start or 0, stop_at_layer=stop
        )

    def _layer_number(self, layer: int | None, name: str) -> int | None:
        if layer is None:
            return None
        n_layers = self.cfg.n_layers
        if not isinstance(layer, int) or not -n_layers <= layer <= n_layers:
            raise RequestError(f"{name} must be a block from {-n_layers} to {n_layers}; got {layer!r}")
        return layer + n_layers if layer < 0 else layer

    def _ids_and_padding(
        self,
        input: Any,
        prepend_bos: bool | None,
        padding_side: PaddingSide,
        attention_mask: Tensor | None,
        cache: HookedTransformerKeyValueCache | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids [batch, pos] and where they are padding, whatever the input was."""
        pad: Tensor | None = None
        if isinstance(input, Tensor):
            ids = input[None] if input.dim() == 1 else input
            if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise RequestError(
                    f"expected a text, texts, or ids [batch, pos] of whole numbers; got {input.dtype} {list(input.shape)}; "
                    "a residual stream needs start_at_layer"
                )
            ids = ids.to(self.device, torch.long)
            if ids.numel() == 0:
                raise RequestError(f"the prompt is empty: ids have shape {list(ids.shape)}")
            if attention_mask is None and cache is None:
                pad = self._padding_of(ids)
        elif isinstance(input, str) or (
            isinstance(input, Sequence) and all(isinstance(t, str) for t in input)
        ):
            ids, pad = self._padded(input, prepend_bos, padding_side, truncate=None)
            ids = ids.to(self.device)
            pad = None if pad is None else pad.to(self.device)
        else:
            raise RequestError(f"expected a text, texts, or ids [batch, pos]; got {type(input).__name__}")
        if attention_mask is None and cache is not None:
            attention_mask = cache.take_announced()
        if attention_mask is not None:
            pad = self._pad_from(attention_mask, ids, cache)
        return self._tokens_hooked(ids), pad

    def _pad_from(
        self, mask: Tensor, ids: Tensor, cache: HookedTransformerKeyValueCache | None
    ) -> Tensor | None:
        held = 0 if cache is None else cache.length
        if mask.shape == (ids.shape[0], held + ids.shape[1]):
            mask = mask[:, held:]  # the classic form covers what the cache holds, too
        if mask.shape != ids.shape[:2]:
            raise RequestError(
                f"attention_mask {list(mask.shape)} does not belong to input {list(ids.shape[:2])}"
            )
        pad = ~mask.to(self.device).bool()
        return pad if bool(pad.any()) else None

    def _residual(self, input: Any, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        width = self.cfg.d_model
        if not isinstance(input, Tensor) or input.dim() != 3 or input.shape[-1] != width:
            shown = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise RequestError(f"start_at_layer takes a residual stream [batch, pos, {width}]; got {shown}")
        return input, None if attention_mask is None else self._pad_from(attention_mask, input, None)

    def input_to_embed(
        self,
        input: str | Sequence[str] | Tensor,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, None, Tensor | None]:
        """The first half of a forward: (stream entering block 0 [batch, pos, d_model], ids [batch, pos], None, mask).

        mask: 1 where a token, 0 where padding [batch, pos]; None when nothing is padding. The rest of the forward is
        `model(stream, start_at_layer=0, tokens=ids, attention_mask=mask)`.
        """
        ids, pad = self._ids_and_padding(input, prepend_bos, padding_side, attention_mask, None)
        stream = self._engine_pass(ids, self._hook_tree(), pad, None, None, 0)
        return stream, ids, None, None if pad is None else (~pad).long()

    def get_pos_offset(self, past_kv_cache: HookedTransformerKeyValueCache | None, batch_size: int) -> int:
        """Columns a key-value cache holds, which is where the next token's position starts; 0 without a cache.

        Raises RequestError when the cache is of another number of rows.
        """
        if past_kv_cache is None:
            return 0
        if past_kv_cache.batch_size != batch_size:
            raise RequestError(f"the cache is of {past_kv_cache.batch_size} rows, the input of {batch_size}")
        return past_kv_cache.length

    def get_residual(
        self,
        embed: Tensor,
        pos_offset: int = 0,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        tokens: Tensor | None = None,
        return_shortformer_pos_embed: bool = True,
        device: Any = None,
    ) -> Tensor | tuple[Tensor, None]:
        """The stream entering block 0 of token embeddings [batch, pos, d_model]: positions added where they are learned.

        Args:
            pos_offset: positions before these.
            attention_mask: 0 where padding [batch, pos], which has no position.
            prepend_bos, tokens, device: accepted, as nothing depends on them.
            return_shortformer_pos_embed: return a pair, the second of which is None.

        Raises RequestError for another shape, or positions past the model's context.
        """
        embed, pad = self._residual(embed, attention_mask)
        if self.engine.config.position == "learned":
            seen = torch.ones(embed.shape[:2], dtype=torch.long, device=embed.device) if pad is None else ~pad
            positions = (seen.cumsum(-1) - 1).clamp(min=0) + pos_offset
            table = self.pos_embed.W_pos
            if int(positions.max()) >= len(table):
                raise RequestError(
                    f"position {int(positions.max())} exceeds the model's context of {len(table)}"
                )
            embed = embed + self.hook_pos_embed(table[positions] * seen[..., None])
        return (embed, None) if return_shortformer_pos_embed else embed

    def loss_fn(
        self, logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
    ) -> Tensor:
        """Next-token loss; padding that `forward` would find is left out when no mask is given."""
        if attention_mask is None:
            pad = self._padding_of(tokens)
            attention_mask = None if pad is None else ~pad
        return lm_cross_entropy_loss(logits, tokens.to(logits.device), attention_mask, per_token)

    def run_with_cache(
        self,
        *model_args: Any,
        return_cache_object: bool = True,
        remove_batch_dim: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache | dict[str, Tensor]]:
        """One forward and its `ActivationCache` (or, with `return_cache_object=False`, a dictionary).

        Options as in `HookedRootModule.run_with_cache`, and those of `forward`.
        """
        out, kept = super().run_with_cache(*model_args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, kept
        return out, ActivationCache(kept, self, has_batch_dim=not remove_batch_dim)


def _end_is_hooked(tree: TransformerHooks) -> bool:
    return any(
        site.path.startswith(("resid.ln_f", "resid.post_ln_f", "logits")) for site in tree.hooked_sites()
    )
