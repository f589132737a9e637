"""A mixture of experts in place of the MLP: each token is read by a few of many small MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.hooks import MLPHooks
from neuron_lens.transformer.config import ExpertsConfig, TransformerConfig
from neuron_lens.transformer.functional import ACTIVATIONS, clamped_swiglu

__all__ = ["Experts"]


class Experts(nn.Module):
    """Router and experts.

    Weights: router.weight [expert, d_model]; gate and up [expert, d_mlp, d_model]; down [expert, d_model, d_mlp]; with
    biases gate_bias, up_bias [expert, d_mlp] and down_bias [expert, d_model].
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        assert config.experts is not None, "config.mlp is 'experts'"
        self.experts: ExpertsConfig = config.experts
        n, wide, narrow = self.experts.n_experts, config.d_mlp, config.d_model
        self.router = nn.Linear(narrow, n, bias=self.experts.router_bias)
        self.gate = nn.Parameter(torch.empty(n, wide, narrow))
        self.up = nn.Parameter(torch.empty(n, wide, narrow))
        self.down = nn.Parameter(torch.empty(n, narrow, wide))
        if self.experts.bias:
            self.gate_bias = nn.Parameter(torch.zeros(n, wide))
            self.up_bias = nn.Parameter(torch.zeros(n, wide))
            self.down_bias = nn.Parameter(torch.zeros(n, narrow))
        self.act = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor, hooks: MLPHooks, **context: Any) -> Tensor:
        """x: [batch, pos, d_model] -> [batch, pos, d_model]"""
        logits = hooks.router_logits(self.router(x), **context)
        weights = hooks.expert_weights(self._weights(logits).to(x.dtype), **context)
        flat, flat_weights = x.flatten(0, 1), weights.flatten(0, 1)
        out = torch.zeros_like(flat)
        for expert in range(self.experts.n_experts):
            tokens = flat_weights[:, expert].nonzero()[:, 0]
            if tokens.numel():
                added = self._expert(flat[tokens], expert) * flat_weights[tokens, expert, None]
                out = out.index_add(0, tokens, added)
        return out.view_as(x)

    def _weights(self, logits: Tensor) -> Tensor:
        """Weight of each expert for each token, 0 for those not used. [batch, pos, expert], float32"""
        wide = logits.float()
        if self.experts.weights == "softmax":
            best, chosen = wide.softmax(-1).topk(self.experts.n_used, -1)
        else:
            best, chosen = wide.topk(self.experts.n_used, -1)
            best = best.softmax(-1)
        return torch.zeros_like(wide).scatter(-1, chosen, best)

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        gate, up = x @ self.gate[expert].T, x @ self.up[expert].T
        if self.experts.bias:
            gate, up = gate + self.gate_bias[expert], up + self.up_bias[expert]
        if self.experts.activation == "clamped_swiglu":
            hidden = clamped_swiglu(gate, up, self.experts.limit)
        else:
            hidden = self.act(gate) * up
        out = hidden @ self.down[expert].T
        return out + self.down_bias[expert] if self.experts.bias else out
