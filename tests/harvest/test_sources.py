"""What is caught is what the model holds, of every kind of unit; and replacing a unit does only that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from explain import planted

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.errors import RequestError
from neuron_lens.explain.pipeline import Pipeline
from neuron_lens.harvest.corpus import WindowShape
from neuron_lens.harvest.run import HarvestSettings, harvest, model_inputs
from neuron_lens.harvest.sources import (
    Direction,
    DirectionSource,
    HeadSource,
    LatentSource,
    NeuronSource,
    UnitSource,
)
from neuron_lens.harvest.sources.base import dense_latents, logits_written
from neuron_lens.harvest.sources.embeddings import embeddings_read
from neuron_lens.hooks import TransformerHooks
from neuron_lens.records import Unit
from neuron_lens.transformer import Transformer, TransformerConfig

SETTINGS = HarvestSettings(
    shape=WindowShape(length=16, row_length=64, context=16),
    random=(24, 8, 8), top=(4, 3, 3), fired=(4, 2, 2), near=(3, 2, 2), neighbours=2, batch_rows=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Two layers, grouped heads, random weights of some size."""
    tokenizer = planted.tokenizer()
    config = TransformerConfig(
        name="small", n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_mlp=24, d_vocab=tokenizer.vocab_size,
        n_ctx=64, activation="gelu_tanh",
    )  # fmt: skip
    small = Transformer(config, seed=0, tokenizer=tokenizer).eval()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return small


def _autoencoder(activation: str, site: Site | None = None, d_in: int = 16, **more: object) -> Autoencoder:
    site = Site(path="resid.torso.post_mlp", layer=1) if site is None else site
    config = AutoencoderConfig(d_in=d_in, d_latent=40, activation=activation, site_in=site, **more)
    return Autoencoder(config, generator=torch.Generator().manual_seed(1))


def _sources(model: Transformer) -> dict[str, UnitSource]:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2))
    return {
        "neuron": NeuronSource(model, 1),
        "head": HeadSource(model, 1),
        "topk": LatentSource(model, _autoencoder("topk", k=5), [3, 8]),
        "relu": LatentSource(model, _autoencoder("relu"), [3, 8]),
        "all latents": LatentSource(model, _autoencoder("topk", k=5)),
        "direction": DirectionSource(model, Direction("up", vector, "resid.torso.post_attn", 1)),
    }


KINDS = ["neuron", "head", "topk", "relu", "all latents", "direction"]


def _held(model: Transformer, tokens: torch.Tensor, *sites: str) -> list[torch.Tensor]:
    """What sites of layer 1 hold, by recording."""
    hooks = TransformerHooks()
    recordings = [hooks.record(site) for site in sites]
    with torch.no_grad():
        model(tokens, hooks=hooks)
    return [recording[site, 1] for recording, site in zip(recordings, sites, strict=True)]


def _expected(model: Transformer, kind: str, source: UnitSource, tokens: torch.Tensor) -> torch.Tensor:
    """Every kept unit's activation at every token, [batch, pos, unit], in the plainest way."""
    if kind == "neuron":
        return _held(model, tokens, "mlp.post_act")[0]
    if kind == "head":
        return _held(model, tokens, "attn.result")[0].norm(dim=-1)
    if isinstance(source, LatentSource):
        return source.autoencoder.encode(_held(model, tokens, source.site)[0])[..., list(source.indices)]
    assert isinstance(source, DirectionSource)
    return _held(model, tokens, source.site)[0] @ source.vectors.T


@pytest.mark.parametrize("kind", KINDS)
def test_a_harvest_holds_what_the_model_holds(model: Transformer, tmp_path: Path, kind: str) -> None:
    source = _sources(model)[kind]
    done = harvest(model, planted.corpus(6, 200), [source], tmp_path, SETTINGS, progress=False)[source.name]
    windows = done.windows
    inputs = [
        windows.columns["token"][row, : windows.context + windows.length] for row in range(len(windows))
    ]
    tokens, _, _ = model_inputs(model, [ids[ids >= 0] for ids in inputs])
    with torch.no_grad():
        expected = _expected(model, kind, source, tokens).numpy()
    for index in (source.indices[0], source.indices[-1]):
        column = source.column(index)
        kept = done.unit(index)
        for rows, activations in (
            (kept.random_rows, kept.random), (kept.top_rows, kept.top), (kept.fired_rows, kept.fired)
        ):  # fmt: skip
            for row, held in zip(rows, activations, strict=True):
                begin, present = int(windows.context_position[row]), int(windows.present[row].sum())
                own = expected[row, begin : begin + present, column]
                assert np.allclose(held[:present], own, atol=2e-3, rtol=2e-3)
        assert kept.histogram.sum() == done.facts["n_tokens"]


def test_the_source_of_a_head_is_the_token_that_contributes_most(model: Transformer, tmp_path: Path) -> None:
    source = HeadSource(model, 1)
    done = harvest(model, planted.corpus(6, 200), [source], tmp_path, SETTINGS, progress=False)[source.name]
    kept, windows = done.unit(2), done.windows
    assert kept.partners is not None
    weight = model.blocks[1].attn.out.weight.detach().unflatten(1, (4, 4))[:, 2]  # type: ignore[union-attr]
    for slot in (0, 5):
        row = int(kept.random_rows[slot])
        ids = windows.columns["token"][row, : windows.context + windows.length]
        tokens, _, _ = model_inputs(model, [ids[ids >= 0]])
        probs, values = _held(model, tokens, "attn.qk_probs", "attn.v")
        written = (
            probs[0, 2][:, :, None] * (values[0, :, 1] @ weight.T)[None]
        )  # head 2 reads key-value head 1
        begin = int(windows.context_position[row])
        place = torch.arange(begin, begin + int(windows.present[row].sum()))
        back = place - written.norm(dim=-1).argmax(-1)[place]
        assert kept.partners[slot][: len(place)].tolist() == back.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_sets_the_unit_there_and_only_there(model: Transformer, kind: str) -> None:
    source = _sources(model)[kind]
    tokens = torch.arange(24).reshape(2, 12) + 100
    where = torch.zeros(2, 12, dtype=torch.bool)
    where[0, 5] = where[1, 9] = True
    index = source.indices[1]
    value = 0.0 if kind == "head" else 0.7
    hooks = source.replacing(index, value, where)
    source.attach(hooks)  # behind the edit: what is caught is what the model goes on with
    before = TransformerHooks()
    source.attach(before)
    with torch.no_grad():
        model(tokens, hooks=before)
        intact = source.take(lambda x: x).columns(0, len(source.indices))
        plain = model(tokens)
        edited = model(tokens, hooks=hooks)
        after = source.take(lambda x: x).columns(0, len(source.indices))
    if source.kind != "latent":  # an autoencoder does not read back exactly what its decoder wrote
        torch.testing.assert_close(
            after[where][:, source.column(index)], torch.full((2,), value), atol=1e-4, rtol=0
        )
    torch.testing.assert_close(after[~where], intact[~where], atol=1e-4, rtol=1e-4)
    change = (edited - plain).abs().amax(-1)
    assert (change[0, :5] < 1e-5).all() and change[0, 5] > 1e-4


def test_a_latent_is_edited_by_its_decoder_row(model: Transformer) -> None:
    autoencoder = _autoencoder("relu")
    source = LatentSource(model, autoencoder, [3])
    tokens = torch.arange(12)[None] + 100
    where = torch.ones(1, 12, dtype=torch.bool)
    hooks = source.replacing(3, 0.5, where)
    recording = hooks.record("resid.torso.post_mlp")
    intact = _held(model, tokens, "resid.torso.post_mlp")[0]
    with torch.no_grad():
        model(tokens, hooks=hooks)
        change = 0.5 - autoencoder.encode(intact)[..., 3:4]
        expected = intact + change * autoencoder.W_dec[3]
    torch.testing.assert_close(recording["resid.torso.post_mlp", 1], expected, atol=1e-4, rtol=1e-4)


def test_written_directions_are_what_units_add_to_the_stream(model: Transformer) -> None:
    sources = _sources(model)
    assert sources["head"].written() is None
    mlp = model.blocks[1].mlp
    assert torch.equal(sources["neuron"].written(), mlp.down.weight.T)  # type: ignore[union-attr, arg-type]
    inner = LatentSource(model, _autoencoder("relu", Site(path="mlp.post_act", layer=1), d_in=24), [0])
    expected = inner.autoencoder.W_dec[list(inner.indices)] @ mlp.down.weight.T  # type: ignore[union-attr]
    torch.testing.assert_close(inner.written(), expected)
    hidden = LatentSource(model, _autoencoder("relu", Site(path="resid.torso.post_ln_mlp", layer=1)), [0])
    assert hidden.written() is None
    written = sources["topk"].written()
    assert written is not None and torch.equal(
        written[0], sources["topk"].autoencoder.W_dec[sources["topk"].indices[0]]
    )  # type: ignore[attr-defined]
    logits = logits_written(model, written)
    assert logits.shape == (len(written), model.config.d_vocab)
    torch.testing.assert_close(logits.mean(-1), torch.zeros(len(written)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mlp", ["plain", "gated"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_read_tokens_are_those_that_drive_the_unit(norm: str, mlp: str) -> None:
    """In the first block, without attention, a pre-activation is the weights' figure over the embedding's size."""
    config = TransformerConfig(
        name="reader", n_layers=1, d_model=16, n_heads=2, d_mlp=24, d_vocab=40, n_ctx=8, norm=norm, mlp=mlp,
        position="none", activation="silu",
    )  # fmt: skip
    reader = Transformer(config, seed=0).eval()
    hooks = TransformerHooks()
    recording = hooks.record("mlp.pre_act")
    with torch.no_grad():
        for name, parameter in reader.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
            if "attn.out" in name:
                parameter.zero_()
            if name.endswith(("ln_mlp.bias", "up.bias", "gate.bias")):
                parameter.zero_()
        reader(torch.arange(40)[:, None], hooks=hooks)
        held = reader.embed.weight
        size = (held - held.mean(-1, keepdim=True) if norm == "layer" else held).square().mean(-1).sqrt()
    source = NeuronSource(reader, 0)
    read = source.read()
    assert read is not None and read.shape == (24, 16)
    expected = (recording["mlp.pre_act", 0][:, 0] * size[:, None]).T
    expected = expected - expected.mean(-1, keepdim=True)
    torch.testing.assert_close(embeddings_read(reader, read), expected, atol=1e-3, rtol=1e-3)


def test_a_latent_reads_its_encoder_column_where_the_site_holds_the_stream(model: Transformer) -> None:
    sources = _sources(model)
    assert sources["head"].read() is None
    topk = sources["topk"]
    assert isinstance(topk, LatentSource)
    assert torch.equal(topk.read(), topk.autoencoder.W_enc[:, list(topk.indices)].T)  # type: ignore[arg-type]
    hidden = LatentSource(model, _autoencoder("relu", Site(path="resid.torso.post_ln_mlp", layer=1)), [0])
    read, weight = hidden.read(), model.blocks[1].ln_mlp.weight  # type: ignore[union-attr]
    assert read is not None
    expected = hidden.autoencoder.W_enc[:, list(hidden.indices)].T * weight  # type: ignore[operator]
    torch.testing.assert_close(read, expected - expected.mean(-1, keepdim=True))
    assert (
        LatentSource(model, _autoencoder("relu", Site(path="mlp.post_act", layer=1), d_in=24), [0]).read()
        is None
    )


def test_a_range_of_sparse_latents_is_that_range_of_the_dense_ones() -> None:
    autoencoder = _autoencoder("topk", k=5)
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(3))
    sparse, _ = autoencoder.encode_sparse(x)
    dense = autoencoder.encode(x)
    for first, last in ((0, 40), (7, 19), (39, 40)):
        assert torch.equal(dense_latents(sparse.values, sparse.indices, first, last), dense[..., first:last])


def test_company_is_kept_beside_the_latents_asked_for(model: Transformer) -> None:
    autoencoder = _autoencoder("topk", k=5)
    source = LatentSource(model, autoencoder, [3])
    rows = torch.nn.functional.normalize(autoencoder.W_dec.detach(), dim=-1)
    nearest = (rows @ rows[3]).argsort(descending=True)[1:5].tolist()
    assert set(source.indices) == {3, 2, *nearest}
    assert source.name != LatentSource(model, autoencoder, [9]).name
    with pytest.raises(RequestError, match="was not harvested"):
        source.column(next(index for index in range(40) if index not in source.indices))


@pytest.mark.parametrize(
    ("build", "complaint"),
    [
        (lambda model: NeuronSource(model, 2), "layer 2 does not exist"),
        (lambda model: HeadSource(model, -1), "layer -1 does not exist"),
        (lambda model: LatentSource(model, _autoencoder("relu"), [40]), "latent 40 does not exist"),
        (lambda model: LatentSource(model, _autoencoder("relu"), []), "no latent was asked for"),
        (lambda model: LatentSource(model, _autoencoder("relu", d_in=12), [0]), "12 wide"),
        (lambda model: LatentSource(model, _autoencoder("relu", Site(path="resid.post_emb")), [0]), "does not say"),
        (lambda model: LatentSource(model, _autoencoder("relu"), [0], layer=0), "reads layer 1, not layer 0"),
        (lambda model: Direction("d", torch.zeros(16), "resid.torso.post_mlp", 0), "other than zero"),
        (lambda model: Direction("d", torch.ones(2, 2), "resid.torso.post_mlp", 0), "must be a finite vector"),
        (lambda model: DirectionSource(model, Direction("d", torch.ones(9), "mlp.post_act", 0)), "9 wide"),
        (lambda model: DirectionSource(model, Direction("d", torch.ones(16), "resid.post_mlp", 0)), "no site is"),
        (lambda model: DirectionSource(model, Direction("d", torch.ones(16), "resid.post_emb", 0)), "no layer"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_by_name(
    model: Transformer, build: Callable[[Transformer], object], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        build(model)


def test_the_pipeline_explains_every_kind(model: Transformer, tmp_path: Path) -> None:
    autoencoder = _autoencoder("topk", k=5)
    direction = Direction(
        "up", torch.randn(16, generator=torch.Generator().manual_seed(2)), "resid.torso.post_mlp", 0
    )
    pipeline = Pipeline(
        model, planted.corpus(6, 200), tmp_path, settings=SETTINGS, progress=False,
        autoencoders=[autoencoder], directions=[direction],
    )  # fmt: skip
    units = [
        *pipeline.neurons(1, [5]), *pipeline.heads(1, [2]), *pipeline.latents([3, 8]), *pipeline.directed()
    ]  # fmt: skip
    run = pipeline.run(units)
    assert {summary.unit for summary in run.units} == set(units)
    results = {result.unit.kind: result for result in pipeline.results()}
    for result in results.values():
        assert result.explanation.sentence and result.causal is not None
        page = (tmp_path / result.summary().path / "index.html").read_text()
        assert f"{result.unit.kind.capitalize()} {result.unit.index} of layer" in page
    assert results["head"].promoted == () and results["latent"].promoted
    assert results["head"].causal is not None and results["head"].causal.replaced_by == "zero"
    window = results["head"].train_top[0]
    assert window.sources is not None and len(window.sources) == len(window.tokens)
    assert results["neuron"].train_top[0].sources is None
    assert pipeline.run(units) == run


@pytest.mark.parametrize(
    ("unit", "complaint"),
    [
        (
            Unit(kind="latent", layer=1, index=0, site="resid.torso.post_mlp", dictionary="sae-0"),
            "no autoencoder",
        ),
        (Unit(kind="direction", layer=1, index=0, site="resid.torso.post_mlp"), "no direction"),
        (Unit(kind="head", layer=0, index=0), "heads are explained at attn.v_out"),
        (Unit(kind="head", layer=0, index=4, site="attn.v_out"), "head 4 does not exist"),
    ],
)
def test_units_of_what_was_not_given_are_refused(
    model: Transformer, tmp_path: Path, unit: Unit, complaint: str
) -> None:
    pipeline = Pipeline(model, planted.corpus(6, 200), tmp_path / "out", settings=SETTINGS, progress=False)
    with pytest.raises(RequestError, match=complaint):
        pipeline.run([unit])
    with pytest.raises(RequestError, match="say which autoencoder"):
        pipeline.latents([0])
    assert not (tmp_path / "out").exists()
