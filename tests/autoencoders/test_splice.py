"""The laws of a splice into a model, for every architecture, dtype, site and way of running."""

from __future__ import annotations

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, reference_errors, splice
from neuron_lens.errors import HookError, NeuronLensError, RequestError
from neuron_lens.hooks import AtPositions, AtUnits, TransformerHooks
from neuron_lens.interventions import EditLatents, to_hooks
from neuron_lens.transformer import KVCache, Transformer

STREAM = "resid.torso.post_mlp"
D, N = 24, 96
CONFIGS = {
    "relu": {"activation": "relu"},
    "gated": {"activation": "gated"},
    "topk": {"activation": "topk", "k": 5},
    "batch_topk": {"activation": "batch_topk"},
    "jumprelu": {"activation": "jumprelu"},
    "groupmax": {"activation": "groupmax", "k": 4},
    "topk layer_norm": {"activation": "topk", "k": 5, "normalisation": "layer_norm"},
    "rescaled": {
        "activation": "relu",
        "normalisation": "constant_norm_rescale",
        "input_bias": "decoder_bias",
    },
}


def autoencoder(
    name: str = "topk", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Autoencoder:
    fields = {"d_in": D, "d_latent": N, "site_in": Site(path=STREAM, layer=1), **CONFIGS[name], **changes}
    generator = torch.Generator().manual_seed(seed)
    made = Autoencoder(AutoencoderConfig(**fields), generator=generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("name", CONFIGS)
def test_unedited_with_the_error_kept_changes_nothing(name: str, model: Transformer, tokens: Tensor) -> None:
    hooks = TransformerHooks()
    splice(hooks, autoencoder(name))
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens), atol=2e-4, rtol=1e-4)
    short = strong_model(tiny_config()).to(torch.bfloat16)
    assert torch.equal(short(tokens, hooks=hooks), short(tokens)), "bit-equal where the site is bfloat16"


@pytest.mark.parametrize("name", CONFIGS)
def test_an_edit_moves_the_stream_by_the_change_times_the_decoder_row(
    name: str, model: Transformer, tokens: Tensor
) -> None:
    hooks, sae = TransformerHooks(), autoencoder(name)
    spliced = splice(hooks, sae)
    spliced.latents.append_fwd(AtPositions(3).append(AtUnits(7).append(lambda z: z + 2.5)))
    moved = model(tokens, hooks=hooks, stop_at_layer=2) - (plain := model(tokens, stop_at_layer=2))
    _, state = sae.encode_with_state(plain)
    scale = state.scale[:, 3] if sae.config.needs_state else 1.0
    torch.testing.assert_close(moved[:, 3], (2.5 * scale * sae.W_dec[7]).expand(2, D), atol=1e-4, rtol=1e-3)
    assert moved[:, :3].abs().max() < 1e-4 and moved[:, 4:].abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_with_the_error_dropped_the_site_holds_the_reconstruction(
    name: str, model: Transformer, tokens: Tensor
) -> None:
    hooks, sae = TransformerHooks(), autoencoder(name)
    spliced = splice(hooks, sae, error="drop")
    plain = model(tokens, stop_at_layer=2)
    torch.testing.assert_close(model(tokens, hooks=hooks, stop_at_layer=2), sae(plain))
    recording = spliced.record("latents")
    torch.testing.assert_close(model(tokens, hooks=hooks, stop_at_layer=2), sae(plain))
    assert torch.equal(recording["latents", 1], sae.encode(plain))


def test_a_frozen_error_is_the_reference_runs_own(model: Transformer, tokens: Tensor) -> None:
    sae, other = autoencoder(), tokens.flip(1)
    reference = reference_errors(model, tokens, sae)
    hooks = TransformerHooks()
    spliced = splice(hooks, sae, error="freeze", reference=reference)
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens), atol=2e-4, rtol=1e-4)
    plain, other_plain = (model(each, stop_at_layer=2) for each in (tokens, other))
    torch.testing.assert_close(
        model(other, hooks=hooks, stop_at_layer=2),
        sae(other_plain) + plain - sae(plain),
        atol=1e-4,
        rtol=1e-4,
    )
    # the same text behind padding
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    pad = torch.zeros(2, 13, dtype=torch.bool)
    pad[:, :3] = True
    torch.testing.assert_close(
        model(padded, hooks=hooks, pad=pad)[:, 3:], model(tokens), atol=2e-4, rtol=1e-4
    )
    spliced.latents.append_fwd(torch.zeros_like)
    cut = model(other, hooks=hooks, stop_at_layer=2)
    torch.testing.assert_close(cut, (sae.b_dec + plain - sae(plain)).expand_as(cut), atol=1e-4, rtol=1e-4)
    with pytest.raises(RequestError, match="reaches position 11"):
        model(torch.zeros(2, 12, dtype=torch.long), hooks=hooks)
    with pytest.raises(RequestError, match="reference=reference_errors"):
        splice(TransformerHooks(), sae, error="freeze")


def test_gradients_of_latents_and_error_are_the_models_own(tokens: Tensor) -> None:
    model = strong_model(tiny_config()).double()
    for name in ("topk", "relu"):
        hooks, sae = TransformerHooks(), autoencoder(name, torch.float64)
        sae.b_enc.requires_grad_(True)
        spliced = splice(hooks, sae)
        recording = spliced.record(["latents", "error"], detach=False)
        logit = model(tokens, hooks=hooks)[0, 5:, 3].sum()
        by_latent, by_error = torch.autograd.grad(logit, [recording["latents", 1], recording["error", 1]])
        active = int(recording["latents", 1][0, 5].argmax())
        for gradient, hooked, unit in ((by_latent, spliced.latents, active), (by_error, spliced.error, 4)):
            values = []
            for step in (1e-2, -1e-2):  # norms are computed in float32, so not smaller
                moved = AtPositions(5).append(AtUnits(unit).append(lambda z, step=step: z + step))
                handle = hooked.fwd.append(moved, handle=True)
                values.append(model(tokens, hooks=hooks)[0, 5:, 3].sum().item())
                handle.remove()
            assert gradient[0, 5, unit].abs() > 0.01
            slope = (values[0] - values[1]) / 2e-2
            assert slope == pytest.approx(gradient[0, 5, unit].item(), rel=2e-2, abs=2e-4)


def test_a_transcoder_reads_one_site_and_writes_another(model: Transformer, tokens: Tensor) -> None:
    inside, outside = (
        Site(path="resid.torso.post_ln_mlp", layer=1),
        Site(path="resid.torso.delta_mlp", layer=1),
    )
    sae = autoencoder(site_in=inside, site_out=outside, has_skip=True)
    hooks = TransformerHooks()
    store = hooks.record([inside.path, outside.path], layers=1)
    spliced = splice(hooks, sae, error="drop")
    model(tokens, hooks=hooks)
    torch.testing.assert_close(
        hooks.resid.torso.delta_mlp.fwd(store[outside.path, 1], layer=0), store[outside.path, 1]
    )
    torch.testing.assert_close(store[outside.path, 1], sae(store[inside.path, 1]))
    kept = TransformerHooks()
    edited = splice(kept, sae)
    torch.testing.assert_close(model(tokens, hooks=kept), model(tokens), atol=2e-4, rtol=1e-4)
    edited.latents.append_fwd(AtUnits(7).append(lambda z: z + 1))
    moved = model(tokens, hooks=kept, stop_at_layer=2) - model(tokens, stop_at_layer=2)
    torch.testing.assert_close(moved, sae.W_dec[7].expand_as(moved), atol=1e-4, rtol=1e-3)
    backwards = TransformerHooks()
    splice(backwards, autoencoder(site_in=outside, site_out=inside))
    with pytest.raises(RequestError, match="must read an earlier site"):
        model(tokens, hooks=backwards)
    hooks.remove(spliced.handles)
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens))


def test_a_transcoder_across_layers(model: Transformer, tokens: Tensor) -> None:
    sae = autoencoder(site_in=Site(path=STREAM, layer=0), site_out=Site(path=STREAM, layer=2))
    hooks = TransformerHooks()
    splice(hooks, sae, error="drop")
    torch.testing.assert_close(
        model(tokens, hooks=hooks, stop_at_layer=3), sae(model(tokens, stop_at_layer=1))
    )


def test_many_splices_in_one_site_and_one_at_many_layers(model: Transformer, tokens: Tensor) -> None:
    hooks = TransformerHooks()
    first = splice(hooks, autoencoder("relu"), layers=[0, 2])
    second = splice(hooks, autoencoder("topk", seed=1), layers=2)
    third = splice(hooks, autoencoder("jumprelu", seed=2), site="resid.torso.delta_attn", layers=0)
    recordings = [each.record(["latents", "error"]) for each in (first, second, third)]
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens), atol=5e-4, rtol=1e-4)
    assert [sorted(r) for r in recordings] == [
        [("error", 0), ("error", 2), ("latents", 0), ("latents", 2)],
        [("error", 2), ("latents", 2)],
        [("error", 0), ("latents", 0)],
    ]
    merged = hooks | TransformerHooks()
    torch.testing.assert_close(model(tokens, hooks=merged), model(tokens), atol=5e-4, rtol=1e-4)


def test_heads_flat_and_one_head(model: Transformer, tokens: Tensor) -> None:
    def result(sae: Autoencoder) -> tuple[Tensor, Tensor]:
        hooks = TransformerHooks()
        before = hooks.record("attn.v_out.fwd", layers=1, dtype=torch.float64)  # a copy
        splice(hooks, sae, error="drop")
        after = hooks.record("attn.v_out", layers=1)
        model(tokens, hooks=hooks)
        return before["attn.v_out.fwd", 1].float(), after["attn.v_out", 1]

    flat = autoencoder(flatten_heads=True, site_in=Site(path="attn.v_out", layer=1))
    before, after = result(flat)
    torch.testing.assert_close(after, flat(before))
    one = autoencoder(d_in=6, site_in=Site(path="attn.v_out", layer=1, head=2))
    before, after = result(one)
    torch.testing.assert_close(after[:, :, 2], one(before[:, :, 2]))
    assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])


def test_generation_with_and_without_a_cache_and_padding(model: Transformer) -> None:
    hooks = TransformerHooks()
    spliced = splice(hooks, autoencoder("topk layer_norm"), error="drop")
    spliced.latents.append_fwd(AtPositions(slice(4, None)).append(AtUnits(3).append(lambda z: z + 4)))
    tokens = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))
    whole = model(tokens, hooks=hooks)
    cache = KVCache(model.config, 2)
    parts = [model(tokens[:, a:b], hooks=hooks, kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
    options = {"max_new_tokens": 4, "temperature": 0.0, "hooks": hooks}
    together = model.sample(prompts, **options)
    alone = [model.sample([each], **options)[0] for each in prompts]
    assert [g.ids for g in together] == [g.ids for g in alone]


def test_dtypes_are_cast_at_the_splice_only(model: Transformer, tokens: Tensor) -> None:
    hooks, seen = TransformerHooks(), []
    spliced = splice(hooks, autoencoder(dtype=torch.bfloat16), error="drop")
    spliced.latents.append_fwd(lambda z: seen.append(z.dtype))
    assert model(tokens, hooks=hooks, stop_at_layer=2).dtype == torch.float32 and seen == [torch.bfloat16]


def test_unhooked_latents_stay_sparse(
    model: Transformer, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from neuron_lens.autoencoders.sparse import SparseLatents

    hooks, sae, dense = TransformerHooks(), autoencoder(), []
    spliced = splice(hooks, sae)
    to_dense = SparseLatents.to_dense
    monkeypatch.setattr(SparseLatents, "to_dense", lambda self, n: dense.append(n) or to_dense(self, n))
    model(tokens, hooks=hooks)
    assert dense == []
    spliced.latents.append_fwd(lambda z: None)
    model(tokens, hooks=hooks)
    assert dense == [N]


@pytest.mark.parametrize("name", ["topk", "topk layer_norm", "relu"])
def test_declared_edits_of_latents_stand_beside_a_splice(
    name: str, model: Transformer, tokens: Tensor
) -> None:
    sae = autoencoder(name)
    edit = EditLatents(
        site=STREAM, layers=1, positions=3, autoencoder="sae", latents=7, operation="add", value=2.0
    )
    declared = to_hooks(edit, model, autoencoders={"sae": sae})
    spliced_hooks = TransformerHooks()
    spliced = splice(spliced_hooks, sae)
    recording = spliced.record("latents")
    by_hand = TransformerHooks()
    splice(by_hand, sae).latents.append_fwd(AtPositions(3).append(AtUnits(7).append(lambda z: z + 2.0)))
    expected = model(tokens, hooks=by_hand)
    assert not torch.allclose(expected, model(tokens), atol=1e-3)
    torch.testing.assert_close(model(tokens, hooks=declared), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(model(tokens, hooks=spliced_hooks | declared), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(recording["latents", 1], sae.encode(model(tokens, stop_at_layer=2)))
    through = to_hooks(edit, model, autoencoders={"sae": spliced})  # a splice serves as an autoencoder too
    torch.testing.assert_close(model(tokens, hooks=through), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "resid.torso.pots_mlp"}, "did you mean 'resid.torso.post_mlp'"),
        ({"site": ("a", "b", "c")}, "the pair that is read and written"),
        ({"layers": []}, "layers is empty"),
        ({"site": "logits", "layers": 1}, "belongs to no layer"),
        ({"error": "kept"}, "expected one of 'keep', 'drop', 'freeze'"),
        ({"reference": {}}, 'reference is for error="freeze"'),
    ],
)
def test_bad_requests_are_refused_when_the_splice_is_made(options: dict, message: str) -> None:
    with pytest.raises(NeuronLensError, match=message):
        splice(TransformerHooks(), autoencoder(), **options)


def test_bad_fits_are_refused_by_name(model: Transformer, tokens: Tensor) -> None:
    with pytest.raises(RequestError, match="does not say which site"):
        splice(TransformerHooks(), autoencoder(site_in=None))
    with pytest.raises(RequestError, match="say which layer"):
        splice(TransformerHooks(), autoencoder(site_in=None), site=STREAM)
    wide, deep, absent = TransformerHooks(), TransformerHooks(), TransformerHooks()
    splice(wide, autoencoder(), site="mlp.post_act")
    with pytest.raises(RequestError, match=r"do not fit this autoencoder.*= 24"):
        model(tokens, hooks=wide)
    splice(deep, autoencoder(), layers=9)
    with pytest.raises(HookError, match=r"layers \[9\] do not exist"):
        model(tokens, hooks=deep)
    splice(absent, autoencoder(), site="mlp.pre_linear")
    with pytest.raises(HookError, match="never fires"):
        model(tokens, hooks=absent)
    beyond = TransformerHooks()
    splice(beyond, autoencoder()).latents.append_fwd(AtUnits(N).append(torch.zeros_like))
    with pytest.raises(HookError, match=f"{N}"):
        model(tokens, hooks=beyond)
    with pytest.raises(HookError, match="decodes to"):
        narrow = TransformerHooks()
        splice(narrow, autoencoder(d_out=12))
        model(tokens, hooks=narrow)


# inductor's first compilation imports modules that torch itself marks as deprecated
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["topk", "jumprelu", "topk layer_norm"])
@pytest.mark.parametrize(("error", "edited"), [("keep", False), ("keep", True), ("drop", False)])
def test_a_spliced_model_compiles_whole(name: str, error: str, edited: bool, tokens: Tensor) -> None:
    model, hooks = strong_model(tiny_config()).requires_grad_(False), TransformerHooks()
    spliced = splice(hooks, autoencoder(name), error=error)
    if edited:
        spliced.latents.append_fwd(AtPositions(3).append(AtUnits(7).append(lambda z: z + 2.5)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    eager = model(tokens, hooks=hooks)
    torch.testing.assert_close(compiled(tokens, hooks=hooks), eager, atol=1e-4, rtol=1e-4)
    assert torch.allclose(eager, model(tokens), atol=1e-3) == (error == "keep" and not edited)
