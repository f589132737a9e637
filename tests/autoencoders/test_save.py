"""What is saved for SAELens and loaded again computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_lens.autoencoders import Site, load_autoencoder, save_circuit_tracer, save_saelens
from neuron_lens.errors import RequestError

from .test_autoencoder import make, normal

STREAM = Site(path="resid.torso.post_mlp", layer=2)
MLP = {
    "site_in": Site(path="resid.torso.post_ln_mlp", layer=2),
    "site_out": Site(path="resid.torso.delta_mlp", layer=2),
}

SAVED: list[tuple[str, dict[str, Any]]] = [
    ("relu", {"input_bias": "decoder_bias", "normalisation": "layer_norm"}),
    ("relu", {"input_bias": "own", "normalisation": "constant_norm_rescale"}),
    ("relu", {"input_bias": "decoder_bias", "normalisation": "scale", "scale_in": 0.5, "scale_out": 0.25}),
    ("gated", {"input_bias": "own"}),
    ("gated", {"input_bias": "decoder_bias"}),
    ("topk", {"input_bias": "decoder_bias"}),
    ("topk scaled", {"normalisation": "layer_norm"}),
    ("abs_topk", {}),
    ("batch_topk", {"input_bias": "decoder_bias", "group_sizes": (8, 40)}),
    ("jumprelu", {"flatten_heads": True, "d_in": 6}),
    ("jumprelu", {"d_out": 3, **MLP}),
    ("relu", {"has_skip": True, "input_bias": "own", **MLP}),
]


@pytest.mark.parametrize(("name", "fields"), SAVED, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SAVED)])
def test_round_trip(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    ours = make(name, **{"site_in": STREAM, "model_name": "tiny", "context_size": 64, **fields})
    save_saelens(ours, tmp_path / "sae")
    theirs = load_autoencoder(tmp_path / "sae")
    x = normal(20, 3, 2) if ours.config.flatten_heads else normal(20, ours.config.d_in)
    torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    for fact in ("site_in", "site_out", "model_name", "context_size", "flatten_heads", "d_out"):
        assert getattr(theirs.config, fact) == getattr(ours.config, fact), fact
    assert sorted(path.name for path in (tmp_path / "sae").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


def test_saving_twice_is_exact_and_keeps_the_dtype(tmp_path: Path) -> None:
    ours = make("topk", input_bias="decoder_bias").to(torch.bfloat16)
    save_saelens(ours, tmp_path / "a")
    once = load_autoencoder(tmp_path / "a")
    assert once.dtype == torch.bfloat16
    for name, tensor in ours.state_dict().items():
        assert torch.equal(once.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "a" / "cfg.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("groupmax", {}, "no groupmax autoencoder"),
        ("topk", MLP, "no topk transcoder"),
        ("topk ranked by norm", {}, "rank latents"),
        ("jumprelu negative", {}, "thresholds below zero"),
        ("topk", {"relu_after_selection": False}, "clips at zero"),
    ],
)
def test_what_saelens_cannot_say_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        save_saelens(make(name, **fields), tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize(
    ("name", "fields"),
    [("topk", {"has_skip": True}), ("relu", {"input_bias": "own"}), ("jumprelu negative", {"d_out": 3})],
)
def test_a_transcoder_saved_for_circuit_tracer_comes_back(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    ours = make(name, **{"model_name": "tiny: small", **MLP, **fields})
    save_circuit_tracer(ours, tmp_path)
    theirs = load_autoencoder(tmp_path)
    x = normal(20, ours.config.d_in)
    torch.testing.assert_close(theirs.encode(x), ours.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-4)
    for fact in ("site_in", "site_out", "model_name", "activation", "k"):
        assert getattr(theirs.config, fact) == getattr(ours.config, fact), fact


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gated", MLP, "no place for this"),
        ("relu", {**MLP, "normalisation": "layer_norm"}, "no place for this"),
        ("relu", {**MLP, "site_out": Site(path="resid.torso.delta_mlp", layer=3)}, "in one layer"),
        ("relu", {**MLP, "site_in": Site(path="resid.torso.attn_in", layer=2)}, "no published name"),
    ],
)
def test_what_circuit_tracer_cannot_say_is_refused(
    name: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=message):
        save_circuit_tracer(make(name, **fields), tmp_path / "set")
    assert not (tmp_path / "set").exists()
