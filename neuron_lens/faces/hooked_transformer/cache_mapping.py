"""The mapping half of ActivationCache: full names, short names, devices, batches."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from neuron_lens.cache import Slice, SliceInput
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_transformer.act_name import get_act_name
from neuron_lens.faces.hooked_transformer.not_offered import OF_CACHES, not_offered

if TYPE_CHECKING:
    from neuron_lens.faces.hooked_transformer.forward import ForwardPass

__all__ = ["CacheMapping", "NotCachedError"]

CacheKey = str | tuple[Any, ...]


class NotCachedError(RequestError, KeyError):
    """An activation is asked for that the cache does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


class CacheMapping:
    """Activations by name.

    `cache["blocks.3.attn.hook_k"]`, `cache["k", 3]`, `cache["k3"]`, `cache["scale", 3, "ln1"]`; layers count from the
    end when negative.
    """

    def __init__(self, cache_dict: dict[str, Tensor], model: ForwardPass, has_batch_dim: bool = True) -> None:
        self.cache_dict, self.model, self.has_batch_dim = cache_dict, model, has_batch_dim
        self.has_embed = "hook_embed" in cache_dict
        self.has_pos_embed = "hook_pos_embed" in cache_dict
        # relative error of the last decomposition that could be checked against the stream
        self.residual_error: float | None = None

    def __getitem__(self, key: CacheKey) -> Tensor:
        name = self.full_name(key)
        if name not in self.cache_dict:
            hint = did_you_mean(name, self.cache_dict) if self.cache_dict else "it holds nothing"
            raise NotCachedError(
                f"the cache of {len(self.cache_dict)} activations has no {name!r}; {hint}"
                + (
                    ""
                    if name not in self.model.hook_dict
                    else "; was it made with a names_filter that leaves it out?"
                )
            )
        return self.cache_dict[name]

    def full_name(self, key: CacheKey) -> str:
        """The full name a key stands for."""
        if isinstance(key, str):
            return key if key in self.cache_dict else get_act_name(key)
        name, layer, *rest = (*key, None) if len(key) == 1 else key
        if isinstance(layer, int) and layer < 0:
            layer += self.model.cfg.n_layers
        if isinstance(layer, int) and not 0 <= layer < self.model.cfg.n_layers:
            raise NotCachedError(f"layer {key[1]} does not fit a model of {self.model.cfg.n_layers} layers")
        return get_act_name(name, layer, *rest)

    def need(self, names: list[str], what: str) -> None:
        """Raise NotCachedError naming all that is missing for something."""
        missing = [name for name in names if name not in self.cache_dict]
        if missing:
            more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
            raise NotCachedError(
                f"{what} needs activations this cache does not hold: {', '.join(missing[:6])}{more}; make it without a "
                "names_filter, or with one that takes these in"
            )

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str | tuple) and self.full_name(key) in self.cache_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def keys(self) -> KeysView[str]:
        """Full names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """Activations."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of full name and activation."""
        return self.cache_dict.items()

    def to(self, device: torch.device | str, move_model: bool = False) -> Self:
        """A cache with all tensors on a device; this one stays as it is."""
        if move_model:
            self.model.to(device)
        return self._like({name: tensor.to(device) for name, tensor in self.items()}, self.has_batch_dim)

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Switch gradients for the whole process; prefer `torch.no_grad()` around what needs it."""
        torch.set_grad_enabled(mode)

    def remove_batch_dim(self, batch_size: int | None = None) -> Self:
        """Drop the batch dimension of a cache of one sequence, in place. Returns self."""
        if not self.has_batch_dim:
            return self
        apart = [name for name in self if not self._joins_rows(name)]
        wrong = next((name for name in apart if self.cache_dict[name].shape[0] != 1), None)
        if wrong is not None:
            rows = self.cache_dict[wrong].shape[0]
            raise RequestError(
                f"cannot remove the batch dimension: {wrong} has {rows} rows; slice one with apply_slice_to_batch_dim"
            )
        self.cache_dict |= {name: self.cache_dict[name][0] for name in apart}
        self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: SliceInput) -> Self:
        """A cache of some batch rows; an int drops the batch dimension."""
        chosen = Slice(batch_slice)
        if not self.has_batch_dim:
            raise RequestError("this cache has no batch dimension to slice")
        kept = {
            name: self._rows_of_joined(name, chosen)
            if self._joins_rows(name)
            else chosen.apply(tensor, dim=0)
            for name, tensor in self.items()
        }
        return self._like(kept, has_batch_dim=chosen.mode != "int")

    def _joins_rows(self, name: str) -> bool:
        """Whether an entry has the tokens of all rows in one axis: those of a mixture of experts do."""
        place = self.model._places.get(name.removesuffix("_grad"))
        return place is not None and place.axes[:1] == ("token",)

    def _rows_of_joined(self, name: str, chosen: Slice) -> Tensor:
        """Of an entry [token, …], the tokens of some batch rows. Raises NotCachedError when the cache cannot tell them."""
        batch = next((tensor.shape[0] for other, tensor in self.items() if not self._joins_rows(other)), None)
        place, tensor = self.model._places[name.removesuffix("_grad")], self.cache_dict[name]
        routing = f"blocks.{place.layer}.mlp.hook_expert_indices"
        if batch is None or (place.expert is not None and routing not in self.cache_dict):
            missing = routing if batch is not None else "an activation with a batch dimension"
            raise NotCachedError(
                f"which rows of {name} belong to which batch row needs {missing} in the cache, too"
            )
        if place.expert is None:
            found = chosen.apply(tensor.unflatten(0, (batch, -1)), dim=0)
            return found if chosen.mode == "int" else found.flatten(0, 1)
        experts = self.cache_dict[routing]  # [batch · pos, choice]
        tokens = experts.T.eq(place.expert).nonzero()[:, 1]
        if len(tokens) != len(tensor):
            raise NotCachedError(
                f"{name} has other tokens than {routing} tells: its weights were changed by a hook"
            )
        wanted = torch.zeros(batch, dtype=torch.bool, device=tensor.device)
        wanted[chosen.apply(torch.arange(batch, device=tensor.device))] = True
        return tensor[wanted[tokens // (len(experts) // batch)]]

    def _like(self, cache_dict: dict[str, Tensor], has_batch_dim: bool) -> Self:
        return type(self)(cache_dict, self.model, has_batch_dim)

    def __getattr__(self, name: str) -> Any:
        if name in OF_CACHES:
            raise not_offered(type(self).__name__, name, OF_CACHES[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} activations"
