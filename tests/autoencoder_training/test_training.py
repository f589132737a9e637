"""Training: the stream loses nothing, an interruption changes nothing, and planted directions are found."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from autoencoder_training.small import ACTIVATIONS, STREAM, byte_model, planted_directions, settings, text
from neuron_lens.autoencoder_training import (
    ActivationStream,
    Trainer,
    TrainingSettings,
    train_autoencoder,
)
from neuron_lens.autoencoder_training.objectives import Pass, auxiliary_loss, build_objective
from neuron_lens.autoencoder_training.objectives.jumprelu import step_function
from neuron_lens.autoencoder_training.stream import rows_of_split
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, load_autoencoder
from neuron_lens.autoencoders.activations import keep_batch_topk
from neuron_lens.errors import CheckpointError, ConfigError, HookError, RequestError
from neuron_lens.harvest.dense import StoredActivations, store_activations

MODEL = byte_model()
CORPUS = text()


def stream(**changes: object) -> ActivationStream:
    return ActivationStream(
        MODEL, CORPUS, STREAM, 1, **{"batch_tokens": 64, "buffer_tokens": 150, "seed": 0, **changes}
    )


def test_a_stream_taken_up_anywhere_gives_what_it_would_have_given() -> None:
    whole = list(itertools.islice(stream().batches(), 30))  # more than an epoch
    for start in (0, 1, 5, 17, 29):
        for a, b in zip(stream().batches(start), whole[start:], strict=False):
            assert torch.equal(a, b)
    assert not torch.equal(next(iter(stream(seed=1).batches())), whole[0])


def test_an_epoch_holds_every_training_token_once_and_no_other() -> None:
    one = stream(buffer_tokens=10**6)
    one.buffer_tokens = one.tokens_per_epoch
    held = one.buffer(0)
    expected = []
    for row in rows_of_split(MODEL, CORPUS, "train", 0):
        ids = torch.as_tensor(row.ids).long()[None]
        expected.append(MODEL(ids, stop_at_layer=2)[0, row.keep_from :].detach())
    expected = torch.cat(expected)
    assert held.shape == expected.shape == (one.tokens_per_epoch, 16)
    assert not torch.allclose(held, expected, atol=1e-3), "it is shuffled"
    order = [rows[:, 0].argsort() for rows in (held, expected)]
    torch.testing.assert_close(held[order[0]], expected[order[1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_interrupted_equals_uninterrupted(kind: str, tmp_path: Path) -> None:
    whole = train_autoencoder(MODEL, CORPUS, settings(kind), tmp_path / "whole", progress=False)
    for steps in (5, 1, 4, None):
        Trainer(MODEL, CORPUS, settings(kind), tmp_path / "parts").run(
            steps=steps, progress=False, checkpoint_every=3
        )
    again = Trainer(MODEL, CORPUS, settings(kind), tmp_path / "parts")
    assert again.step == settings(kind).n_steps == 12
    for name, tensor in again.finish().state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    curves = [
        json.loads((tmp_path / run / "training.json").read_text())["curve"] for run in ("whole", "parts")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 12


def _stored(folder: Path, dtype: str = "float32", **more: object) -> StoredActivations:
    chosen = {"split": "train", "seed": 0, "shard_tokens": 300, **more}
    places = [(STREAM, 0), (STREAM, 1)]
    return store_activations(MODEL, CORPUS, places, folder, dtype=dtype, progress=False, **chosen)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"layer": 0, "site_out": STREAM, "layer_out": 1, "kind": "batch_topk"}]
)
def test_training_from_stored_activations_is_training_from_the_model(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    """To the rounding of float32: the model read the rows in other batches."""
    chosen = settings(**changes)  # type: ignore[arg-type]
    live = train_autoencoder(MODEL, CORPUS, chosen, tmp_path / "live", progress=False)
    store = _stored(tmp_path / "store")
    whole = train_autoencoder(MODEL, store, chosen, tmp_path / "whole", progress=False)
    for steps in (5, 2, None):
        Trainer(MODEL, StoredActivations.open(store.folder), chosen, tmp_path / "parts").run(
            steps=steps, progress=False, checkpoint_every=3
        )
    parts = Trainer(MODEL, store, chosen, tmp_path / "parts").finish().state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(tensor, live.state_dict()[name], atol=1e-4, rtol=1e-3)
        assert torch.equal(tensor, parts[name]), name
    with pytest.raises(RequestError, match="stored or not"):
        Trainer(MODEL, CORPUS, chosen, tmp_path / "whole")


def test_stored_activations_a_run_must_not_be_trained_on_are_refused(tmp_path: Path) -> None:
    for number, (more, complaint) in enumerate(
        [({"split": None}, "split None, expected train"), ({"seed": 1}, "seed 1, expected 0")]
    ):
        with pytest.raises(RequestError, match=complaint):
            Trainer(MODEL, _stored(tmp_path / f"{number}", **more), settings(), tmp_path / "run")
    store = _stored(tmp_path / "own")
    with pytest.raises(RequestError, match="another model"):
        Trainer(byte_model(1), store, settings(), tmp_path / "run")
    with pytest.raises(RequestError, match="is not stored"):
        Trainer(MODEL, store, settings(site="resid.torso.pre_attn"), tmp_path / "run")
    with pytest.raises(RequestError, match="say which layer"):
        Trainer(MODEL, store, settings(layer=None, site="emb.tok"), tmp_path / "run")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_planted_directions_are_found(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = planted_directions()

    def activations(self, rows):  # type: ignore[no-untyped-def]
        n = sum(len(row.ids) - row.keep_from for row in rows)
        draw = torch.Generator().manual_seed(rows[0].document * 1000 + rows[0].start + n)
        on = torch.rand(n, len(truth), generator=draw) < 0.08
        return (on * (1 + torch.rand(n, len(truth), generator=draw))) @ truth * 5 + 2.0

    monkeypatch.setattr(ActivationStream, "_activations", activations)
    own = {"jumprelu": {"sparsity": 0.08}, "gated": {"sparsity": 5.0}, "relu": {"sparsity": 2.5}}.get(
        kind, {"k": 2}
    )
    chosen = settings(
        kind, n_tokens=500 * 256, batch_tokens=256, buffer_tokens=600, dead_after=3000, seed=1, **own
    )
    sae = train_autoencoder(MODEL, CORPUS, chosen, tmp_path, progress=False)
    found = (truth @ sae.W_dec.T / sae.W_dec.norm(dim=-1)).amax(-1)
    curve = json.loads((tmp_path / "training.json").read_text())["curve"]
    print(kind, found.sort().values, curve[-1])
    assert found.median() > 0.85, "random directions reach 0.65"
    assert curve[-1]["variance_explained"] > 0.6 > curve[0]["variance_explained"]
    assert 1 < curve[-1]["l0"] < 4, "1.6 directions are on"


def test_the_scale_of_training_is_folded_in_and_others_can_read_it(tmp_path: Path) -> None:
    trainer = Trainer(MODEL, CORPUS, settings("topk"), tmp_path)
    trainer.run(progress=False)
    finished, x = trainer.finish(), trainer.stream.buffer(0)
    assert trainer.scale != pytest.approx(1.0, rel=0.05)
    assert float((x * trainer.scale).norm(dim=-1).mean()) == pytest.approx(16**0.5)
    expected = trainer.autoencoder.eval()(x * trainer.scale) / trainer.scale
    torch.testing.assert_close(finished(x), expected, atol=1e-4, rtol=1e-4)
    read = load_autoencoder(tmp_path, "saelens")
    torch.testing.assert_close(read(x), finished(x), atol=1e-5, rtol=1e-5)
    assert read.config.site_in == finished.config.site_in
    assert read.W_dec.norm(dim=-1).mul(trainer.scale).sub(1).abs().max() < 1e-5


def test_the_auxiliary_loss_teaches_dead_latents_only() -> None:
    generator = torch.Generator().manual_seed(0)
    sae = Autoencoder(AutoencoderConfig(d_in=4, d_latent=6, activation="topk", k=1), generator=generator)
    x = torch.randn(5, 4, generator=generator)
    h = sae.pre_activations(x)
    done = Pass(h.sum(), x * 0.5, torch.ones(6, dtype=torch.bool), h.sum())
    objective = build_objective(settings(), 1.0)
    assert auxiliary_loss(objective, sae, x, x, done, torch.zeros(6, dtype=torch.bool), 2) == 0
    dead = torch.tensor([False, True, False, True, True, False])
    auxiliary_loss(objective, sae, x, x, done, dead, 2).backward()
    assert (sae.W_dec.grad[~dead] == 0).all() and (sae.W_enc.grad[:, ~dead] == 0).all()
    assert (sae.W_dec.grad[dead] != 0).any()
    # by hand: one dead latent
    only = torch.zeros(6, dtype=torch.bool)
    only[2] = True
    error = x * 0.5
    predicted = h[:, 2:3].relu() * sae.W_dec[2]
    expected = (error - predicted).square().sum() / (error - error.mean(0)).square().sum()
    assert auxiliary_loss(objective, sae, x, x, done, only, 2).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_the_thresholds_pseudo_gradient_by_hand() -> None:
    h = torch.tensor([[0.0, 0.9], [1.2, 1.04], [0.95, 3.0]], requires_grad=True)
    threshold = torch.tensor([1.0, 1.0], requires_grad=True)
    on = step_function(h, threshold, 0.2)
    assert torch.equal(on, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]]))
    (on * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    # nearer than 0.1: 0.95 (weight 100) for the first latent, 1.04 (weight 10) for the second; each over 0.2
    torch.testing.assert_close(threshold.grad, torch.tensor([-500.0, -50.0]), rtol=1e-4, atol=1e-3)
    assert h.grad is None or not h.grad.any()


def test_rates_rise_stay_and_fall() -> None:
    chosen = settings(n_tokens=64 * 100, warm_up=0.1, decay=0.2, learning_rate=1.0)
    rates = [chosen.rate_at(step) for step in range(100)]
    assert rates[0] == 0.1 and rates[9:81] == [1.0] * 72 and rates[99] == pytest.approx(0.05)
    assert settings(learning_rate=None, d_latent=2**14).peak_rate == pytest.approx(2e-4)


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "matryoshka", "jumprelu"])
def test_bfloat16_products_train_too(kind: str, tmp_path: Path) -> None:
    trainer = Trainer(MODEL, CORPUS, settings(kind, autocast=True), tmp_path)
    trainer.run(progress=False)
    assert trainer.finish().W_dec.dtype == torch.float32
    assert trainer.curve[-1]["loss"] < trainer.curve[0]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": None}, "activation 'topk' needs k"),
        ({"sparsity": 1.0}, "k says it"),
        ({"activation": "relu"}, "k is for topk and batch_topk.*needs sparsity"),
        ({"group_sizes": (20, 20)}, "trained with batch_topk"),
        ({"warm_up": 0.6, "decay": 0.6}, "together at most 1"),
        ({"n_tokens": 3}, "less than one batch"),
        ({"widht": 3}, "widht"),
        ({"skip": True}, "give site_out"),
        ({"site_out": "resid.torso.delta_mlp", "layer_out": 2}, "which holds one layer"),
        (
            {"site_out": "resid.torso.delta_mlp", "activation": "gated", "k": None, "sparsity": 1.0},
            "no format holds a gated",
        ),
        ({"site_out": STREAM}, "which is read already"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer": 3}, RequestError, "has layers 0 to 2"),
        ({"layer": None}, RequestError, "say which"),
        ({"site": "resid.post_emb"}, RequestError, "belongs to no layer"),
        ({"site": "resid.torso.post_mpl"}, HookError, "did you mean"),
        ({"site": "mlp.pre_linear"}, RequestError, "never fires"),
        ({"batch_tokens": 5000, "n_tokens": 5000}, RequestError, "less than one batch of 5000"),
        ({"d_latent": 2}, ConfigError, "k is 3, but there are only 2"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    changes: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        Trainer(MODEL, CORPUS, settings(**changes), tmp_path)


def test_checkpoints_of_other_runs_and_halves_are_refused(tmp_path: Path) -> None:
    Trainer(MODEL, CORPUS, settings(), tmp_path).run(steps=1, progress=False)
    with pytest.raises(RequestError, match="d_latent was 40, now 48"):
        Trainer(MODEL, CORPUS, settings(d_latent=48), tmp_path)
    with pytest.raises(RequestError, match="another corpus"):
        Trainer(MODEL, text(seed=1), settings(), tmp_path)
    file = tmp_path / "checkpoint.pt"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"nothing"):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="delete it to begin anew"):
            Trainer(MODEL, CORPUS, settings(), tmp_path)


def test_the_sparse_gradient_of_topk_is_the_dense_one() -> None:
    generator = torch.Generator().manual_seed(0)
    config = AutoencoderConfig(d_in=6, d_latent=20, activation="topk", k=4, input_bias="decoder_bias")
    sae = Autoencoder(config, generator=generator)
    x, target = torch.randn(2, 9, 6, generator=generator), torch.randn(2, 9, 6, generator=generator)
    with torch.no_grad():
        sae.b_enc.add_(torch.randn(20, generator=generator))
        sae.b_dec.add_(torch.randn(6, generator=generator))
    found = []
    for sparse in (False, True):
        sae.zero_grad()
        given = x.clone().requires_grad_(True)
        latents, state = sae.encode_sparse(given, sparse_gradient=sparse)
        (sae.decode(latents, state) - target).square().sum().backward()
        found.append([given.grad, *(parameter.grad.clone() for parameter in sae.parameters())])
    for dense, sparse in zip(*found, strict=True):
        assert dense.abs().sum() > 0
        torch.testing.assert_close(sparse, dense, atol=1e-4, rtol=1e-4)
    with pytest.raises(RequestError, match="for plain top-k"):
        Autoencoder(AutoencoderConfig(d_in=6, d_latent=20, activation="groupmax", k=4)).encode_sparse(
            x, sparse_gradient=True
        )


@pytest.mark.parametrize(("kind", "skip"), [("topk", True), ("batch_topk", False), ("jumprelu", True)])
def test_a_transcoder_learns_a_map_between_sites(
    kind: str, skip: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth, out = planted_directions(), planted_directions(width=10)
    linear = torch.randn(16, 10, generator=torch.Generator().manual_seed(9)) / 4

    def activations(self, rows):  # type: ignore[no-untyped-def]
        n = sum(len(row.ids) - row.keep_from for row in rows)
        draw = torch.Generator().manual_seed(rows[0].document * 1000 + rows[0].start + n)
        on = torch.rand(n, len(truth), generator=draw) < 0.08
        strength = on * (1 + torch.rand(n, len(truth), generator=draw))
        x = strength @ truth * 5 + 2.0
        self.widths = [16, 10]
        return torch.cat([x, strength @ out * 30 + 1 + skip * (x @ linear)], -1)

    monkeypatch.setattr(ActivationStream, "_activations", activations)
    own = {"topk": {"k": 2}, "batch_topk": {"k": 2}, "jumprelu": {"sparsity": 0.02}}[kind]
    sites = {"site": "resid.torso.post_ln_mlp", "site_out": "resid.torso.delta_mlp", "skip": skip}
    chosen = settings(kind, n_tokens=200 * 256, batch_tokens=256, buffer_tokens=600, seed=1, **own, **sites)
    sae = train_autoencoder(MODEL, CORPUS, chosen, tmp_path, progress=False)
    assert (sae.config.d_in, sae.config.d_out, sae.config.has_skip) == (16, 10, skip)
    held = _stream(chosen)
    x, target = held.parted(held.buffer(3)[:500])
    missed = (sae(x) - target).square().sum() / (target - target.mean(0)).square().sum()
    curve = json.loads((tmp_path / "training.json").read_text())["curve"]
    assert missed < 0.5 and missed == pytest.approx(1 - curve[-1]["variance_explained"], abs=0.1)
    assert curve[0]["variance_explained"] < 0.3
    read = load_autoencoder(tmp_path)
    torch.testing.assert_close(read(x), sae(x), atol=1e-4, rtol=1e-4)
    assert (read.config.site_in, read.config.site_out) == (sae.config.site_in, sae.config.site_out)


def _stream(chosen: TrainingSettings) -> ActivationStream:
    return ActivationStream(
        MODEL, CORPUS, chosen.site, chosen.layer, batch_tokens=64, buffer_tokens=600, target=chosen.target
    )


def test_a_stream_of_two_sites_holds_what_the_model_computes_there() -> None:
    places = [("resid.torso.post_ln_mlp", 1), ("resid.torso.post_mlp", 2)]
    pairs = ActivationStream(MODEL, CORPUS, *places[0], batch_tokens=64, buffer_tokens=150, target=places[1])
    read, predicted = pairs.parted(pairs.buffer(1))
    alone = [
        ActivationStream(MODEL, CORPUS, *place, batch_tokens=64, buffer_tokens=150).buffer(1)
        for place in places
    ]
    torch.testing.assert_close(read, alone[0])
    torch.testing.assert_close(predicted, alone[1])


def test_an_interrupted_transcoder_goes_on(tmp_path: Path) -> None:
    chosen = settings("topk", site="resid.torso.post_ln_mlp", site_out="resid.torso.delta_mlp", skip=True)
    whole = train_autoencoder(MODEL, CORPUS, chosen, tmp_path / "whole", progress=False)
    for steps in (5, None):
        Trainer(MODEL, CORPUS, chosen, tmp_path / "parts").run(steps=steps, progress=False)
    again = Trainer(MODEL, CORPUS, chosen, tmp_path / "parts").finish().state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert whole.W_skip.abs().sum() > 0


@pytest.mark.parametrize("skewed", [False, True])
def test_sparse_batch_topk_is_the_dense_one_with_its_gradient(skewed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    config = AutoencoderConfig(d_in=6, d_latent=200, activation="batch_topk", input_bias="decoder_bias")
    sae = Autoencoder(config, generator=generator)
    x = torch.randn(9, 6, generator=generator)
    if skewed:
        x[0] *= 1000  # has nearly all that is kept
    weight, k, found = torch.randn(9, 200, generator=generator), 2, []
    for sparse in (False, True):
        sae.zero_grad()
        few, dense = sae.encode_batch_topk(x, k)[0], keep_batch_topk(sae.pre_activations(x), k)
        latents = few.to_dense(200) if sparse else dense
        (latents * weight).sum().backward()
        found.append([latents, sae.W_enc.grad.clone(), sae.b_enc.grad.clone(), sae.b_dec.grad.clone()])
    assert int((found[0][0] > 0).sum()) == 18
    for dense, sparse in zip(*found, strict=True):
        torch.testing.assert_close(sparse, dense, atol=1e-3, rtol=1e-4)
