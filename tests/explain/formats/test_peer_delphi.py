"""Delphi 0.1.3's cache of a model is ours: its loader reads our files, ours reads its, and they say the same."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_lens.autoencoders import Autoencoder, load_autoencoder
from neuron_lens.explain.formats.delphi import LatentCache, LatentCacheWriter
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import Transformer

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".peers" / "delphi" / "bin" / "python"
SCRIPT = HERE / "delphi_peer.py"
MODULE = "h.1"  # the one of the script, as are the splits and the window
SPLITS, WINDOW = 3, 8
D_MODEL, VOCABULARY, D_LATENT, K = 16, 60, 40, 6

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env delphi"),
]


def write_model(folder: Path) -> None:
    """A random GPT-2 as transformers saves it."""
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    d, state = D_MODEL, {"wte.weight": weight(VOCABULARY, D_MODEL), "wpe.weight": weight(32, D_MODEL)}
    linear = {
        "attn.c_attn": (d, 3 * d),
        "attn.c_proj": (d, d),
        "mlp.c_fc": (d, 4 * d),
        "mlp.c_proj": (4 * d, d),
    }
    for layer in range(3):
        for name, shape in linear.items():
            state[f"h.{layer}.{name}.weight"] = weight(*shape)
            state[f"h.{layer}.{name}.bias"] = weight(shape[1])
        for name in (f"h.{layer}.ln_1", f"h.{layer}.ln_2"):
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + weight(d), weight(d)
    state["ln_f.weight"], state["ln_f.bias"] = 1 + weight(d), weight(d)
    folder.mkdir()
    save_file({f"transformer.{name}": x for name, x in state.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_layer": 3, "n_embd": d, "n_head": 2,
        "vocab_size": VOCABULARY, "n_positions": 32, "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def write_autoencoder(folder: Path) -> None:
    """A random top-k autoencoder as sparsify saves it."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        "encoder.weight": torch.randn(D_LATENT, D_MODEL, generator=generator),
        "encoder.bias": torch.randn(D_LATENT, generator=generator),
        "W_dec": torch.randn(D_LATENT, D_MODEL, generator=generator),
        "b_dec": torch.randn(D_MODEL, generator=generator),
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"k": K, "num_latents": D_LATENT, "d_in": D_MODEL}))


def encoded(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """Our latents `[row, pos, latent]`."""
    model: Transformer = Transformer.load(str(folder / "model"), tokenizer=None)
    sae: Autoencoder = load_autoencoder(folder / "sae" / MODULE)
    hooks, site = TransformerHooks(), sae.config.site_in
    recording = hooks.record(site.path)
    with torch.no_grad():
        model(ids, hooks=hooks, stop_at_layer=site.layer + 1)
        return sae.encode(recording[site.path, site.layer]).numpy()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, np.ndarray]:
    """A folder with both caches and what Delphi read of ours; the ids; our latents."""
    folder = tmp_path_factory.mktemp("delphi")
    write_model(folder / "model")
    write_autoencoder(folder / "sae" / MODULE)
    ids = torch.randint(VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(2))
    save_file({"ids": ids}, folder / "ids.safetensors")
    dense = encoded(folder, ids)
    config = {"model_name": "random gpt2", "dataset_repo": "random ids"}
    with LatentCacheWriter(
        folder / "ours", MODULE, n_latents=D_LATENT, n_splits=SPLITS, config=config
    ) as writer:
        for own, rows in zip(np.split(dense, [5]), np.split(ids.numpy(), [5]), strict=True):
            writer.add(rows, np.argwhere(own), own[own != 0])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(PYTHON), str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, ids, dense


def test_delphis_cache_says_what_we_compute(made: Any) -> None:
    folder, ids, dense = made
    cache = LatentCache(folder / "delphi", MODULE)
    assert (cache.tokens == ids.numpy()).all() and cache.latents == range(D_LATENT)
    assert cache.config["model_name"] == "random gpt2" and cache.config["cache_ctx_len"] == ids.shape[1]
    read = np.stack([cache.dense(latent) for latent in cache.latents], axis=-1)
    assert ((read != 0) == (dense != 0)).all() and (read != 0).any()
    np.testing.assert_allclose(read, dense, rtol=2e-3, atol=1e-4)


def test_both_write_the_same_files(made: Any) -> None:
    folder, _, _ = made
    ours, theirs = (
        {path.name: load_file(path) for path in (folder / who / "latents" / MODULE).glob("*.safetensors")}
        for who in ("ours", "delphi")
    )
    assert ours.keys() == theirs.keys() and len(ours) == SPLITS
    for name, held in theirs.items():
        assert {key: x.dtype for key, x in held.items()} == {key: x.dtype for key, x in ours[name].items()}
        assert torch.equal(held["tokens"], ours[name]["tokens"])
        assert held["locations"].tolist() == ours[name]["locations"].tolist()
        torch.testing.assert_close(held["activations"], ours[name]["activations"], rtol=2e-3, atol=1e-4)


def test_delphis_loader_reads_our_files(made: Any) -> None:
    folder, ids, dense = made
    read = load_file(folder / "read.safetensors")
    assert torch.equal(read.pop("tokens"), ids)
    active = [latent for latent in range(D_LATENT) if dense[:, :, latent].any()]
    assert len(active) > D_LATENT // 2
    assert {int(name.split(".")[0]) for name in read} == set(active)
    for latent in active:
        rows, positions = dense[:, :, latent].nonzero()
        expected = np.stack([rows, positions, np.full_like(rows, latent)], axis=1)
        assert (read[f"{latent}.locations"].numpy() == expected).all()
        values = dense[rows, positions, latent].astype(np.float16)
        assert (read[f"{latent}.activations"].numpy() == values).all()


def test_delphi_makes_examples_of_our_files(made: Any) -> None:
    folder, ids, dense = made
    examples = json.loads((folder / "examples.json").read_text())
    assert len(examples) > 5
    windows = ids.reshape(-1, WINDOW).tolist()
    for latent, found in examples.items():
        own = dense[:, :, int(latent)].astype(np.float16).reshape(-1, WINDOW)
        firing = {tuple(windows[place]): own[place].tolist() for place in own.any(1).nonzero()[0]}
        assert {tuple(tokens): values for tokens, values in found} == firing
