"""Held to SAELens itself, in its own environment: what either saves, both compute alike.

The interpreter is $NEURON_LENS_PEER_SAELENS, or `.peers/sae-lens/bin/python` of the checkout
(scripts/peer_env makes it).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_lens.autoencoders import Autoencoder, Site, load_autoencoder, save_saelens

from .test_autoencoder import make, normal

pytestmark = pytest.mark.peer

CHECKOUT = Path(__file__).parents[2]
PEER = Path(os.environ.get("NEURON_LENS_PEER_SAELENS") or CHECKOUT / ".peers/sae-lens/bin/python")
SCRIPT = Path(__file__).with_name("saelens_peer.py")
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"]
ARCHITECTURES = ["standard", "gated", "topk", "topk-rescaled", "abstopk", "jumprelu"]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
THEIRS = [f"{a}.{kind}" for a in ARCHITECTURES for kind in [*NORMALISATIONS, "no_b_dec", "hook_z"]]
THEIRS += [f"{t}.{kind}" for t in TRANSCODERS for kind in ("equal", "wider")]

STREAM = {"site_in": Site(path="resid.torso.post_mlp", layer=1)}
MLP = {
    "site_in": Site(path="resid.torso.post_ln_mlp", layer=1),
    "site_out": Site(path="resid.torso.delta_mlp", layer=1),
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "relu-layer_norm": ("relu", {"input_bias": "decoder_bias", "normalisation": "layer_norm", **STREAM}),
    "relu-own-bias": ("relu", {"input_bias": "own", "normalisation": "constant_norm_rescale", **STREAM}),
    "relu-scale": ("relu", {"normalisation": "scale", "scale_in": 0.5, "scale_out": 0.25, **STREAM}),
    "gated": ("gated", {"input_bias": "decoder_bias", **STREAM}),
    "gated-own-bias": ("gated", {"input_bias": "own", **STREAM}),
    "topk": ("topk", {"input_bias": "decoder_bias", **STREAM}),
    "topk-scaled": ("topk scaled", {"normalisation": "layer_norm", **STREAM}),
    "abs_topk": ("abs_topk", STREAM),
    "jumprelu": ("jumprelu", {"input_bias": "decoder_bias", **STREAM}),
    "jumprelu-heads": ("jumprelu", {"d_in": 6, "flatten_heads": True}),
    "batch_topk": ("batch_topk", {"input_bias": "decoder_bias", **STREAM}),
    "matryoshka": ("batch_topk", {"group_sizes": (16, 32), **STREAM}),
    "transcoder": ("relu", {"d_out": 3, **MLP}),
    "skip-transcoder": ("relu", {"has_skip": True, **MLP}),
    "jumprelu-skip-transcoder": ("jumprelu", {"has_skip": True, "d_out": 7, **MLP}),
}


def run_peer(*arguments: str) -> None:
    if not PEER.exists():
        pytest.skip(f"SAELens' environment is not there: {PEER} (make it with scripts/peer_env)")
    done = subprocess.run([str(PEER), str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    run_peer("write", str(folder))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours")
    for name in OURS:
        autoencoder = build(name)
        save_saelens(autoencoder, folder / name)
        config = autoencoder.config
        x = normal(4, 3, 3, 2) if config.flatten_heads else normal(4, 3, config.d_in)
        save_file({"x": x}, folder / f"{name}.inputs.safetensors")
    run_peer("read", str(folder))
    return folder


def build(name: str) -> Autoencoder:
    activation, fields = OURS[name]
    autoencoder = make(activation, **fields)
    with torch.no_grad():
        if "threshold" in dict(autoencoder.activation.named_parameters()):
            autoencoder.activation.threshold.abs_()
    return autoencoder


def close(mine: torch.Tensor, reference: torch.Tensor) -> None:
    torch.testing.assert_close(mine.detach(), reference, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", THEIRS)
def test_what_saelens_saves_computes_the_same_here(name: str, theirs: Path) -> None:
    reference = load_file(theirs / f"{name}.safetensors")
    # SAELens applies no factor of its own to such a file: it takes it for folded already
    scale = 1.0 if name.endswith("expected_average_only_in") else None
    autoencoder = load_autoencoder(theirs / name, scaling_factor=scale)
    x = reference["x"]
    latents, state = autoencoder.encode_with_state(x)
    close(latents, reference["encode"])
    assert 0 < (latents != 0).float().mean() < 1
    close(autoencoder(x), reference["forward"])
    # SAELens' decode leaves the skip term out; it is in the state here
    if not autoencoder.config.has_skip:
        close(autoencoder.restore(autoencoder.decode(latents, state), like=x), reference["decode"])


def test_every_case_of_the_peer_is_tested(theirs: Path) -> None:
    assert sorted(path.stem for path in theirs.glob("*.safetensors")) == sorted(THEIRS)


@pytest.mark.parametrize("name", OURS)
def test_what_is_saved_here_computes_the_same_in_saelens(name: str, ours: Path) -> None:
    reference = load_file(ours / f"{name}.safetensors")
    autoencoder = build(name)
    latents = autoencoder.encode(reference["x"])
    close(latents, reference["encode"])
    torch.testing.assert_close(autoencoder(reference["x"]), reference["forward"], rtol=1e-4, atol=1e-4)
    again = json.loads((ours / name / "cfg.json").read_text())
    assert again["metadata"]["sae_lens_version"].startswith("6.")
