"""Memory is units times kept windows, not tokens: measured as the growth of processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

MEASURE = """
import ctypes, gc, json, random, string, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
from neuron_lens.harvest.run import HarvestSettings, harvest
from neuron_lens.harvest.sources import LatentSource, NeuronSource
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

kind, units, tokens = json.loads(sys.argv[1])
tokenizer = bytes_tokenizer()
config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_mlp=units if kind == "neuron" else 32,
                           d_vocab=tokenizer.vocab_size, n_ctx=64)
model = Transformer(config, seed=0, tokenizer=tokenizer).eval().requires_grad_(False)

def source():
    if kind == "neuron":
        return NeuronSource(model, 0)
    own = AutoencoderConfig(d_in=16, d_latent=units, activation="topk", k=units // 16,
                            site_in=Site(path="resid.torso.post_mlp", layer=0))
    return LatentSource(model, Autoencoder(own, generator=torch.Generator().manual_seed(0)).requires_grad_(False))

def corpus(tokens):  # drawn anew whenever it is read
    def read():
        for number in range(tokens // 1000):
            yield Document(str(number), "".join(random.Random(number).choices(string.printable, k=1000)))
    return Corpus("drawn", read)

settings = HarvestSettings(shape=WindowShape(length=16, context=16, row_length=64), random=(96, 24, 24), top=(24, 8, 8),
                           fired=(16, 4, 4), near=(4, 2, 2), batch_rows=4, shard_tokens=tokens // 2)
with tempfile.TemporaryDirectory() as folder:
    harvest(model, corpus(4000), [NeuronSource(model, 0)], Path(folder) / "warm", settings, progress=False)
    own = source()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    harvest(model, corpus(tokens), [own], Path(folder) / "own", settings, progress=False)
    print(status("VmHWM") - before)
"""

# A unit's windows [slot, length] in float16 (top, fired and near misses), its entries in the sample, and its figures.
HELD = {
    "neuron": (40 + 16) * 16 * 2 + 144 * 16 * 2 + 4000,
    "latent": (40 + 24 + 16) * 16 * 2 + 144 * 16 * 8 // 16 + 4000,
}

# One thread, one arena, and what is freed goes back to the system at once: by itself malloc keeps what it likes, and the
# same harvest peaks anywhere from 65 to 118 MB.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
    ),
]


@cache
def peak(kind: str, units: int, tokens: int) -> int:
    """How much a harvest makes a process grow at most, in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([kind, units, tokens])],
        capture_output=True, text=True, check=False, env={**os.environ, **ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("kind", ["neuron", "latent"])
def test_ten_times_the_tokens_take_no_more_memory(kind: str) -> None:
    # More text has more windows to choose from: where they lie takes some bytes each, until all lists differ. Their text
    # held in memory would be 20 MiB, activations of all tokens 100 MiB.
    assert peak(kind, 512, 120_000) <= 1.1 * peak(kind, 512, 12_000) + (9 << 20)


@pytest.mark.parametrize("kind", ["neuron", "latent"])
def test_a_unit_takes_what_is_kept_of_it(kind: str) -> None:
    few, many = 512, 4096
    growth = (peak(kind, many, 12_000) - peak(kind, few, 12_000)) / (many - few)
    assert growth <= 2 * HELD[kind], f"{growth:.0f} bytes a unit, of which {HELD[kind]} are kept"
