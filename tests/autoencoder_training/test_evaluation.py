"""Evaluation: every figure against one worked out directly, and the ends of each scale."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from autoencoder_training.small import STREAM, byte_model, text
from neuron_lens.autoencoder_training import Evaluation, evaluate_autoencoder
from neuron_lens.autoencoder_training.stream import rows_of_split
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, explained_variance
from neuron_lens.errors import RequestError
from neuron_lens.hooks import TransformerHooks

MODEL = byte_model()
CORPUS = text(length=60)  # documents of several rows, the last ones short: batches have padding


def random_autoencoder(**changes: object) -> Autoencoder:
    fields = {"d_in": 16, "d_latent": 40, "activation": "topk", "k": 2, "site_in": Site(path=STREAM, layer=1)}
    config = AutoencoderConfig(**{**fields, **changes})
    return Autoencoder(config, generator=torch.Generator().manual_seed(0)).requires_grad_(False)


def evaluate(sae: Autoencoder, **options: object) -> Evaluation:
    return evaluate_autoencoder(MODEL, sae, CORPUS, progress=False, **options)


def identity() -> Autoencoder:
    """x = relu(x) - relu(-x)."""
    sae = random_autoencoder(activation="relu", k=None, d_latent=32)
    sae.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 1))
    sae.W_dec.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 0))
    return sae


def test_a_perfect_autoencoder_recovers_everything() -> None:
    result = evaluate(identity())
    assert result.variance_explained == pytest.approx(1.0, abs=1e-9)
    assert result.loss_spliced == pytest.approx(result.loss_intact, abs=1e-5)
    assert result.l0 == pytest.approx(16, abs=0.01)
    for share in (result.loss_recovered_zero, result.loss_recovered_mean):
        assert share is None or share == pytest.approx(1.0, abs=1e-3)


def test_autoencoders_that_say_zero_or_the_mean_recover_nothing() -> None:
    sae = random_autoencoder()
    sae.W_dec.zero_()
    nothing = evaluate(sae)
    assert nothing.loss_spliced == pytest.approx(nothing.loss_zero, abs=1e-5)
    rows = rows_of_split(MODEL, CORPUS, "test", 0)
    streams = [MODEL(torch.as_tensor(r.ids).long()[None], stop_at_layer=2)[0, r.keep_from :] for r in rows]
    sae.b_dec.copy_(torch.cat(streams).detach().double().mean(0))
    mean = evaluate(sae)
    assert mean.loss_spliced == pytest.approx(mean.loss_mean, abs=1e-5)
    assert mean.variance_explained == pytest.approx(0.0, abs=1e-6)


@torch.no_grad()
def test_every_figure_against_row_by_row_arithmetic() -> None:
    sae = random_autoencoder()
    result = evaluate(sae)
    target, predicted, latents, losses = [], [], [], []
    for row in rows_of_split(MODEL, CORPUS, "test", 0):
        ids = torch.as_tensor(row.ids).long()[None]
        x = MODEL(ids, stop_at_layer=2)
        kept = slice(row.keep_from, None)
        target.append(x[0, kept])
        predicted.append(sae(x)[0, kept])
        latents.append(sae.encode(x)[0, kept])
        hooks = TransformerHooks().append_to_path(
            f"{STREAM}.fwd", lambda x, layer: sae(x) if layer == 1 else None
        )
        logits = MODEL(ids, hooks=hooks)
        losses.append(functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")[kept])
    x, on = torch.cat(target), torch.cat(latents) != 0
    assert result.n_tokens == len(x) and result.n_loss_tokens == len(torch.cat(losses))
    assert result.variance_explained == pytest.approx(explained_variance(torch.cat(predicted), x), abs=1e-5)
    assert result.l0 == pytest.approx(float(on.sum(-1).float().mean()))
    assert result.loss_spliced == pytest.approx(float(torch.cat(losses).mean()), rel=1e-4)
    share = on.double().mean(0)
    assert result.never_fired == int((share == 0).sum()) == round(result.dead_share * 40)
    assert result.dense == int((share > 0.1).sum())
    assert sum(result.density_counts) == 40 and len(result.density_edges) == len(result.density_counts) + 1
    often = sum(result.density_counts[-1:])
    assert often == sum(math.log10(s) >= -0.5 for s in share.tolist() if s)
    assert Evaluation.model_validate_json(result.model_dump_json()) == result


def test_transcoders_and_other_places() -> None:
    inside, outside = (
        Site(path="resid.torso.post_ln_mlp", layer=1),
        Site(path="resid.torso.delta_mlp", layer=1),
    )
    transcoder = random_autoencoder(site_in=inside, site_out=outside)
    own, moved = evaluate(transcoder), evaluate(transcoder, layer=0)
    assert (own.site, own.layer, moved.layer) == (outside.path, 1, 0)
    assert own.loss_zero != moved.loss_zero
    nowhere = random_autoencoder(site_in=None)
    assert evaluate(nowhere, site=STREAM, layer=1) == evaluate(random_autoencoder())
    parts = [
        evaluate(random_autoencoder(), split=split).n_tokens for split in ("train", "validation", "test")
    ]
    assert evaluate(random_autoencoder(), split="all").n_tokens == sum(parts)
    assert evaluate(random_autoencoder(), max_tokens=20).n_tokens < parts[2]


def test_bad_requests() -> None:
    with pytest.raises(RequestError, match="'train', 'validation', 'test' or 'all'"):
        evaluate(random_autoencoder(), split="held-out")
    with pytest.raises(RequestError, match="does not say which site"):
        evaluate(random_autoencoder(site_in=None))
    with pytest.raises(RequestError, match="do not fit this autoencoder"):
        evaluate(random_autoencoder(d_in=17))
