"""A model's weights as plain tensors with their configuration: what the functions of this floor map to each other.

Nothing here is edited in place. Functions replace entries of the dictionary and leave the rest shared; `build` then
gives the new model tensors of its own, so that training one model never moves another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.model import Transformer

__all__ = ["Weights"]


@dataclass(frozen=True)
class Weights:
    """Tensors by parameter name, and the configuration they belong to. Tied tensors appear under both names."""

    config: TransformerConfig
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: Transformer) -> Weights:
        """The weights of a model, shared with it."""
        tensors = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
        return cls(model.config, tensors)

    def changed(self, tensors: dict[str, Tensor], **config: Any) -> Self:
        """These weights with some tensors and configuration fields replaced."""
        fields = {**{name: getattr(self.config, name) for name in type(self.config).model_fields}, **config}
        return type(self)(TransformerConfig(**fields), {**self.tensors, **tensors})

    def bias(self, linear: str) -> Tensor:
        """The bias of a linear map, or zeros where it has none. [out]"""
        weight = self.tensors[f"{linear}.weight"]
        found = self.tensors.get(f"{linear}.bias")
        return weight.new_zeros(weight.shape[0]) if found is None else found

    def build(self, like: Transformer) -> Transformer:
        """A model with copies of these tensors; tokenizer, mode and `requires_grad` as in `like`."""
        with torch.device("meta"):
            model = Transformer(self.config, seed=None, tokenizer=like.tokenizer)
        needs_grad = any(p.requires_grad for p in like.parameters())
        own = {
            name: nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=needs_grad)
            for name, tensor in self.tensors.items()
            if not (self.config.tied and name == "unembed.weight")
        }
        for name, parameter in own.items():
            _owner(model, name).register_parameter(name.rpartition(".")[2], parameter)
        if self.config.tied:
            model.unembed.weight = model.embed.weight
        for name, buffer in like.named_buffers():
            _owner(model, name).register_buffer(name.rpartition(".")[2], buffer.clone(), persistent=False)
        left = [name for name, p in model.named_parameters() if p.is_meta]
        assert not left, f"weights without a tensor: {left}"
        return model.train(like.training)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
