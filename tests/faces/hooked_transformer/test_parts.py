"""Parts called on their own compute what the model computes; parts that are replaced run in its place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from conftest import strong_model, tiny_config
from faces.hooked_transformer.tiny_families import FAMILIES
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookPoint
from neuron_lens.transformer import Transformer
from neuron_lens.transformer.config import ExpertsConfig

WITH_MLP = [name for name, changes in FAMILIES.items() if changes.get("mlp") != "none"]


def lens_of(family: str) -> HookedTransformer:
    return HookedTransformer.from_engine(strong_model(tiny_config(**FAMILIES[family])))


def halve(x: Tensor, hook: HookPoint) -> Tensor:
    return x / 2


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_one_after_another_are_the_model(family: str, hooked: bool, tokens: Tensor) -> None:
    lens = lens_of(family)
    inside = ["attn.hook_pattern", "hook_attn_out", "ln1.hook_scale"]
    inside += [] if lens.cfg.attn_only else ["mlp.hook_post", "hook_mlp_out"]
    names = ["ln_final.hook_scale", *(f"blocks.1.{name}" for name in inside)] if hooked else []
    with torch.no_grad(), lens.hooks(fwd_hooks=[(name, halve) for name in names]):
        x = lens.embed(tokens)
        if lens.engine.config.position == "learned":
            x = x + lens.pos_embed(tokens)
        for block in lens.blocks:
            x = block(x)
        logits = lens.unembed(lens.ln_final(x))
        cap = lens.cfg.output_logits_soft_cap
        logits = cap * torch.tanh(logits / cap) if cap > 0 else logits
        assert torch.allclose(logits, lens(tokens), atol=1e-4)


@pytest.mark.parametrize("family", WITH_MLP)
def test_sublayers_give_what_the_cache_says(family: str, tokens: Tensor) -> None:
    lens = lens_of(family)
    config = lens.engine.config
    with torch.no_grad():
        _, cache = lens.run_with_cache(tokens)
        block, stream = lens.blocks[1], cache["resid_pre", 1]
        if config.norm_place == "post":
            read, after_attention = stream, block.ln1
            mlp_read, after_mlp = cache["resid_mid", 1], block.ln2
        else:
            read = block.ln1(stream)
            mlp_read = block.ln2(stream if config.parallel else cache["resid_mid", 1])
            after_attention = getattr(block, "ln1_post", nn.Identity())
            after_mlp = getattr(block, "ln2_post", nn.Identity())
        scale = config.residual_scale
        assert torch.allclose(scale * after_attention(block.attn(read)), cache["attn_out", 1], atol=1e-4)
        assert torch.allclose(scale * after_mlp(block.mlp(mlp_read)), cache["mlp_out", 1], atol=1e-4)


class Around(nn.Module):
    """Calls what it replaced, between two points of its own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hook_out(self.inner(self.hook_in(x)))
        return out


@pytest.mark.parametrize("family", WITH_MLP)
def test_a_part_wrapped_changes_nothing_and_its_points_are_hookable(family: str, tokens: Tensor) -> None:
    lens = lens_of(family)
    plain, cache = lens.run_with_cache(tokens)
    for block in lens.blocks:
        block.mlp = Around(block.mlp)
    lens.unembed = Around(lens.unembed)
    lens.setup()
    again, wrapped = lens.run_with_cache(tokens)
    assert torch.allclose(plain, again, atol=1e-6)
    post = wrapped["blocks.1.mlp.inner.hook_post"]
    assert torch.equal(post, cache["blocks.1.mlp.hook_post"])
    assert torch.allclose(wrapped["unembed.hook_in"], cache["unembed.hook_in"])
    halved = lens.run_with_hooks(tokens, fwd_hooks=[("unembed.hook_out", halve)], return_type="logits")
    cap = lens.cfg.output_logits_soft_cap
    before_cap = torch.atanh(plain / cap) * cap if cap > 0 else plain
    expected = cap * torch.tanh(before_cap / 2 / cap) if cap > 0 else before_cap / 2
    assert torch.allclose(halved, expected, atol=1e-3)
    one = copy.deepcopy(lens)
    two = pickle.loads(pickle.dumps(lens))
    for copied in (one, two):
        assert torch.allclose(copied(tokens), again, atol=1e-6)
        edited = copied.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_out", halve)])
        assert not torch.allclose(edited, again) and torch.allclose(lens(tokens), again, atol=1e-6)
    assert torch.allclose(lens.engine(tokens), plain, atol=1e-6), "the engine itself was changed"
    for text in (lens, one):
        cached, whole = (
            text.generate(tokens, max_new_tokens=3, do_sample=False, use_past_kv_cache=kept)
            for kept in (True, False)
        )
        assert torch.equal(cached, whole)


def test_a_module_of_ones_own_takes_the_place_of_a_part(model: Transformer, tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(model)
    expected = lens.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 0 * x)])
    original = lens.blocks[1].mlp
    lens.blocks[1].mlp = Zero()
    assert torch.equal(lens(tokens), expected), "setup() is for names; the module runs at once"
    lens.blocks[1].mlp = original
    original.forward = lambda x: x * 0
    assert torch.equal(lens(tokens), expected)
    del original.forward
    assert torch.equal(lens(tokens), model(tokens))
    lens.blocks[1].hook_mlp_out = Zero()
    assert torch.equal(lens(tokens), expected)
    lens.blocks[1].hook_mlp_out = HookPoint()
    lens.setup()
    _, cache = lens.run_with_cache(tokens, pos_slice=-1)
    assert cache["blocks.1.hook_mlp_out"].shape == (2, 1, 24)


class Zero(nn.Module):
    """Nothing in the place of something."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0


def test_what_cannot_be_replaced_says_so(model: Transformer, tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(model)
    own = lens.blocks[0].attn
    lens.blocks[0].attn = Zero()
    with pytest.raises(RequestError, match=r"blocks\.0\.attn was replaced by Zero"):
        lens(tokens)
    lens.blocks[0].attn = own
    lens.ln_final = Zero()
    with pytest.raises(RequestError, match="ln_final was replaced"):
        lens(tokens)
    with pytest.raises(RequestError, match="no cache and no mask"):
        own(torch.zeros(1, 2, 24), attention_mask=torch.ones(1, 2))
    with pytest.raises(RequestError, match="expected a stream"):
        lens.blocks[1](torch.zeros(2, 24))


def test_the_soft_cap_of_the_configuration_is_the_one_that_acts(tokens: Tensor) -> None:
    lens = lens_of("sandwich")
    with torch.no_grad():
        capped = lens(tokens)
        lens.cfg.output_logits_soft_cap = -1.0
        free = lens(tokens)
    assert torch.allclose(9.0 * torch.tanh(free / 9.0), capped, atol=1e-4) and not torch.equal(free, capped)


def test_masks_are_shown_and_cannot_be_changed(model: Transformer) -> None:
    lens = HookedTransformer.from_engine(model)
    attn = lens.blocks[0].attn
    assert attn.attn_type == "global" and bool((attn.mask == torch.ones(32, 32).tril().bool()).all())
    attn.mask = attn.mask
    with pytest.raises(RequestError, match="hook_attn_scores"):
        attn.mask = torch.ones(32, 32, dtype=torch.bool)
    windowed = (
        HookedTransformer.from_engine(strong_model(tiny_config(windows=(None, 3, None)))).blocks[1].attn
    )
    assert windowed.attn_type == "local" and windowed.mask.sum(-1).tolist() == [1, 2] + [3] * 30


def test_a_subclass_is_made_by_its_own_init(tokens: Tensor) -> None:
    class Named(HookedTransformer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.title = "mine"

    engine = strong_model(tiny_config())
    named = Named.from_engine(engine)
    assert named.title == "mine" and torch.equal(named(tokens), engine(tokens))


def test_experts_show_their_weights(tokens: Tensor) -> None:
    experts = ExpertsConfig(n_experts=3, n_used=2)
    lens = HookedTransformer.from_engine(
        strong_model(tiny_config(mlp="experts", experts=experts, activation="silu"))
    )
    _, cache = lens.run_with_cache(tokens)
    mlp, read = lens.blocks[1].mlp, lens.blocks[1].ln2(cache["resid_mid", 1])
    assert torch.allclose(mlp(read), cache["mlp_out", 1], atol=1e-4)
    weights, chosen = (read @ mlp.W_gate.weight.T).softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    found = torch.zeros_like(read)
    for j, expert in enumerate(mlp.experts):
        hidden = torch.nn.functional.silu(read @ expert.W_gate.weight.T) * (read @ expert.W_in.weight.T)
        found += (weights * (chosen == j)).sum(-1, keepdim=True) * (hidden @ expert.W_out.weight.T)
    assert torch.allclose(found, cache["mlp_out", 1], atol=1e-4)
    with pytest.raises(RequestError, match=r"experts\[j\]\.W_in"):
        _ = lens.W_in
    wrapped = Around(mlp)
    lens.blocks[1].mlp = wrapped
    assert torch.allclose(lens(tokens), lens.engine(tokens), atol=1e-5)
