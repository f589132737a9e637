"""A mixture of experts in place of the MLP: each token is read by a few of many small MLPs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from neuron_lens.errors import HookError
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
        weights, chosen = self._routed(x, hooks, **context)
        flat, flat_weights = x.flatten(0, 1), weights.flatten(0, 1)
        inside = (hooks.expert_pre_act, hooks.expert_pre_linear, hooks.expert_post_act)
        hooked = any(site.acts_at(context.get("layer")) for site in inside)
        out = torch.zeros_like(flat)
        for expert in range(self.experts.n_experts):
            tokens = flat_weights[:, expert].nonzero()[:, 0]
            if hooked:  # also for an expert no token uses: what was asked for is seen, empty
                tokens = _by_choice(tokens, chosen.flatten(0, 1), expert)
            elif not tokens.numel():
                continue
            added = self.output_of(expert, flat[tokens], hooks, tokens=tokens, **context)
            out = out.index_add(0, tokens, added * flat_weights[tokens, expert, None])
        return out.view_as(x)

    def _routed(self, x: Tensor, hooks: MLPHooks, **context: Any) -> tuple[Tensor, Tensor]:
        """Weight of each expert for each token, 0 for those not used [batch, pos, expert], and those used, best first
        [batch, pos, choice]."""
        layer, used = context.get("layer"), self.experts.n_used
        wide = hooks.router_logits(self.router(x), **context).float()
        if self.experts.weights == "softmax" or hooks.router_probs.acts_at(layer):
            best, chosen = hooks.router_probs(wide.softmax(-1), **context).topk(used, -1)
            if self.experts.weights != "softmax":
                best = best / best.sum(-1, keepdim=True)
        else:
            best, chosen = wide.topk(used, -1)
            best = best.softmax(-1)
        weights = torch.zeros_like(wide)
        if hooks.expert_indices.acts_at(layer):
            chosen = hooks.expert_indices(chosen, **context)
            if not bool(((chosen >= 0) & (chosen < self.experts.n_experts)).all()):
                raise HookError(
                    f"mlp.expert_indices, layer {layer}: a hook chose experts {int(chosen.min())} to {int(chosen.max())}; "
                    f"there are 0 to {self.experts.n_experts - 1}"
                )
            weights = weights.scatter_add(-1, chosen, best)  # a hook may choose one expert twice
        else:
            weights = weights.scatter(-1, chosen, best)
        return hooks.expert_weights(weights.to(x.dtype), **context), chosen

    def output_of(self, expert: int, x: Tensor, hooks: MLPHooks, **context: Any) -> Tensor:
        """What one expert makes of some tokens, before its weight. [token, d_model] -> [token, d_model]"""
        context["expert"] = expert
        gate, up = x @ self.gate[expert].T, x @ self.up[expert].T
        if self.experts.bias:
            gate, up = gate + self.gate_bias[expert], up + self.up_bias[expert]
        gate, up = hooks.expert_pre_act(gate, **context), hooks.expert_pre_linear(up, **context)
        if self.experts.activation == "clamped_swiglu":
            hidden = clamped_swiglu(gate, up, self.experts.limit)
        else:
            hidden = self.act(gate) * up
        out = hooks.expert_post_act(hidden, **context) @ self.down[expert].T
        return out + self.down_bias[expert] if self.experts.bias else out


def _by_choice(tokens: Tensor, chosen: Tensor, expert: int) -> Tensor:
    """Tokens [token] of an expert in the order of which choice it is to them; one only a hook gave them comes last.

    chosen: [batch · pos, choice].
    """
    is_it = chosen[tokens] == expert
    choice = torch.where(is_it.any(-1), is_it.int().argmax(-1), chosen.shape[-1])
    return tokens[choice.argsort(stable=True)]
