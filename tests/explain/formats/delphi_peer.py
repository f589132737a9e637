"""Run inside the environment of Delphi, never by pytest: `python delphi_peer.py FOLDER`.

Caches the latents of the autoencoder in FOLDER/sae on the GPT-2 in FOLDER/model, reading FOLDER/ids.safetensors, and
saves them as Delphi does in FOLDER/delphi/latents. Then opens FOLDER/ours/latents with Delphi's loader and writes what
it finds of every latent to FOLDER/read.safetensors, and the examples it makes of them to FOLDER/examples.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from delphi.sparse_coders.load_sparsify import load_sparsify_hooks
from safetensors.torch import load_file, save_file
from transformers import AutoModel

HOOKPOINT = "h.1"
ROWS, SPLITS, WINDOW = 4, 3, 8


class Tokens:
    """What Delphi asks of a tokenizer: a text for each id."""

    def batch_decode(self, ids: Any) -> list[str]:
        return [f"<{int(i)}>" for i in ids]


def save_cache(folder: Path) -> None:
    """Delphi's cache step."""
    model = AutoModel.from_pretrained(folder / "model").eval()
    encoders, transcode = load_sparsify_hooks(model, str(folder / "sae"), [HOOKPOINT])
    ids = load_file(folder / "ids.safetensors")["ids"]
    cache = LatentCache(model, encoders, batch_size=ROWS, transcode=transcode)
    cache.run(ids.numel(), ids)
    cache.save_splits(SPLITS, folder / "delphi" / "latents")
    cache.save_config(folder / "delphi" / "latents", CacheConfig(cache_ctx_len=ids.shape[1]), "random gpt2")


def read_cache(folder: Path) -> None:
    """Delphi's loader on our files."""
    data = LatentDataset(
        folder / "ours" / "latents",
        SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2),
        ConstructorConfig(example_ctx_len=WINDOW, min_examples=8, n_non_activating=2),
        tokenizer=Tokens(),
    )
    found = {"tokens": data.tokens}
    for buffer in data.buffers:
        for _, module, activations in buffer:
            assert module == data.modules[0]
            latent = int(activations.locations[0, 2])
            found[f"{latent}.locations"] = activations.locations.clone()
            found[f"{latent}.activations"] = activations.activations.clone()
    save_file(found, folder / "read.safetensors")
    examples = {
        record.latent.latent_index: [
            [example.tokens.tolist(), example.activations.tolist()] for example in record.examples
        ]
        for record in data
    }
    (folder / "examples.json").write_text(json.dumps(examples))


if __name__ == "__main__":
    torch.set_num_threads(1)
    save_cache(Path(sys.argv[1]))
    read_cache(Path(sys.argv[1]))
