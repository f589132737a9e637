"""The patching family has the usual shapes and equals patching by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions import LogitDifference, capture, patching
from neuron_lens.transformer import Transformer
from tests.interventions.models import everything, prompts, tiny_model

METRIC = LogitDifference(3, 5)
LENGTH = 5


def by_hand(
    model: Transformer, tokens: Tensor, site: str, layer: int, setter: Any, index: Any, clean: Tensor
) -> float:
    def hook(x: Tensor) -> Tensor:
        return setter(x.clone(), index, clean)

    hooks = TransformerHooks().append_to_path(f"{site}.fwd", AtLayers(layer).append(hook))
    return float(METRIC(model(tokens, hooks=hooks), tokens).mean())


FAMILY = {
    "resid_pre": ("resid_pre", "layer_pos"),
    "resid_mid": ("resid_mid", "layer_pos"),
    "attn_out": ("attn_out", "layer_pos"),
    "mlp_out": ("mlp_out", "layer_pos"),
    "attn_head_out_by_pos": ("z", "layer_pos_head_vector"),
    "attn_head_q_by_pos": ("q", "layer_pos_head_vector"),
    "attn_head_k_by_pos": ("k", "layer_pos_head_vector"),
    "attn_head_v_by_pos": ("v", "layer_pos_head_vector"),
    "attn_head_pattern_by_pos": ("pattern", "layer_head_pos_pattern"),
    "attn_head_pattern_dest_src_pos": ("pattern", "layer_head_dest_src_pos_pattern"),
    "attn_head_out_all_pos": ("z", "layer_head_vector"),
    "attn_head_q_all_pos": ("q", "layer_head_vector"),
    "attn_head_k_all_pos": ("k", "layer_head_vector"),
    "attn_head_v_all_pos": ("v", "layer_head_vector"),
    "attn_head_pattern_all_pos": ("pattern", "layer_head_pattern"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_equals_patching_by_hand(name: str) -> None:
    model, corrupted = tiny_model("llama", n_layers=2), prompts(2, LENGTH, seed=1)
    clean = everything(model, prompts(2, LENGTH, seed=2))
    activation, setter_name = FAMILY[name]
    site = patching.SHORT_NAMES[activation]
    setter = getattr(patching, f"{setter_name}_patch_setter")
    result = getattr(patching, f"get_act_patch_{name}")(model, corrupted, clean, METRIC)
    heads = 2 if activation in "kv" else 4
    sizes = {"layer": 2, "pos": LENGTH, "head": heads, "dest": LENGTH, "src": LENGTH}
    axes = [part for part in setter_name.split("_") if part in sizes]
    if "pattern" in setter_name and "pos" in axes:
        axes = ["layer", "head", "dest", "src"] if "src" in axes else ["layer", "head", "dest"]
    assert result.shape == tuple(sizes[axis] for axis in axes)
    indices = list(itertools.product(*(range(sizes[axis]) for axis in axes)))
    for index in indices[:: max(1, len(indices) // 15)]:
        expected = by_hand(model, corrupted, site, index[0], setter, index, clean[site, index[0]])
        assert float(result[index]) == pytest.approx(expected, abs=3e-5), index


def test_stacks_have_the_usual_shapes() -> None:
    model, corrupted = tiny_model(n_layers=2), prompts(1, LENGTH, seed=1)
    clean = everything(model, prompts(1, LENGTH, seed=2))
    last = {"logits_at": -1}

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3] - logits[:, -1, 5]

    every = patching.get_act_patch_attn_head_by_pos_every(model, corrupted, clean, metric, **last)
    assert every.shape == (5, 2, LENGTH, 4)
    pattern = patching.get_act_patch_attn_head_pattern_by_pos(model, corrupted, clean, METRIC)
    torch.testing.assert_close(every[4], pattern.transpose(1, 2))
    heads = patching.get_act_patch_attn_head_all_pos_every(model, corrupted, clean, metric)
    assert heads.shape == (5, 2, 4)
    torch.testing.assert_close(
        heads[2], patching.get_act_patch_attn_head_k_all_pos(model, corrupted, clean, METRIC)
    )
    blocks = patching.get_act_patch_block_every(model, corrupted, clean, metric)
    assert blocks.shape == (3, 2, LENGTH)
    with pytest.raises(RequestError, match="do not stack"):
        patching.get_act_patch_attn_head_all_pos_every(tiny_model("llama"), corrupted, clean, metric)


def test_any_setter_and_any_rows() -> None:
    model, corrupted = tiny_model(), prompts(2, LENGTH, seed=1)
    clean = everything(model, prompts(2, LENGTH, seed=2))
    known = patching.generic_activation_patch(
        model, corrupted, clean, METRIC, patching.layer_pos_patch_setter, "resid_pre", ("layer", "pos")
    )

    def own(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
        return patching.layer_pos_patch_setter(corrupted, index, clean)

    arguments = (model, corrupted, clean, METRIC, own, "resid_pre")
    torch.testing.assert_close(
        patching.generic_activation_patch(*arguments, ("layer", "pos")).values(), known.values()
    )
    rows = patching.generic_activation_patch(*arguments, index=[(2, 1), (0, 4)])
    torch.testing.assert_close(rows.values(), known.values()[[2, 0], [1, 4]])
    with pytest.raises(RequestError, match="give index_axis_names"):
        patching.generic_activation_patch(*arguments)
    with pytest.raises(RequestError, match="did you mean 'resid_pre'"):
        patching.generic_activation_patch(*arguments[:5], "residpre", ("layer", "pos"))


def test_a_cache_by_short_names_will_do_and_wrong_lengths_will_not() -> None:
    model, corrupted = tiny_model(), prompts(1, LENGTH, seed=1)
    clean = capture(model, prompts(1, LENGTH, seed=2), "attn.v_out")
    named = {("z", layer): clean["attn.v_out", layer] for layer in range(3)}
    function = patching.get_act_patch_attn_head_out_all_pos
    assert torch.equal(function(model, corrupted, named, METRIC), function(model, corrupted, clean, METRIC))
    with pytest.raises(RequestError, match="choose prompts of equal length"):
        function(model, prompts(1, LENGTH + 1), clean, METRIC)
    with pytest.raises(RequestError, match=r"lack attn\.q, layer 0"):
        patching.get_act_patch_attn_head_q_all_pos(model, corrupted, clean, METRIC)
