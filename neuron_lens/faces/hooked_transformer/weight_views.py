"""The modules below a HookedTransformer: they hold hook points, and show the engine's weights in the classic layout.

Called, a part computes what the engine computes there, with the hooks on its points: see `parts`.
Every weight is a view of the engine's tensor, [head, d_model, d_head] where the engine has nn.Linear's layout: editing
one in place edits the model. Biases the model does not have read as zeros, which belong to nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import parts
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint
from neuron_lens.faces.hooked_transformer.names import PointPlace
from neuron_lens.faces.hooked_transformer.translate import Slot
from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = ["MLP", "Attention", "Embed", "Norm", "PosEmbed", "Unembed", "View"]


class View(nn.Module):
    """A module with hook points and views of the engine's weights, and no weights of its own."""

    def __init__(
        self, engine: Transformer, path: str = "", points: Mapping[str, PointPlace] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(engine, Transformer):
            raise RequestError(
                f"{type(self).__name__} is made by the model: HookedTransformer(cfg).blocks[0] has an attention, an MLP and norms"
            )
        # in a tuple, so that torch does not count the engine's parameters twice
        self._held = (engine,)
        self._path = path
        self._places = dict(points or {})
        for name in self._places:
            setattr(self, name, HookPoint())

    def slots(self) -> Iterator[Slot]:
        """Where the hook points of this part are held, and of the parts below that it was made with."""
        for name, place in self._places.items():
            yield Slot(self, name, place)

    @property
    def _config(self) -> TransformerConfig:
        return self._held[0].config

    def _weight(self, name: str) -> Tensor:
        path = f"{self._path}.{name}".lstrip(".")
        owner, _, last = path.rpartition(".")
        found = getattr(self._held[0].get_submodule(owner), last, None)
        if found is None:
            raise AttributeError(f"{type(self).__name__} has no weight {path!r} in this model")
        return found

    def _bias(self, name: str, width: int) -> Tensor:
        owner = self._held[0].get_submodule(f"{self._path}.{name}".lstrip("."))
        bias: Tensor | None = owner.bias  # type: ignore[assignment]
        weight: Tensor = owner.weight  # type: ignore[assignment]
        return weight.new_zeros(width) if bias is None else bias

    def __setattr__(self, name: str, value: Any) -> None:
        # assigning to a view writes into the engine's tensor
        kind = getattr(type(self), name, None)
        if isinstance(kind, property) and kind.fset is not None:
            kind.fset(self, value)
            return
        if isinstance(value, Tensor) and isinstance(kind, property):
            view = getattr(self, name)
            if view.shape != value.shape:
                raise RequestError(
                    f"{name} is {list(view.shape)}; a tensor {list(value.shape)} was assigned to it"
                )
            with torch.no_grad():
                view.copy_(value)
            return
        super().__setattr__(name, value)


class Embed(View):
    """Token embedding."""

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model]"""
        return self._weight("embed.weight")

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids [batch, pos] -> [batch, pos, d_model]"""
        return parts.embedded(self._held[0], tokens)


class PosEmbed(View):
    """Learned position embedding."""

    @property
    def W_pos(self) -> Tensor:
        """[n_ctx, d_model]"""
        return self._weight("pos_embed.weight")[self._config.position_offset :]

    def forward(self, tokens: Tensor, past_kv_pos_offset: int = 0) -> Tensor:
        """Ids [batch, pos] -> the embeddings of their positions, [batch, pos, d_model]"""
        end = past_kv_pos_offset + tokens.shape[-1]
        if end > self._config.n_ctx:
            raise RequestError(f"{end} tokens exceed the model's context of {self._config.n_ctx}")
        return self.W_pos[past_kv_pos_offset:end].expand(*tokens.shape, -1)


class Unembed(View):
    """Unembedding."""

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab]"""
        return self._weight("unembed.weight").T

    @property
    def b_U(self) -> Tensor:
        """[d_vocab]"""
        return self._bias("unembed", self._config.d_vocab_out)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised stream -> logits before any soft cap, [..., d_vocab]"""
        inside = parts.taken_over("unembed")
        if inside is not None:
            return inside(x)
        hook_in, hook_out = self._modules["hook_in"], self._modules["hook_out"]
        assert hook_in is not None and hook_out is not None, "made with both"
        logits: Tensor = hook_out(self._held[0].unembed(hook_in(x)) * self._config.logit_scale)
        return logits


class Norm(View):
    """A norm. Folded norms have w = 1 and b = 0."""

    @property
    def w(self) -> Tensor:
        """[d_model]"""
        return self._weight("weight")

    @property
    def b(self) -> Tensor:
        """[d_model]"""
        return self._weight("bias")

    @property
    def eps(self) -> float:
        """Added to the variance (or mean square)."""
        return self._config.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., d_model] -> the same shape, normalised"""
        return parts.normalised(self._held[0], self._path, self._places, list(self.slots()), x)


class Attention(View):
    """Attention. Under grouped-query attention W_K and W_V repeat the shared heads (a copy); `_W_K`, `_W_V` do not."""

    def _heads(self, name: str, heads: int) -> Tensor:
        return self._weight(f"{name}.weight").unflatten(0, (heads, self._config.d_head)).mT

    def _head_bias(self, name: str, heads: int) -> Tensor:
        return self._bias(name, heads * self._config.d_head).unflatten(0, (heads, self._config.d_head))

    def _ungrouped(self, shared: Tensor) -> Tensor:
        groups = self._config.n_heads // self._config.n_kv_heads
        return shared if groups == 1 else shared.repeat_interleave(groups, 0)

    @property
    def W_Q(self) -> Tensor:
        """[head, d_model, d_head]"""
        return self._heads("q", self._config.n_heads)

    @property
    def _W_K(self) -> Tensor:
        return self._heads("k", self._config.n_kv_heads)

    @property
    def _W_V(self) -> Tensor:
        return self._heads("v", self._config.n_kv_heads)

    @property
    def W_K(self) -> Tensor:
        """[head, d_model, d_head]"""
        return self._ungrouped(self._W_K)

    @property
    def W_V(self) -> Tensor:
        """[head, d_model, d_head]"""
        return self._ungrouped(self._W_V)

    @property
    def W_O(self) -> Tensor:
        """[head, d_head, d_model]"""
        weight = self._weight("out.weight")
        return weight.unflatten(1, (self._config.n_heads, self._config.d_head)).permute(1, 2, 0)

    @property
    def b_Q(self) -> Tensor:
        """[head, d_head]"""
        return self._head_bias("q", self._config.n_heads)

    @property
    def _b_K(self) -> Tensor:
        return self._head_bias("k", self._config.n_kv_heads)

    @property
    def _b_V(self) -> Tensor:
        return self._head_bias("v", self._config.n_kv_heads)

    @property
    def b_K(self) -> Tensor:
        """[head, d_head]"""
        return self._ungrouped(self._b_K)

    @property
    def b_V(self) -> Tensor:
        """[head, d_head]"""
        return self._ungrouped(self._b_V)

    @property
    def b_O(self) -> Tensor:
        """[d_model]"""
        return self._bias("out", self._config.d_model)

    @property
    def attn_type(self) -> str:
        """ "local" where attention sees a window of last positions, else "global"."""
        return "global" if self._config.window(self._layer) is None else "local"

    @property
    def mask(self) -> Tensor:
        """Whether a query may look at a key: true on and below the diagonal, within the window. [n_ctx, n_ctx]

        Made when asked for; the engine computes its own. Assigning anything else to it raises RequestError.
        """
        return parts.causal_mask(self._config.n_ctx, self._config.window(self._layer))

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        own = self.mask
        if mask is not own and not (mask.shape == own.shape and torch.equal(mask.bool().cpu(), own)):
            raise RequestError(
                "the mask is computed, not stored: to change who sees whom, hook hook_attn_scores"
            )

    @property
    def _layer(self) -> int:
        return int(self._path.split(".")[1])

    def forward(
        self,
        query_input: Tensor,
        key_input: Tensor | None = None,
        value_input: Tensor | None = None,
        past_kv_cache_entry: None = None,
        additive_attention_mask: None = None,
        attention_mask: None = None,
    ) -> Tensor:
        """The normalised stream [batch, pos, d_model] (or copies for each head) -> what attention adds.

        Keys and values are made from the same input unless given. No caches and masks: call the model for those.
        """
        if not (past_kv_cache_entry is None and additive_attention_mask is None and attention_mask is None):
            raise RequestError("attention on its own takes no cache and no mask: call the model with them")
        key_input = query_input if key_input is None else key_input
        value_input = query_input if value_input is None else value_input
        inputs = (query_input, key_input, value_input)
        return parts.attended(self._held[0], self._layer, list(self.slots()), inputs)


class MLP(View):
    """The MLP, plain or gated."""

    @property
    def W_in(self) -> Tensor:
        """[d_model, d_mlp]"""
        return self._weight("up.weight").T

    @property
    def W_gate(self) -> Tensor:
        """[d_model, d_mlp]"""
        return self._weight("gate.weight").T

    @property
    def W_out(self) -> Tensor:
        """[d_mlp, d_model]"""
        return self._weight("down.weight").T

    @property
    def b_in(self) -> Tensor:
        """[d_mlp]"""
        return self._bias("up", self._config.d_mlp)

    @property
    def b_gate(self) -> Tensor:
        """[d_mlp]"""
        return self._bias("gate", self._config.d_mlp)

    @property
    def b_out(self) -> Tensor:
        """[d_model]"""
        return self._bias("down", self._config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        """The normalised stream [batch, pos, d_model] -> what the MLP gives (before any norm behind it)"""
        inside = parts.taken_over(self._path)
        return (
            inside(x)
            if inside is not None
            else parts.mlp_of(self._held[0], self._path, list(self.slots()), x)
        )
