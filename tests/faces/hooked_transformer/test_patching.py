"""Patching under its classic names gives what patching by hand gives."""

from __future__ import annotations

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens import interventions
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookPoint, patching


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 3] - logits[:, -1, 4]


def test_patching_is_what_it_says(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    corrupted = tokens.flip(0)[:1]
    with torch.no_grad():
        _, clean = lens.run_with_cache(tokens[:1])
        streams = patching.get_act_patch_resid_pre(lens, corrupted, clean, metric)
        heads = patching.get_act_patch_attn_head_out_all_pos(lens, corrupted, clean, patching_metric=metric)
        assert streams.shape == (3, 10) and heads.shape == (3, 4)

        def put(x: Tensor, hook: HookPoint) -> Tensor:
            patched = x.clone()
            patched[:, 4] = clean[str(hook.name)][:, 4]
            return patched

        by_hand = metric(lens.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", put)])).mean()
    assert torch.allclose(streams[1, 4].float(), by_hand, atol=1e-4)


def test_direct_paths_take_caches() -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    corrupted, others = torch.arange(10)[None], torch.arange(10).flip(0)[None]
    with torch.no_grad():
        _, clean = lens.run_with_cache(others)
        _, before = lens.run_with_cache(corrupted)
        table = patching.get_act_patch_direct_path(lens, corrupted, clean, before, metric, 0, 1, "v")
        below = interventions.get_act_patch_direct_path(lens.engine, corrupted, others, metric, 0, 1, "v")
        plain = metric(lens(corrupted)).mean()
    torch.testing.assert_close(table, below)
    assert table.shape == (3, 4)
    torch.testing.assert_close(table[0], plain.expand(4), atol=1e-4, rtol=1e-4)
    assert float((table[1:] - plain).abs().max()) > 1e-4
    index = patching.make_df_from_ranges((3, 2), ("layer", "pos"))
    setter = patching.layer_pos_patch_setter
    found, same = patching.generic_activation_patch(
        lens, corrupted, clean, metric, setter, "resid_pre", index_df=index, return_index_df=True
    )
    assert same.equals(index)
    whole = patching.get_act_patch_resid_pre(lens, corrupted, clean, metric)
    torch.testing.assert_close(found.view(3, 2), whole[:, :2], atol=1e-4, rtol=1e-4)


def test_refusals(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    _, clean = lens.run_with_cache(tokens)
    lens.add_hook("hook_embed", lambda x, hook: None)
    with pytest.raises(RequestError, match="reset_hooks"):
        patching.get_act_patch_mlp_out(lens, tokens, clean, metric)
    with pytest.raises(AttributeError, match="did you mean"):
        _ = patching.get_act_patch_resid_past
