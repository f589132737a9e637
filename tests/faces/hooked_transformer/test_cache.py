"""ActivationCache: parts sum to the whole, attributions to the logits, with and without folded norms."""

from __future__ import annotations

import pytest
import torch
from conftest import strong_model, tiny_config
from faces.hooked_transformer.tiny_families import FAMILIES
from torch import Tensor

from neuron_lens.errors import NeuronLensError, RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer
from neuron_lens.weights import Processing, process


def lens_of(family: str, **steps: bool) -> HookedTransformer:
    engine = process(strong_model(tiny_config(**FAMILIES[family])), Processing(**steps))
    return HookedTransformer.from_engine(engine, folded=steps.get("fold_ln", False))


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_sum_to_the_stream_and_attributions_to_logits(
    family: str, folded: bool, tokens: Tensor
) -> None:
    lens = lens_of(family, fold_ln=folded)
    with torch.no_grad():
        logits, cache = lens.run_with_cache(tokens)
        final = cache["resid_post", -1]
        sublayers = cache.decompose_resid()
        assert cache.residual_error is not None and cache.residual_error < 1e-5
        everything, labels = cache.get_full_resid_decomposition(return_labels=True)
        assert len(labels) == len(everything) and torch.allclose(everything.sum(0), final, atol=1e-3)
        cache.get_full_resid_decomposition(layer=1, mlp_input=True, expand_neurons=False, return_labels=True)
        assert cache.residual_error < 1e-5
        right, wrong = tokens.roll(1, 1), tokens.roll(3, 0)
        for stack in (sublayers, everything):
            parts = cache.logit_attrs(stack, tokens=right, incorrect_tokens=wrong).sum(0)
            config = lens.engine.config
            raw = logits if config.logit_softcap is None else 9.0 * torch.atanh(logits / 9.0)
            final_norm = lens.engine.ln_f
            constants = torch.zeros(50)
            if final_norm is not None and final_norm.bias is not None:
                constants = constants + lens.engine.unembed.weight @ final_norm.bias
            if lens.engine.unembed.bias is not None:
                constants = constants + lens.engine.unembed.bias
            whole = raw - constants * config.logit_scale
            gap = whole.gather(-1, right[..., None]) - whole.gather(-1, wrong[..., None])
            assert torch.allclose(parts, gap[..., 0], atol=2e-3 * float(gap.abs().max()))


def test_attributions_do_not_depend_on_folding(tokens: Tensor) -> None:
    results = []
    for folded in (False, True):
        _, cache = lens_of("gpt2", fold_ln=folded).run_with_cache(tokens)
        results.append(cache.logit_attrs(cache.stack_head_results(), tokens=7, incorrect_tokens=8))
    assert torch.allclose(*results, atol=1e-4)


def test_remainders_make_sums_whole(tokens: Tensor) -> None:
    lens = lens_of("sandwich")
    with torch.no_grad():
        _, cache = lens.run_with_cache(tokens)
        for layer in (0, 2, -1):
            stream = cache["resid_pre", layer] if layer >= 0 else cache["resid_post", -1]
            for stack in (
                cache.stack_head_results(layer, incl_remainder=True),
                cache.stack_neuron_results(layer, incl_remainder=True, neuron_slice=[1, 4]),
            ):
                assert torch.allclose(stack.sum(0), stream, atol=1e-4)
        direction = torch.randn(24, 3)
        full = cache.stack_neuron_results(2, neuron_slice=(0, 5))
        assert torch.allclose(
            cache.stack_neuron_results(2, neuron_slice=(0, 5), project_output_onto=direction),
            full @ direction,
        )


def test_keys(tokens: Tensor) -> None:
    lens = lens_of("gpt2")
    _, cache = lens.run_with_cache(tokens)
    for key in (("k", 1), "k1", ("k", 1, "attn"), ("key", -2), ("k", 1, "a"), "blocks.1.attn.hook_k"):
        assert cache[key] is cache.cache_dict["blocks.1.attn.hook_k"]
    assert cache["scale"] is cache["ln_final.hook_scale"] and cache["scale", 2, "ln2"] is cache["scale2ln2"]
    assert cache["embed"] is cache["hook_embed"] and cache["mlp_out", 0] is cache["blocks.0.hook_mlp_out"]
    assert cache["attn", 0] is cache["blocks.0.attn.hook_pattern"] and "resid_mid1" in cache
    with pytest.raises(KeyError, match="did you mean"):
        cache["blocks.1.hook_resid_past"]
    with pytest.raises(KeyError, match="layer 3 does not fit"):
        cache["k", 3]


def test_batch_and_positions(tokens: Tensor) -> None:
    lens = lens_of("gpt2")
    with torch.no_grad():
        _, cache = lens.run_with_cache(tokens)
        _, alone = lens.run_with_cache(tokens[:1], remove_batch_dim=True)
        first = cache.apply_slice_to_batch_dim(0)
        assert not first.has_batch_dim and torch.allclose(first["q", 1], alone["q", 1], atol=1e-5)
        assert torch.allclose(
            first.decompose_resid(apply_ln=True), alone.decompose_resid(apply_ln=True), atol=1e-4
        )
        assert torch.allclose(
            cache.decompose_resid(apply_ln=True, pos_slice=-1),
            cache.decompose_resid(apply_ln=True)[:, :, -1],
            atol=1e-6,
        )
        again = lens.run_with_cache(tokens[:1])[1].remove_batch_dim()
        assert torch.allclose(again.stack_head_results(), alone.stack_head_results(), atol=1e-5)
        with pytest.raises(RequestError, match="2 rows"):
            cache.remove_batch_dim()
        moved = cache.to("cpu")
        assert moved is not cache and len(moved) == len(cache)


def test_logit_lens_ends_at_the_logits(tokens: Tensor) -> None:
    lens = lens_of("llama")
    with torch.no_grad():
        logits, cache = lens.run_with_cache(tokens)
        assert torch.allclose(cache.logit_lens()[-1], logits, atol=1e-4)


def test_filtered_caches_say_what_is_missing(tokens: Tensor) -> None:
    lens = lens_of("gpt2")
    _, cache = lens.run_with_cache(tokens, names_filter="blocks.*.hook_resid_pre")
    assert len(cache) == 3
    for call, missing in (
        (cache.decompose_resid, "hook_embed"),
        (cache.stack_head_results, "blocks.0.attn.hook_z"),
        (cache.accumulated_resid, "blocks.2.hook_resid_post"),
        (cache.stack_neuron_results, "blocks.0.mlp.hook_post"),
        (lambda: cache.apply_ln_to_stack(torch.zeros(1, 2, 10, 24)), "ln_final.hook_scale"),
    ):
        with pytest.raises(NeuronLensError, match=f"does not hold.*{missing}"):
            call()


def test_an_edited_stream_is_no_sum(tokens: Tensor) -> None:
    lens = lens_of("gpt2")
    with lens.hooks(fwd_hooks=[("blocks.1.hook_resid_post", lambda x, hook: x * 1.5)]):
        _, cache = lens.run_with_cache(tokens)
    with pytest.raises(RequestError, match="does not add up"):
        cache.decompose_resid()
    cache.decompose_resid(layer=1)


def test_layers_and_modes_are_checked(tokens: Tensor) -> None:
    _, cache = lens_of("gpt2").run_with_cache(tokens)
    with pytest.raises(RequestError, match="layer must be"):
        cache.decompose_resid(layer=4)
    with pytest.raises(RequestError, match="mode must be"):
        cache.decompose_resid(mode="both")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="same shape"):
        cache.logit_attrs(cache.decompose_resid(), tokens=3, incorrect_tokens=torch.tensor([1, 2]))
