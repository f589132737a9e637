"""Switches that change what points there are: split inputs, one input for each head, keys and values without groups."""

from __future__ import annotations

import pytest
import torch
from conftest import strong_model, tiny_config
from faces.hooked_transformer.tiny_families import FAMILIES
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookedTransformerKeyValueCache, HookPoint


def lens_of(family: str) -> HookedTransformer:
    return HookedTransformer.from_engine(strong_model(tiny_config(**FAMILIES[family])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_cache_with_split_inputs(family: str, tokens: Tensor) -> None:
    lens = lens_of(family)
    plain, cache = lens.run_with_cache(tokens)
    lens.set_use_split_qkv_input(True)
    lens.set_use_attn_result(True)
    split, full = lens.run_with_cache(tokens)
    assert torch.allclose(plain, split, atol=1e-4)
    kv = lens.engine.config.n_kv_heads
    for name, heads in (("q", 4), ("k", kv), ("v", kv)):
        copies = full[f"blocks.1.hook_{name}_input"]
        expected = cache["resid_pre", 1].unsqueeze(2).expand(-1, -1, heads, -1)
        assert torch.allclose(copies, expected, atol=1e-5)
    if "blocks.1.ln1.hook_scale" in cache and lens.engine.config.norm_place != "post":
        scale = full["blocks.1.ln1.hook_scale"]
        assert scale.shape == (2, 10, kv, 1)
        assert torch.allclose(scale[:, :, 0], cache["blocks.1.ln1.hook_scale"], atol=1e-5)
        assert torch.allclose(
            full.accumulated_resid(layer=1, apply_ln=True),
            cache.accumulated_resid(layer=1, apply_ln=True),
            atol=1e-4,
        )
    if kv == 4:
        lens.set_use_split_qkv_input(False)
        lens.set_use_attn_in(True)
        shared, full = lens.run_with_cache(tokens)
        assert torch.allclose(plain, shared, atol=1e-4) and full["blocks.0.hook_attn_in"].shape == (
            2,
            10,
            4,
            24,
        )


def test_edited_for_each_head_there_is_no_one_divisor(tokens: Tensor) -> None:
    lens = lens_of("gpt2")
    lens.set_use_split_qkv_input(True)

    def one_head(x: Tensor, hook: HookPoint) -> Tensor:
        x[:, :, 2] *= 3
        return x

    with lens.hooks(fwd_hooks=[("blocks.1.hook_v_input", one_head)]):
        _, cache = lens.run_with_cache(tokens)
    with pytest.raises(RequestError, match="edited for each head"):
        cache.accumulated_resid(layer=1, apply_ln=True)


@pytest.mark.parametrize("family", ["llama", "sandwich"])
def test_without_groups_every_head_has_keys_and_values(family: str, tokens: Tensor) -> None:
    lens = lens_of(family)
    plain, cache = lens.run_with_cache(tokens)
    lens.set_ungroup_grouped_query_attention(True)
    lens.set_use_split_qkv_input(True)
    _, full = lens.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    assert torch.allclose(lens(tokens), plain, atol=1e-4)
    for name in ("k", "v"):
        shared, every = cache[f"blocks.1.attn.hook_{name}"], full[f"blocks.1.attn.hook_{name}"]
        assert torch.allclose(every, shared.repeat_interleave(2, 2), atol=1e-5)
        assert full[f"blocks.1.hook_{name}_input"].shape == (2, 10, 4, 24)

    def silence(v: Tensor, hook: HookPoint) -> Tensor:
        v[:, :, 3] = 0
        return v

    _, edited = lens.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z")
    with lens.hooks(fwd_hooks=[("blocks.1.attn.hook_v", silence)]):
        _, silenced = lens.run_with_cache(tokens, names_filter="blocks.1.attn.hook_z")
    before, after = edited["blocks.1.attn.hook_z"], silenced["blocks.1.attn.hook_z"]
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not after[:, :, 3].any()
    weight = lens.engine.blocks[1].attn.v.weight
    assert weight.grad is not None and weight.grad.any(), "gradients reach the shared weights"
    kept, whole = (
        lens.generate(tokens, max_new_tokens=4, do_sample=False, use_past_kv_cache=kept)
        for kept in (True, False)
    )
    assert torch.equal(kept, whole)
    past = HookedTransformerKeyValueCache.init_cache(lens.cfg, "cpu", 2)
    first, second = lens(tokens[:, :6], past_kv_cache=past), lens(tokens[:, 6:], past_kv_cache=past)
    assert torch.allclose(torch.cat((first, second), 1), plain, atol=1e-4)
    lens.set_ungroup_grouped_query_attention(False)
    assert torch.allclose(lens(tokens), plain, atol=1e-5)
