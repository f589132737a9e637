"""The patching family has the usual shapes and equals patching by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions import (
    CrossEntropy,
    LogitDifference,
    PatchingResult,
    SweepResult,
    capture,
    patching,
)
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
    torch.testing.assert_close(patching.generic_activation_patch(*arguments, ("layer", "pos")), known)
    rows = patching.generic_activation_patch(*arguments, index_df=[(2, 1), (0, 4)])
    torch.testing.assert_close(rows, known[[2, 0], [1, 4]])
    with pytest.raises(RequestError, match="give index_axis_names"):
        patching.generic_activation_patch(*arguments)
    with pytest.raises(RequestError, match="did you mean 'resid_pre'"):
        patching.generic_activation_patch(*arguments[:5], "residpre", ("layer", "pos"))
    with pytest.raises(RequestError, match="starts with a layer of the model's 3"):
        patching.generic_activation_patch(*arguments, index_df=[(3, 1)])
    with pytest.raises(RequestError, match="start with 'layer'"):
        patching.generic_activation_patch(*arguments, ("pos", "layer"))
    with pytest.raises(RequestError, match="reduce 'sum'"):
        patching.generic_activation_patch(*arguments, ("layer", "pos"), reduce="sum")


def test_indices_are_data_frames() -> None:
    pandas = pytest.importorskip("pandas")
    model, corrupted = tiny_model(), prompts(2, LENGTH, seed=1)
    clean = everything(model, prompts(2, LENGTH, seed=2))
    whole, frame = patching.get_act_patch_attn_head_out_by_pos(
        model, corrupted, clean, METRIC, return_index_df=True
    )
    expected = patching.make_df_from_ranges((3, LENGTH, 4), ("layer", "pos", "head"))
    pandas.testing.assert_frame_equal(frame, expected)
    chosen = frame[(frame["layer"] == 1) & (frame["pos"] == 2)]
    arguments = (model, corrupted, clean, METRIC, patching.layer_pos_head_vector_patch_setter, "z")
    some, back = patching.generic_activation_patch(*arguments, index_df=chosen, return_index_df=True)
    torch.testing.assert_close(some, whole[1, 2])
    assert back.to_numpy().tolist() == chosen.to_numpy().tolist()
    for wrong, said in (
        (chosen.assign(head=7), "head 7 does not exist: there are 4"),
        (chosen[["pos", "layer", "head"]], "the first column of index_df is the layer"),
        (chosen[:0], "got no rows"),
    ):
        with pytest.raises(RequestError, match=said):
            patching.generic_activation_patch(*arguments, index_df=wrong)


def test_each_rows_numbers_their_errors_and_tests() -> None:
    model, corrupted = tiny_model(), prompts(4, LENGTH, seed=1)
    clean_tokens = prompts(4, LENGTH, seed=2)
    clean = everything(model, clean_tokens)
    two = {"difference": METRIC, "loss": CrossEntropy()}
    plain = patching.get_act_patch_resid_pre(model, corrupted, clean, METRIC)
    result = patching.get_act_patch_resid_pre(model, corrupted, clean, two)
    assert isinstance(result, PatchingResult) and result.metrics == ("difference", "loss")
    one = result["difference"]
    torch.testing.assert_close(one.mean, plain)
    assert one.shape == (3, LENGTH) and one.per_example.shape == (3, LENGTH, 4)
    unpatched = METRIC(model(corrupted), corrupted)
    assert one.baseline == pytest.approx(float(unpatched.mean()), abs=1e-5)
    torch.testing.assert_close(one.effect, plain - unpatched.mean(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.stderr, one.per_example.std(-1) / 2)
    # patching the whole stream at layer 0 position by position never reaches further than the clean run
    reached = one.normalized(METRIC(model(clean_tokens), clean_tokens))
    span = float(METRIC(model(clean_tokens), clean_tokens).mean()) - one.baseline
    torch.testing.assert_close(reached * span, one.effect)
    low, high = one.bootstrap_ci()
    assert bool((low <= one.effect + 1e-6).all() and (one.effect - 1e-6 <= high).all())
    frame = result.to_dataframe()
    assert list(frame.columns) == ["layer", "pos", "difference", "difference_effect", "loss", "loss_effect"]
    assert len(frame) == 15
    kept = patching.get_act_patch_resid_pre(model, corrupted, clean, METRIC, reduce="none")
    torch.testing.assert_close(kept.per_example, one.per_example)
    assert isinstance(
        patching.get_act_patch_resid_pre(model, corrupted, clean, METRIC, baseline=True), PatchingResult
    )
    mean = patching.get_act_patch_resid_pre(model, corrupted, clean, METRIC, reduce="mean")
    torch.testing.assert_close(mean, plain)
    with pytest.raises(RequestError, match="several metrics"):
        _ = result.mean
    with pytest.raises(RequestError, match="a number for each of the 4 rows"):
        patching.get_act_patch_resid_pre(model, corrupted, clean, lambda x: x.mean(), reduce="mean")
    with pytest.raises(RequestError, match="stacks hold one number"):
        patching.get_act_patch_block_every(model, corrupted, clean, METRIC, reduce="none")


def test_the_permutation_test_is_exact_for_few_rows_and_even_under_no_effect() -> None:
    effects = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    swept = SweepResult({"cell": (0, 1, 2)}, {"m": effects}, {"m": torch.zeros(4)}, None)
    result = PatchingResult(swept, {"m": torch.zeros(4)}, ([(0,), (1,), (2,)], ["layer"]))
    # of 16 sign patterns two are as extreme as all alike
    torch.testing.assert_close(result.permutation_pvalue(), torch.tensor([2 / 16, 1.0, 1.0]))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(300, 20, generator=generator)
    labels = tuple(range(300))
    swept = SweepResult({"cell": labels}, {"m": noise}, {"m": torch.zeros(20)}, None)
    result = PatchingResult(swept, {"m": torch.zeros(20)}, ([(i,) for i in labels], ["layer"]))
    found = result.permutation_pvalue(resamples=200)
    assert 0.02 < float((found <= 0.05).float().mean()) < 0.1 and 0.4 < float(found.mean()) < 0.6


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
