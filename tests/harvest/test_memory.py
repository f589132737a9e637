"""Memory is units times kept windows, not tokens: measured as the growth of processes of their own."""

from __future__ import annotations

from functools import cache

import pytest

from tests.memory import measured, needs_proc

MEASURE = """
import random, string, tempfile
from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
from neuron_lens.harvest.run import HarvestSettings, harvest
from neuron_lens.harvest.sources import LatentSource, NeuronSource
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig

kind, units, tokens = given
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
    print(growth(lambda: harvest(model, corpus(tokens), [own], Path(folder) / "own", settings, progress=False)))
"""

# A unit's windows [slot, length] in float16 (top, fired and near misses), its entries in the sample, and its figures.
HELD = {
    "neuron": (40 + 16) * 16 * 2 + 144 * 16 * 2 + 4000,
    "latent": (40 + 24 + 16) * 16 * 2 + 144 * 16 * 8 // 16 + 4000,
}

pytestmark = [pytest.mark.slow, needs_proc]


@cache
def peak(kind: str, units: int, tokens: int) -> int:
    """How much a harvest makes a process grow at most, in bytes."""
    return measured(MEASURE, [kind, units, tokens])


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
