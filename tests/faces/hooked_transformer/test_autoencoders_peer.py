"""Attached autoencoders give what SAELens' HookedSAETransformer gives: names, values, edits and gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import strong_model, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, load_autoencoder, save_saelens
from neuron_lens.faces.hooked_transformer import HookedTransformer

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".peers" / "sae-lens" / "bin" / "python"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env sae-lens"),
]
sys.path.insert(0, str(HERE))

STREAM, HEADS = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
MLP = {
    "site_in": Site(path="resid.torso.ln_mlp.post_scale", layer=1),
    "site_out": Site(path="resid.torso.delta_mlp", layer=1),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "relu": (STREAM, {"activation": "relu"}),
    "biased": (STREAM, {"activation": "relu", "input_bias": "decoder_bias"}),
    "gated": (STREAM, {"activation": "gated"}),
    "topk": (STREAM, {"activation": "topk", "k": 5}),
    "jumprelu": (STREAM, {"activation": "jumprelu"}),
    "layer_norm": (STREAM, {"activation": "topk", "k": 5, "normalisation": "layer_norm"}),
    "rescaled": (STREAM, {"activation": "relu", "normalisation": "constant_norm_rescale"}),
    "by_norm": (STREAM, {"activation": "topk", "k": 5, "decoder_norm": "scale_latents"}),
    "heads": (
        HEADS,
        {"activation": "relu", "flatten_heads": True, "site_in": Site(path="attn.v_out", layer=1)},
    ),
    "transcoder": ("blocks.1.hook_mlp_out", {"activation": "relu", **MLP}),
}
COMBINED = [(name, error) for name in CASES for error in (True, False)]


def build(name: str) -> Autoencoder:
    fields = {
        "d_in": 24,
        "d_latent": 96,
        "site_in": Site(path="resid.torso.post_mlp", layer=1),
        **CASES[name][1],
    }
    generator = torch.Generator().manual_seed(len(name))
    made = Autoencoder(AutoencoderConfig(**fields), generator=generator)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saes")
    for name in CASES:
        save_saelens(build(name), folder / name)
    engine = strong_model(tiny_config(d_vocab=60))
    lens = HookedTransformer.from_engine(engine)
    state = {name: tensor.contiguous().clone() for name, tensor in lens.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    fields = ("n_layers", "d_model", "n_ctx", "d_head", "n_heads", "d_mlp", "d_vocab", "act_fn", "eps")
    config = {name: getattr(lens.cfg, name) for name in (*fields, "normalization_type")}
    config["cases"] = {name: at for name, (at, _) in CASES.items()}
    (folder / "config.json").write_text(json.dumps(config))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [str(PYTHON), str(HERE / "autoencoders_peer.py"), str(folder)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def ours_and_theirs(
    folder: Path, name: str, use_error_term: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from autoencoders_peer import everything

    lens = HookedTransformer.from_engine(strong_model(tiny_config(d_vocab=60))).eval()
    sae = load_autoencoder(folder / name)
    ours = everything(lens, sae, CASES[name][0], use_error_term)
    return ours, load_file(folder / f"{name}.{use_error_term}.safetensors")


@pytest.mark.parametrize(("name", "use_error_term"), COMBINED)
def test_the_same_calls_give_the_same_names_and_values(folder: Path, name: str, use_error_term: bool) -> None:
    ours, theirs = ours_and_theirs(folder, name, use_error_term)
    # points transformer-lens has that this model's own point tells already
    unknown = {key for key in theirs if key.endswith("mlp.hook_in")}
    assert theirs.keys() - unknown == ours.keys() - _only_ours(ours, theirs)
    for key in theirs.keys() - unknown:
        torch.testing.assert_close(
            ours[key], theirs[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    moved = [
        key
        for key in ours
        if key.startswith("edit/") and not torch.allclose(ours[key], ours["logits"], atol=1e-2)
    ]
    assert len(moved) >= 4, "the edits must matter"


def _only_ours(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    """Points that transformer-lens does not have at all, without any autoencoder."""
    extra = ours.keys() - theirs.keys()
    assert not [key for key in extra if "hook_sae" in key or not key.startswith("cache/")], extra
    return extra
