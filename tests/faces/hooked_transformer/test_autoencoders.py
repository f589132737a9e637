"""Autoencoders on a HookedTransformer: splices by SAELens' names that leave the user's hooks alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, splice
from neuron_lens.errors import HookError, NeuronLensError, RequestError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookPoint
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import Transformer

AT = "blocks.1.hook_resid_post"
D, N = 24, 96


def autoencoder(seed: int = 0, **changes: object) -> Autoencoder:
    fields = {
        "d_in": D,
        "d_latent": N,
        "activation": "topk",
        "k": 5,
        "site_in": Site(path="resid.torso.post_mlp", layer=1),
        **changes,
    }
    return Autoencoder(AutoencoderConfig(**fields), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def lens(model: Transformer) -> Iterator[HookedTransformer]:
    yield HookedTransformer.from_engine(model)
    model.zero_grad()


def spliced_logits(model: Transformer, tokens: Tensor, *saes: Autoencoder, error: str = "drop") -> Tensor:
    hooks = TransformerHooks()
    for sae in saes:
        splice(hooks, sae, error=error)
    return model(tokens, hooks=hooks)


def test_an_attached_autoencoder_is_a_splice(
    lens: HookedTransformer, model: Transformer, tokens: Tensor
) -> None:
    sae, plain, names = autoencoder(), lens(tokens), set(lens.hook_dict)
    lens.add_sae(sae)
    assert lens.acts_to_saes == {AT: sae}
    assert set(lens.hook_dict) - names == {
        f"{AT}.hook_sae_{part}" for part in ("input", "acts_pre", "acts_post", "recons", "error", "output")
    }
    assert torch.equal(lens(tokens), spliced_logits(model, tokens, sae))
    logits, cache = lens.run_with_cache(tokens)
    torch.testing.assert_close(logits, lens(tokens))  # not to the bit: sparse and dense sums differ
    seen = cache[AT]
    torch.testing.assert_close(cache[f"{AT}.hook_sae_input"], seen)
    torch.testing.assert_close(cache[f"{AT}.hook_sae_acts_pre"], sae.pre_activations(seen))
    torch.testing.assert_close(cache[f"{AT}.hook_sae_acts_post"], sae.encode(seen))
    torch.testing.assert_close(cache[f"{AT}.hook_sae_output"], sae(seen))
    torch.testing.assert_close(cache["blocks.2.hook_resid_pre"], sae(seen))
    assert f"{AT}.hook_sae_error" not in cache, "without the error term there is none"
    lens.reset_saes()
    assert torch.equal(lens(tokens), plain)
    assert set(lens.hook_dict) == names and lens.acts_to_saes == {}


def test_with_the_error_term_nothing_changes_but_what_is_edited(
    lens: HookedTransformer, tokens: Tensor
) -> None:
    sae, plain = autoencoder(), lens(tokens)
    torch.testing.assert_close(
        lens.run_with_saes(tokens, saes=sae, use_error_term=True), plain, atol=2e-4, rtol=1e-4
    )
    _, cache = lens.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(cache[f"{AT}.hook_sae_error"], cache[AT] - sae(cache[AT]))
    assert lens.acts_to_saes == {}

    def add(latents: Tensor, hook: HookPoint) -> None:
        latents[:, 3, 7] += 2.5

    hooks = [(f"{AT}.hook_sae_acts_post", add)]
    moved = lens.run_with_hooks_with_saes(
        tokens, saes=sae, use_error_term=True, fwd_hooks=hooks, stop_at_layer=2
    ) - lens(tokens, stop_at_layer=2)
    torch.testing.assert_close(moved[:, 3], (2.5 * sae.W_dec[7]).expand(2, D), atol=1e-4, rtol=1e-3)
    assert moved[:, :3].abs().max() < 1e-4 and moved[:, 4:].abs().max() < 1e-4


def test_the_users_hooks_stay_and_stand_before_the_autoencoder(
    lens: HookedTransformer, tokens: Tensor
) -> None:
    sae, seen = autoencoder(), []
    lens.add_hook(AT, lambda x, hook: x * 2)
    lens.add_hook(AT, lambda g, hook: seen.append(g.shape), dir="bwd")
    doubled = lens(tokens, stop_at_layer=2)
    lens.add_sae(sae)
    torch.testing.assert_close(lens(tokens, stop_at_layer=2), sae(doubled))
    lens(tokens).sum().backward()
    assert seen == [torch.Size([2, 10, D])]
    lens.reset_saes()
    torch.testing.assert_close(lens(tokens, stop_at_layer=2), doubled)
    assert len(lens.list_hooks()[AT]) == 2


def test_several_at_one_site_stand_behind_each_other(
    lens: HookedTransformer, model: Transformer, tokens: Tensor
) -> None:
    first, second, other = (
        autoencoder(0),
        autoencoder(1),
        autoencoder(2, site_in=Site(path="resid.torso.delta_attn", layer=0)),
    )
    for sae in (first, second, other):
        lens.add_sae(sae)
    assert lens.acts_to_saes == {AT: first, f"{AT}.2": second, "blocks.0.hook_attn_out": other}
    torch.testing.assert_close(lens(tokens), spliced_logits(model, tokens, first, second, other))
    _, cache = lens.run_with_cache(tokens)
    torch.testing.assert_close(cache[f"{AT}.2.hook_sae_input"], cache[f"{AT}.hook_sae_output"])
    lens.add_sae(first, use_error_term=True)  # the same object again: other settings, not another splice
    assert len(lens.acts_to_saes) == 3
    lens.reset_saes(f"{AT}.2")
    assert list(lens.acts_to_saes) == [AT, "blocks.0.hook_attn_out"]
    lens.add_sae(second)
    lens.reset_saes([AT])
    assert lens.acts_to_saes == {"blocks.0.hook_attn_out": other}


def test_a_context_gives_back_exactly_what_was_there(lens: HookedTransformer, tokens: Tensor) -> None:
    kept, passing = autoencoder(0), autoencoder(1)
    lens.add_sae(kept, use_error_term=True)
    hooked = []
    lens.add_hook(f"{AT}.hook_sae_acts_post", lambda x, hook: hooked.append(1))
    before = lens(tokens)
    with pytest.raises(ZeroDivisionError), lens.saes([passing, kept], use_error_term=False) as inside:
        assert inside is lens and len(lens.acts_to_saes) == 2
        assert not torch.allclose(lens(tokens), before, atol=1e-3)
        lens.reset_saes()
        raise ZeroDivisionError
    assert lens.acts_to_saes == {AT: kept}
    assert torch.equal(lens(tokens), before) and len(hooked) == 3
    with lens.saes(passing, reset_saes_end=False):
        pass
    assert list(lens.acts_to_saes.values()) == [kept, passing]


def test_caching_changes_nothing_and_holds_what_was_there_before_edits_in_place(
    lens: HookedTransformer, tokens: Tensor
) -> None:
    lens.add_sae(autoencoder(normalisation="layer_norm"), use_error_term=True)
    plain = lens(tokens)
    logits, cache = lens.run_with_cache(tokens)
    torch.testing.assert_close(logits, plain)

    def wipe(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    for part in ("input", "acts_pre", "acts_post", "recons", "error", "output"):
        name = f"{AT}.hook_sae_{part}"
        with lens.hooks([(name, wipe)]):
            changed, before_edit = lens.run_with_cache(tokens, names_filter=[name, AT])
        assert before_edit[name].abs().max() == 0, "the cache sees what earlier hooks left"
        torch.testing.assert_close(before_edit[AT], cache[AT])
        assert not torch.allclose(changed, plain, atol=1e-3), part
    assert cache[f"{AT}.hook_sae_acts_post"].abs().max() > 0


def test_a_transcoder_has_its_points_where_it_writes(lens: HookedTransformer, tokens: Tensor) -> None:
    places = {
        "site_in": Site(path="resid.torso.post_ln_mlp", layer=1),
        "site_out": Site(path="resid.torso.delta_mlp", layer=1),
    }
    sae = autoencoder(has_skip=True, **places)
    torch.nn.init.normal_(sae.W_skip, generator=torch.Generator().manual_seed(0))
    _, cache = lens.run_with_cache_with_saes(tokens, saes=sae)
    prefix = "blocks.1.hook_mlp_out"
    torch.testing.assert_close(cache[f"{prefix}.hook_sae_output"], sae(cache[f"{prefix}.hook_sae_input"]))
    kept = lens.run_with_saes(tokens, saes=sae, use_error_term=True)
    torch.testing.assert_close(kept, lens(tokens), atol=2e-4, rtol=1e-4)
    lens.add_sae(sae)
    assert list(lens.acts_to_saes) == ["blocks.1.mlp.hook_in"]
    lens.reset_saes("blocks.1.mlp.hook_in")


def test_gradients_pass_as_asked(lens: HookedTransformer, tokens: Tensor) -> None:
    sae, found = autoencoder().requires_grad_(False), {}
    for gradient in ("both", "reconstruction"):
        lens.zero_grad()
        lens.add_sae(sae, use_error_term=True, gradient=gradient)
        lens(tokens)[0, -1, 3].backward()
        found[gradient] = lens.W_E.grad.clone()
        lens.reset_saes()
    lens.zero_grad()
    lens(tokens)[0, -1, 3].backward()
    torch.testing.assert_close(found["both"], lens.W_E.grad, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(found["reconstruction"], lens.W_E.grad, atol=1e-3)


def test_generation_with_and_without_the_cache_and_copies(lens: HookedTransformer, tokens: Tensor) -> None:
    lens.add_sae(autoencoder())
    options = {"max_new_tokens": 5, "do_sample": False, "stop_at_eos": False}
    with_cache = lens.generate(tokens[:, :4], use_past_kv_cache=True, **options)
    assert torch.equal(with_cache, lens.generate(tokens[:, :4], use_past_kv_cache=False, **options))
    copied = copy.deepcopy(lens)
    assert torch.equal(copied(tokens), lens(tokens))
    copied.reset_saes()
    assert len(lens.acts_to_saes) == 1 and not copied.acts_to_saes


def test_one_dtype_inside_and_the_models_outside(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()).bfloat16())
    lens.add_sae(autoencoder(), use_error_term=True)
    plain, logits = lens.run_with_saes(tokens, reset_saes_end=True), lens(tokens)
    assert logits.dtype == torch.bfloat16 and torch.equal(plain, logits)
    lens.reset_saes()
    assert torch.equal(lens(tokens), logits), "bit-equal where the error is added in float32"


@pytest.mark.parametrize("error", [False, True])
def test_left_out_tokens_keep_what_the_site_holds(
    error: bool, lens: HookedTransformer, tokens: Tensor
) -> None:
    sae, out = autoencoder(), tokens[0, 3].item()
    here = tokens == out
    options = {"saes": sae, "use_error_term": error, "exclude_special_tokens": [out], "stop_at_layer": 2}
    stream, cache = lens.run_with_cache_with_saes(tokens, **options)
    plain = lens(tokens, stop_at_layer=2)
    torch.testing.assert_close(stream, torch.where(here[:, :, None], plain, plain if error else sae(plain)))
    if error:
        seen = cache[f"{AT}.hook_sae_error"]
        assert seen[here].abs().max() == 0 and (seen[~here].abs().amax(-1) > 0).all()
    assert torch.equal(lens.run_with_saes(tokens, **options)[here], plain[here])
    with pytest.raises(RequestError, match="tokenizer"):
        lens.add_sae(sae, exclude_special_tokens=True)
    with pytest.raises(RequestError, match="started from a residual stream"):
        lens.run_with_saes(torch.zeros(1, 3, D), start_at_layer=1, saes=sae, exclude_special_tokens=[out])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site_in": None}, "does not say which site"),
        ({"site_in": Site(path="resid.torso.post_mlp", layer=9)}, "has layers 0 to 2"),
        ({"site_in": Site(path="resid.torso.post_mlp")}, "say which layer"),
        ({"site_in": Site(path="resid.torso.pots_mlp", layer=1)}, "did you mean 'resid.torso.post_mlp'"),
        ({"site_in": Site(path="mlp.pre_linear", layer=1)}, "never fires in this model"),
        ({"d_in": 12}, "is 12 wide at resid.torso.post_mlp, which is 24 wide"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_added(
    changes: dict, message: str, lens: HookedTransformer
) -> None:
    with pytest.raises(NeuronLensError, match=message):
        lens.add_sae(autoencoder(**changes))
    assert lens.acts_to_saes == {}


def test_bad_requests_are_refused(lens: HookedTransformer, tokens: Tensor) -> None:
    with pytest.raises(RequestError, match="load_autoencoder"):
        lens.add_sae("gpt2-small-res-jb")
    with pytest.raises(RequestError, match="none is attached anywhere"):
        lens.reset_saes(AT)
    lens.add_sae(autoencoder())
    with pytest.raises(RequestError, match=f"did you mean '{AT}'"):
        lens.reset_saes("blocks.1.hook_resid_psot")
    with pytest.raises(HookError, match="never ran"):
        lens.run_with_cache(tokens, names_filter=f"{AT}.hook_sae_error")
