"""Hook points of a mixture of experts: the router's choice, and the neurons of each expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.errors import HookError, RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookPoint
from neuron_lens.harvest.sources.base import require_site
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer.config import ExpertsConfig

KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "olmoe": {"weights": "softmax"},
    "gpt_oss": {"activation": "clamped_swiglu", "bias": True, "router_bias": True},
}


@pytest.fixture(params=KINDS)
def lens(request: pytest.FixtureRequest) -> HookedTransformer:
    experts = ExpertsConfig(n_experts=5, n_used=2, **KINDS[request.param])
    config = tiny_config(mlp="experts", experts=experts, activation="silu")
    return HookedTransformer.from_engine(strong_model(config))


def test_experts_by_their_weights_are_the_mlp(lens: HookedTransformer, tokens: Tensor) -> None:
    logits, cache = lens.run_with_cache(tokens)
    assert torch.allclose(logits, lens(tokens), rtol=1e-4, atol=1e-3)
    mlp, total = "blocks.1.mlp.", torch.zeros(tokens.numel(), lens.cfg.d_model)
    weights, chosen = cache[f"{mlp}hook_expert_weights"], cache[f"{mlp}hook_expert_indices"]
    assert weights.shape == (tokens.numel(), 5) and chosen.shape == (tokens.numel(), 2)
    used = weights.gather(-1, chosen)
    if lens.engine.config.experts is not None and lens.engine.config.experts.weights != "softmax":
        used = used / used.sum(-1, keepdim=True)
    owner: Any = lens.engine.blocks[1].mlp
    for j in range(5):
        choice, rows = chosen.T.eq(j).nonzero(as_tuple=True)
        post = cache[f"{mlp}experts.{j}.hook_post"]
        assert post.shape == (len(rows), lens.cfg.d_mlp)
        out = post @ lens.blocks[1].mlp.experts[j].W_out.weight.T
        out = out + owner.down_bias[j] if owner.experts.bias else out
        total.index_add_(0, rows, out * used[rows, choice, None])
    assert torch.allclose(total.view(*tokens.shape, -1), cache["mlp_out", 1], rtol=1e-4, atol=1e-3)


def test_an_expert_called_alone_is_the_expert_in_the_model(lens: HookedTransformer, tokens: Tensor) -> None:
    seen: list[Tensor] = []
    expert = lens.blocks[0].mlp.experts[3]
    x = torch.randn(4, lens.cfg.d_model)
    with lens.hooks(fwd_hooks=[("blocks.0.mlp.experts.3.hook_post", lambda h, hook: seen.append(h))]):
        out = expert(x)
    owner: Any = lens.engine.blocks[0].mlp
    assert torch.allclose(out, seen[0] @ owner.down[3].T + (owner.down_bias[3] if owner.experts.bias else 0))


def test_what_a_hook_makes_of_an_expert_reaches_the_model(lens: HookedTransformer, tokens: Tensor) -> None:
    """Emptying an expert's neurons changes the tokens that use it, and no others."""
    _, cache = lens.run_with_cache(tokens)
    chosen = cache["blocks.0.mlp.hook_expert_indices"].view(*tokens.shape, 2)
    expert = int(chosen[0, 0, 1])

    def emptied(x: Tensor, hook: HookPoint) -> Tensor:
        return x.mul_(0)

    with lens.hooks(fwd_hooks=[(f"blocks.0.mlp.experts.{expert}.hook_post", emptied)]):
        _, edited = lens.run_with_cache(tokens, names_filter="blocks.0.hook_mlp_out")
    changed = (edited["mlp_out", 0] - cache["mlp_out", 0]).abs().amax(-1) > 1e-3
    assert torch.equal(changed, chosen.eq(expert).any(-1)) and bool(changed.any())


def test_choosing_by_hand(lens: HookedTransformer, tokens: Tensor) -> None:
    """Indices put by a hook are the experts that run; those that do not exist are refused."""

    def all_to(expert: int) -> Any:
        return lambda x, hook: torch.full_like(x, expert)

    name = "blocks.0.mlp.hook_expert_indices"
    with lens.hooks(fwd_hooks=[(name, all_to(4))]):
        _, cache = lens.run_with_cache(tokens, names_filter="blocks.0.mlp.experts.*.hook_pre")
    rows = [len(cache[f"blocks.0.mlp.experts.{j}.hook_pre"]) for j in range(5)]
    assert rows == [0, 0, 0, 0, tokens.numel()]
    with pytest.raises(HookError, match="there are 0 to 4"):
        lens.run_with_hooks(tokens, fwd_hooks=[(name, all_to(5))])


def test_rows_of_a_batch_keep_their_tokens(lens: HookedTransformer, tokens: Tensor) -> None:
    """A cache sliced to one row is the cache of that row alone, and removing the batch dimension keeps tokens."""
    _, cache = lens.run_with_cache(tokens)
    _, alone = lens.run_with_cache(tokens[1:])
    one = cache.apply_slice_to_batch_dim([1])
    for name in alone:
        assert one[name].shape == alone[name].shape, name
        assert torch.allclose(one[name].float(), alone[name].float(), rtol=1e-3, atol=1e-3), name
    _, flat = lens.run_with_cache(tokens[1:], remove_batch_dim=True)
    removed, sliced = alone.remove_batch_dim(), cache.apply_slice_to_batch_dim(1)
    for name in flat:
        assert flat[name].shape == removed[name].shape == sliced[name].shape, name
    assert flat["blocks.0.mlp.hook_expert_weights"].shape == (tokens.shape[1], 5)


def test_gradients_at_the_points_of_experts(lens: HookedTransformer, tokens: Tensor) -> None:
    lens.engine.requires_grad_(True)
    _, cache = lens.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    for point in (
        "hook_expert_weights",
        *(f"experts.{j}.hook_{n}" for j in range(5) for n in ("gate", "post")),
    ):
        name = f"blocks.1.mlp.{point}"
        if cache[name].numel():
            assert cache[f"{name}_grad"].shape == cache[name].shape, name
    assert "blocks.1.mlp.hook_expert_indices_grad" not in cache.cache_dict


def test_the_engine_records_by_expert(lens: HookedTransformer, tokens: Tensor) -> None:
    hooks, rows = TransformerHooks(), {}

    def where(x: Tensor, layer: int, expert: int, tokens: Tensor) -> None:
        rows[layer, expert] = tokens

    hooks.append_to_path("mlp.expert_pre_act.fwd", where)
    kept = hooks.record(["mlp.expert_post_act", "mlp.expert_weights"])
    lens.engine(tokens, hooks=hooks)
    for expert in range(5):
        used = kept["mlp.expert_weights", 2].flatten(0, 1)[:, expert].nonzero()[:, 0]
        assert torch.equal(rows[2, expert].sort().values, used)
        assert len(kept["mlp.expert_post_act", 2, expert]) == len(used)
    with pytest.raises(KeyError, match="layer 2, expert 7"):
        _ = kept["mlp.expert_post_act", 2, 7]


def test_sites_of_single_experts_are_no_places_for_autoencoders(lens: HookedTransformer) -> None:
    with pytest.raises(RequestError, match="once for each expert"):
        require_site(lens.engine, "mlp.expert_post_act")
