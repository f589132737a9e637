"""The laws of a cross-layer transcoder in a model: errors kept change nothing, edits reach every later layer."""

from __future__ import annotations

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.autoencoders import (
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    Site,
    splice,
    splice_cross_layer,
)
from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import AtLayers, AtPositions, AtUnits, TransformerHooks
from neuron_lens.transformer import KVCache, Transformer

from .test_splice import autoencoder

IN, OUT = "resid.torso.post_ln_mlp", "resid.torso.delta_mlp"
D, S, L = 24, 40, 3
KINDS = {
    "relu": {"activation": "relu"},
    "topk": {"activation": "topk", "k": 5},
    "jumprelu": {"activation": "jumprelu"},
    "skip": {"activation": "relu", "has_skip": True},
}


def transcoder(
    kind: str = "relu", dtype: torch.dtype = torch.float32, **changes: object
) -> CrossLayerTranscoder:
    fields = {
        "n_layers": L, "d_in": D, "d_latent": S, "d_out": D, "site_in": Site(path=IN), "site_out": Site(path=OUT),
        **KINDS[kind], **changes,
    }  # fmt: skip
    made = CrossLayerTranscoder(CrossLayerTranscoderConfig(**fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_unedited_with_the_errors_kept_changes_nothing(kind: str, model: Transformer, tokens: Tensor) -> None:
    hooks = TransformerHooks()
    spliced = splice_cross_layer(hooks, transcoder(kind))
    recording = spliced.record(["latents", "error"])
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens), atol=2e-4, rtol=1e-4)
    assert sorted(recording) == [(name, layer) for name in ("error", "latents") for layer in range(L)]
    assert min(recording["latents", layer].abs().max() for layer in range(L)) > 0.1
    short = strong_model(tiny_config()).to(torch.bfloat16)
    assert torch.equal(short(tokens, hooks=hooks), short(tokens)), "bit-equal where the site is bfloat16"
    hooks.remove(spliced.handles)
    assert torch.equal(model(tokens, hooks=hooks), model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_errors_dropped_every_layer_writes_the_prediction(
    kind: str, model: Transformer, tokens: Tensor
) -> None:
    hooks, clt = TransformerHooks(), transcoder(kind)
    store = hooks.record([IN], layers=range(L))
    splice_cross_layer(hooks, clt, error="drop")
    written = hooks.record([OUT], layers=range(L))
    model(tokens, hooks=hooks)
    inputs = torch.stack([store[IN, layer] for layer in range(L)])
    outputs = torch.stack([written[OUT, layer] for layer in range(L)])
    torch.testing.assert_close(outputs, clt(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("source", range(L))
@pytest.mark.parametrize("error", ["keep", "drop"])
def test_an_edit_moves_each_layers_output_by_the_change_times_its_decoder_row(
    source: int, error: str, model: Transformer, tokens: Tensor
) -> None:
    hooks, clt = TransformerHooks(), transcoder("skip")
    read = hooks.record([IN], layers=range(L))
    computed = hooks.record([f"{OUT}.fwd"], layers=range(L))
    spliced = splice_cross_layer(hooks, clt, error=error)
    written = hooks.record([OUT], layers=range(L))
    spliced.latents.append_fwd(
        AtLayers(source).append(AtPositions(3).append(AtUnits(7).append(lambda z: z + 2.5)))
    )
    assert not torch.allclose(model(tokens, hooks=hooks), model(tokens), atol=1e-2)
    rows = clt.decoder_rows(source, 7)
    predicted = clt(torch.stack([read[IN, layer] for layer in range(L)]))  # of this pass's inputs, unedited
    for layer in range(L):
        # with the error, what the MLP itself computed from this pass's stream; without, the prediction from it
        unedited = computed[f"{OUT}.fwd", layer] if error == "keep" else predicted[layer]
        moved = written[OUT, layer] - unedited
        expected = torch.zeros_like(moved)
        if layer >= source:
            expected[:, 3] = 2.5 * rows[layer - source]
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-3)


def test_gradients_of_latents_equal_finite_differences(tokens: Tensor) -> None:
    model, clt = strong_model(tiny_config()).double(), transcoder("relu", torch.float64)
    hooks = TransformerHooks()
    spliced = splice_cross_layer(hooks, clt.requires_grad_(True))
    recording = spliced.record("latents", detach=False)
    logit = model(tokens, hooks=hooks)[0, 5:, 3].sum()
    gradient = torch.autograd.grad(logit, recording["latents", 0])[0]
    unit = int(recording["latents", 0][0, 5].argmax())
    values = []
    for step in (1e-2, -1e-2):
        moved = AtLayers(0).append(AtPositions(5).append(AtUnits(unit).append(lambda z, step=step: z + step)))
        handle = spliced.latents.fwd.append(moved, handle=True)
        values.append(model(tokens, hooks=hooks)[0, 5:, 3].sum().item())
        handle.remove()
    assert gradient[0, 5, unit].abs() > 0.01
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(gradient[0, 5, unit].item(), rel=2e-2, abs=2e-4)


def test_in_parts_with_a_cache_and_beside_another_splice(model: Transformer, tokens: Tensor) -> None:
    hooks = TransformerHooks()
    spliced = splice_cross_layer(hooks, transcoder(), error="drop")
    spliced.latents.append_fwd(AtPositions(slice(4, None)).append(AtUnits(3).append(lambda z: z + 4)))
    splice(hooks, autoencoder())
    whole = model(tokens, hooks=hooks)
    cache = KVCache(model.config, 2)
    parts = [model(tokens[:, a:b], hooks=hooks, kv_cache=cache) for a, b in ((0, 5), (5, 6), (6, 10))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
    for row in range(2):
        torch.testing.assert_close(model(tokens[row : row + 1], hooks=hooks), whole[row : row + 1])


def test_frozen_errors_are_the_reference_runs(model: Transformer, tokens: Tensor) -> None:
    hooks, clt = TransformerHooks(), transcoder()
    recording = splice_cross_layer(hooks, clt).record("error")
    model(tokens, hooks=hooks)
    frozen = TransformerHooks()
    reference = {layer: recording["error", layer] for layer in range(L)}
    splice_cross_layer(frozen, clt, error="freeze", reference=reference)
    torch.testing.assert_close(model(tokens, hooks=frozen), model(tokens), atol=2e-4, rtol=1e-4)
    assert not torch.allclose(model(tokens.flip(1), hooks=frozen), model(tokens.flip(1)), atol=1e-2)


def test_bad_requests(model: Transformer, tokens: Tensor) -> None:
    with pytest.raises(RequestError, match="does not say which sites"):
        splice_cross_layer(TransformerHooks(), transcoder(site_in=None, site_out=None))
    with pytest.raises(RequestError, match=r"did you mean 'resid.torso.delta_mlp'"):
        splice_cross_layer(TransformerHooks(), transcoder(), site=(IN, "resid.torso.delta_mpl"))
    with pytest.raises(RequestError, match="the pair that is read and written"):
        splice_cross_layer(TransformerHooks(), transcoder(), site=IN)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="belongs to no layer"):
        splice_cross_layer(TransformerHooks(), transcoder(), site=(IN, "logits"))
    with pytest.raises(RequestError, match="expected one of"):
        splice_cross_layer(TransformerHooks(), transcoder(), error="kept")  # type: ignore[arg-type]
    backwards = TransformerHooks()
    splice_cross_layer(backwards, transcoder(), site=(OUT, IN))
    with pytest.raises(RequestError, match="must come before"):
        model(tokens, hooks=backwards)
    shallow = TransformerHooks()
    splice_cross_layer(shallow, transcoder(n_layers=2))
    with pytest.raises(RequestError, match="has 2 layers, the model 3"):
        model(tokens, hooks=shallow)
    late = TransformerHooks()
    splice_cross_layer(late, transcoder())
    with pytest.raises(RequestError, match=r"layers \[0\].*must start at layer 0"):
        model(torch.zeros(1, 4, D), hooks=late, start_at_layer=1)
    narrow = TransformerHooks()
    splice_cross_layer(narrow, transcoder(d_out=12))
    with pytest.raises(HookError, match="decodes to"):
        model(tokens, hooks=narrow)
