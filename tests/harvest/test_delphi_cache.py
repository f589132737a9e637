"""Delphi's latent cache of a corpus: what is read back is what the encoder gives, whatever the batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explain import planted

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.cli import main
from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.delphi import LatentCache
from neuron_lens.harvest import delphi_cache
from neuron_lens.harvest.delphi_cache import write_delphi_cache
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import Transformer

SITE = "resid.torso.post_mlp"
CONTEXT = 48


@pytest.fixture(scope="module")
def model() -> Transformer:
    return planted.model()


def autoencoder(model: Transformer, k: int = 0) -> Autoencoder:
    site = Site(path=SITE, layer=0)
    config = AutoencoderConfig(
        d_in=model.config.d_model, d_latent=17, site_in=site, activation="topk" if k else "relu", k=k or None
    )
    made = Autoencoder(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return made


@pytest.mark.parametrize("k", [0, 3], ids=["relu", "topk"])
def test_the_cache_holds_what_the_encoder_gives(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, k: int
) -> None:
    monkeypatch.setattr(delphi_cache, "_RANGE", 7)  # no range ends where the latents end
    sae, corpus = autoencoder(model, k), planted.corpus(3, 200)
    cache = write_delphi_cache(
        model, sae, corpus, tmp_path, context=CONTEXT, n_splits=3, batch_rows=5, progress=False
    )
    documents = [model.tokenizer.encode(document.text, bos=False) for document in corpus]
    rows = [
        ids[begin : begin + CONTEXT]
        for ids in documents
        for begin in range(0, len(ids) - CONTEXT + 1, CONTEXT)
    ]
    assert cache.tokens.tolist() == rows and len(cache.latents) == 17
    hooks = TransformerHooks()
    recording = hooks.record(SITE)
    with torch.no_grad():
        model(torch.tensor(rows), hooks=hooks)
        expected = sae.encode(recording[SITE, 0]).numpy()
    read = np.stack([cache.dense(latent) for latent in cache.latents], axis=-1)
    np.testing.assert_allclose(read, expected, rtol=2e-3, atol=2e-4)
    assert ((read != 0) == (expected.astype(np.float16) != 0)).all() and (read != 0).any()
    assert cache.config["ctx_len"] == CONTEXT and cache.config["model_name"] == "planted"


def test_batches_change_nothing(model: Transformer, tmp_path: Path) -> None:
    caches = [
        write_delphi_cache(
            model,
            autoencoder(model),
            planted.corpus(2, 150),
            tmp_path / str(size),
            context=CONTEXT,
            batch_rows=size,
            max_rows=4,
            progress=False,
        )
        for size in (1, 4)
    ]
    assert len(caches[0].tokens) == 4
    for latent in caches[0].latents:
        np.testing.assert_allclose(caches[0].dense(latent), caches[1].dense(latent), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"context": planted.N_CTX + 1}, "reads 1 to 128"),
        ({"context": 0}, "reads 1 to 128"),
        ({"context": 100}, "nothing was added"),
        ({"batch_rows": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_cached_is_refused_and_leaves_no_cache(
    model: Transformer, tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        write_delphi_cache(
            model, autoencoder(model), planted.corpus(2, 60), tmp_path, progress=False, **options
        )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_command_writes_the_shipped_autoencoders_latents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "a.txt"
    text.write_text("def double(x):\n    return x + x\n" * 60)
    common = ["harvest", "pico", "--corpus", str(text), "--out", str(tmp_path / "out"), "--format", "delphi"]
    assert main([*common, "--quiet"]) == 2
    assert "give --sae" in capsys.readouterr().err
    assert main([*common, "--quiet", "--sae", "pico", "--latents", "0:4"]) == 2
    assert "no --latents" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*common, "--quiet", "--sae", "pico"]) == 0
    cache = LatentCache(tmp_path / "out", f"layers.2.{SITE}")
    assert "2048 latents" in capsys.readouterr().out and cache.config["model_name"] == "pico"
    active = sum(len(found.activations) for _, found in cache)
    assert 0 < active <= 24 * cache.tokens.size
