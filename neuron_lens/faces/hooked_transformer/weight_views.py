"""The modules below a HookedTransformer: they hold hook points, and show the engine's weights in the classic layout.

Every weight is a view of the engine's tensor, [head, d_model, d_head] where the engine has nn.Linear's layout: editing
one in place edits the model. Biases the model does not have read as zeros, which belong to nobody.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint
from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = ["MLP", "Attention", "Embed", "Norm", "PosEmbed", "TransformerBlock", "Unembed", "View"]


class View(nn.Module):
    """A module with hook points and views of the engine's weights, and no weights of its own."""

    def __init__(self, engine: Transformer, path: str, points: Iterable[str] = ()) -> None:
        super().__init__()
        # in a tuple, so that torch does not count the engine's parameters twice
        self._held = (engine,)
        self._path = path
        for name in points:
            setattr(self, name, HookPoint())

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
        if isinstance(value, Tensor) and isinstance(getattr(type(self), name, None), property):
            view = getattr(self, name)
            if view.shape != value.shape:
                raise RequestError(
                    f"{name} is {list(view.shape)}; a tensor {list(value.shape)} was assigned to it"
                )
            with torch.no_grad():
                view.copy_(value)
            return
        super().__setattr__(name, value)

    def forward(self, *_: Any) -> Tensor:
        """Not for calling: the engine computes."""
        raise RequestError(
            f"{type(self).__name__} shows the weights of a HookedTransformer and does not compute; call the model, with "
            "start_at_layer and stop_at_layer to run some of its blocks"
        )


class Embed(View):
    """Token embedding."""

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model]"""
        return self._weight("embed.weight")


class PosEmbed(View):
    """Learned position embedding."""

    @property
    def W_pos(self) -> Tensor:
        """[n_ctx, d_model]"""
        return self._weight("pos_embed.weight")[self._config.position_offset :]


class Unembed(View):
    """Unembedding."""

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab]"""
        return self._weight("unembed.weight").T

    @property
    def b_U(self) -> Tensor:
        """[d_vocab]"""
        return self._bias("unembed", self._config.d_vocab)


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


class TransformerBlock(View):
    """One block: `attn`, `mlp`, `ln1`, `ln2` and, where the model has them, `ln1_post`, `ln2_post`."""

    def __init__(self, engine: Transformer, layer: int, names: Iterable[str]) -> None:
        below: dict[str, list[str]] = {}
        for name in names:
            owner, _, point = name.rpartition(".")
            below.setdefault(owner, []).append(point)
        super().__init__(engine, f"blocks.{layer}", below.pop("", []))
        post = engine.config.norm_place == "post"
        norms = {
            "ln1": "ln_attn_out" if post else "ln_attn",
            "ln2": "ln_mlp_out" if post else ("ln_attn" if engine.config.shared_norm else "ln_mlp"),
            "ln1_post": "ln_attn_out",
            "ln2_post": "ln_mlp_out",
        }
        kinds: dict[str, type[View]] = {"attn": Attention, "mlp": MLP}
        for owner, points in below.items():
            kind = kinds.get(owner, Norm)
            setattr(self, owner, kind(engine, f"blocks.{layer}.{norms.get(owner, owner)}", points))
