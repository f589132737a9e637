"""The MLP, plain or gated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from neuron_lens.hooks import MLPHooks
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.functional import ACTIVATIONS

__all__ = ["MLP"]


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) · up(x)).

    Weights are in the layout of nn.Linear: up and gate [d_mlp, d_model], down [d_model, d_mlp]. The neurons are the
    entries of `post_act`.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "gated"
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        if self.gated:
            self.gate = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, hooks: MLPHooks, **context: Any) -> Tensor:
        """x: [batch, pos, d_model] -> [batch, pos, d_model]"""
        pre_act = hooks.pre_act(self.gate(x) if self.gated else self.up(x), **context)
        post_act = self.act(pre_act)
        if self.gated:
            post_act = post_act * hooks.pre_linear(self.up(x), **context)
        return self.down(hooks.post_act(post_act, **context))
