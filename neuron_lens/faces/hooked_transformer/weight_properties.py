"""Weights of all layers at once, the QK and OV circuits, and scores of composition."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.analysis.composition import composition_scores
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.tokenisation import Tokenisation
from neuron_lens.weights import FactoredMatrix

__all__ = ["WeightProperties"]


class WeightProperties(Tokenisation):
    """Weight properties of HookedTransformer.

    A matrix that the engine holds as one tensor is a view of it. Those stacked over layers are copies, which are kept
    until a weight changes; while gradients are on they are made anew, so that gradients reach the weights.
    """

    def _stacked(self, owner: str, name: str) -> Tensor:
        views = [getattr(getattr(block, owner), name) for block in self.blocks if hasattr(block, owner)]
        if not views:
            raise RequestError(f"the model has no {owner} with a weight {name}")
        if torch.is_grad_enabled() and any(view.requires_grad for view in views):
            return torch.stack(views)
        kept: dict[str, Any] = self.__dict__.setdefault("_stacks", {})
        # a changed weight has a new version or a new address
        state = [(view.data_ptr(), view._version, view.dtype) for view in self.engine.parameters()]
        found = kept.get(f"{owner}.{name}")
        if found is None or found[0] != state:
            kept[f"{owner}.{name}"] = found = (state, torch.stack([view.detach() for view in views]))
        return found[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_stacks"}

    @property
    def W_U(self) -> Tensor:
        """[d_model, d_vocab]"""
        return self.unembed.W_U

    @property
    def b_U(self) -> Tensor:
        """[d_vocab]"""
        return self.unembed.b_U

    @property
    def W_E(self) -> Tensor:
        """[d_vocab, d_model]"""
        return self.embed.W_E

    @property
    def W_pos(self) -> Tensor:
        """[n_ctx, d_model]. Raises RequestError for models without learned positions."""
        if self.engine.config.position != "learned":
            raise RequestError(
                f"the model's positions are {self.engine.config.position!r}: there is no W_pos"
            )
        return self.pos_embed.W_pos

    @property
    def W_E_pos(self) -> Tensor:
        """Both embeddings, [d_vocab + n_ctx, d_model]"""
        return torch.cat((self.W_E, self.W_pos))

    @property
    def W_Q(self) -> Tensor:
        """[layer, head, d_model, d_head]"""
        return self._stacked("attn", "W_Q")

    @property
    def W_K(self) -> Tensor:
        """[layer, head, d_model, d_head]; shared heads repeated."""
        return self._stacked("attn", "W_K")

    @property
    def W_V(self) -> Tensor:
        """[layer, head, d_model, d_head]; shared heads repeated."""
        return self._stacked("attn", "W_V")

    @property
    def W_O(self) -> Tensor:
        """[layer, head, d_head, d_model]"""
        return self._stacked("attn", "W_O")

    @property
    def W_in(self) -> Tensor:
        """[layer, d_model, d_mlp]"""
        return self._stacked("mlp", "W_in")

    @property
    def W_gate(self) -> Tensor | None:
        """[layer, d_model, d_mlp]; None for MLPs without a gate."""
        return self._stacked("mlp", "W_gate") if self.engine.config.mlp == "gated" else None

    @property
    def W_out(self) -> Tensor:
        """[layer, d_mlp, d_model]"""
        return self._stacked("mlp", "W_out")

    @property
    def b_Q(self) -> Tensor:
        """[layer, head, d_head]"""
        return self._stacked("attn", "b_Q")

    @property
    def b_K(self) -> Tensor:
        """[layer, head, d_head]; shared heads repeated."""
        return self._stacked("attn", "b_K")

    @property
    def b_V(self) -> Tensor:
        """[layer, head, d_head]; shared heads repeated."""
        return self._stacked("attn", "b_V")

    @property
    def b_O(self) -> Tensor:
        """[layer, d_model]"""
        return self._stacked("attn", "b_O")

    @property
    def b_in(self) -> Tensor:
        """[layer, d_mlp]"""
        return self._stacked("mlp", "b_in")

    @property
    def b_out(self) -> Tensor:
        """[layer, d_model]"""
        return self._stacked("mlp", "b_out")

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_Kᵀ of every head, [layer, head, d_model, d_model]"""
        return FactoredMatrix(self.W_Q, self.W_K.mT)

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every head, [layer, head, d_model, d_model]"""
        return FactoredMatrix(self.W_V, self.W_O)

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Tensor:
        """Sum of the biases that sublayers before `layer` write; with `mlp_input`, of its attention too. [d_model]

        Raises RequestError for models that normalise what sublayers write: there, biases do not simply add.
        """
        self._check_layer(layer, last=self.cfg.n_layers)
        if self.engine.config.norm_place != "pre":
            raise RequestError(
                "this model normalises what its sublayers write, so their biases do not add up"
            )
        total = self.engine.embed.weight.new_zeros(self.cfg.d_model)
        for block in list(self.blocks)[:layer]:
            total = total + block.attn.b_O
            if include_mlp_biases and self.engine.config.mlp in ("plain", "gated"):
                total = total + block.mlp.b_out
        if mlp_input:
            self._check_layer(layer, last=self.cfg.n_layers - 1)
            total = total + self.blocks[layer].attn.b_O
        return total

    def _check_layer(self, layer: int, last: int) -> None:
        if not 0 <= layer <= last:
            raise RequestError(f"layer {layer} does not fit: expected 0 to {last}")

    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> Tensor:
        """How much each head's output composes with each later head's queries, keys or values.

        ‖W_OV W‖ / (‖W_OV‖ ‖W‖) with W the later head's QK matrix (transposed for K) or OV matrix, and 0 for heads of
        the same or an earlier layer (Elhage et al. 2021). [layer, head, layer, head]: writing head first.
        """
        readers = {"Q": self.QK, "K": self.QK.T, "V": self.OV}
        if mode not in readers:
            raise RequestError(f"mode must be 'Q', 'K' or 'V'; got {mode!r}")
        return composition_scores(self.OV, readers[mode])

    def all_head_labels(self) -> list[str]:
        """L0H0, L0H1 and so on."""
        return [f"L{layer}H{head}" for layer in range(self.cfg.n_layers) for head in range(self.cfg.n_heads)]

    @property
    def n_params_total(self) -> int:
        """Numbers in all parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())
