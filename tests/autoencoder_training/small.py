"""A tiny model that reads bytes, some text for it, and settings of a short run."""

from __future__ import annotations

import random

import torch
from conftest import strong_model, tiny_config

from neuron_lens.autoencoder_training import TrainingSettings
from neuron_lens.harvest.corpus import Corpus, Document
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import Transformer

STREAM = "resid.torso.post_mlp"


def byte_model(seed: int = 0) -> Transformer:
    tokenizer = bytes_tokenizer()
    model = strong_model(tiny_config(name="tiny", d_vocab=tokenizer.vocab_size, d_model=16, d_mlp=16), seed)
    model.tokenizer = tokenizer
    return model


def text(n_documents: int = 12, length: int = 180, seed: int = 0) -> Corpus:
    draw = random.Random(seed)
    return Corpus.of_documents(
        [Document(f"{i}", "".join(draw.choices("abcdef \n", k=length))) for i in range(n_documents)],
        "letters",
    )


ACTIVATIONS = {
    "topk": {"activation": "topk", "k": 3},
    "batch_topk": {"activation": "batch_topk", "k": 3},
    "matryoshka": {"activation": "batch_topk", "k": 3, "group_sizes": (8, 8, 24)},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.003, "bandwidth": 0.5},
    "gated": {"activation": "gated", "sparsity": 1.0},
    "relu": {"activation": "relu", "sparsity": 1.0},
}


def settings(kind: str = "topk", **changes: object) -> TrainingSettings:
    fields = {
        "layer": 1, "d_latent": 40, "n_tokens": 12 * 64, "batch_tokens": 64, "buffer_tokens": 150,
        "learning_rate": 3e-3, "dead_after": 100, **ACTIVATIONS[kind], **changes,
    }  # fmt: skip
    return TrainingSettings(**fields)


def planted_directions(width: int = 16, count: int = 20) -> torch.Tensor:
    """Rows of length 1 [count, width]."""
    directions = torch.randn(count, width, generator=torch.Generator().manual_seed(3))
    return directions / directions.norm(dim=-1, keepdim=True)
