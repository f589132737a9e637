"""The autoencoder that ships with pico is what its card says."""

from __future__ import annotations

import json

import pytest
import torch

from neuron_lens.autoencoder_training import Evaluation, evaluate_autoencoder
from neuron_lens.autoencoders import load_autoencoder
from neuron_lens.files.model_defs import model_defs_dir
from neuron_lens.harvest.corpus import Corpus
from neuron_lens.transformer import Transformer

FOLDER = model_defs_dir() / "pico"


def test_it_is_small_and_explains_what_the_card_says() -> None:
    files = list((FOLDER / "sae").iterdir())
    assert sum(file.stat().st_size for file in files) < 3 * 2**20
    assert load_autoencoder(FOLDER / "sae").dtype == torch.float16
    autoencoder = load_autoencoder(FOLDER / "sae", dtype=torch.float32)
    card = Evaluation.model_validate(json.loads((FOLDER / "sae" / "evaluation.json").read_text()))
    model = Transformer.load("pico").eval()
    seen = evaluate_autoencoder(
        model, autoencoder, Corpus.of_paths([FOLDER / "sample"]), split="all", max_tokens=1500, progress=False
    )
    assert seen.l0 == card.l0 == pytest.approx(autoencoder.config.k, abs=0.1)
    assert seen.variance_explained == pytest.approx(card.variance_explained, abs=0.08)
    assert seen.loss_recovered_mean == pytest.approx(card.loss_recovered_mean, abs=0.08)
    assert f"{card.variance_explained:.3f}" in (FOLDER / "README.md").read_text()
