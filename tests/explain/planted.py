"""A transformer built by hand whose neurons are known, and a corpus for it.

Words are drawn independently, so that nothing but the planted rule predicts a neuron. Two attention heads with
sinusoidal positions look exactly 1 and 23 tokens back; there are no norms, so that every weight is what it says.
"""

from __future__ import annotations

import math
import random

import numpy as np
import tiktoken
import torch

from neuron_lens.harvest.corpus import Corpus, Document
from neuron_lens.tokenizers import TiktokenTokenizer
from neuron_lens.transformer import Transformer, TransformerConfig

WORDS = ["self", "def", "x", "y", "value", "name", "return", "if", "(", ")", ":", "=", "+", "data", "None"]
DIGITS = [str(digit) for digit in range(10)]
SELF, DIGIT, AFTER_DEF, RANDOM = range(4)

N_CTX = 128
_FREQUENCIES = 12
_SHARPNESS = 20.0
_FLAGS = 6  # is self, is digit, is def, noise, copied def, copied noise


def tokenizer() -> TiktokenTokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    for word in [*WORDS, *DIGITS]:
        ranks[f" {word}".encode()] = len(ranks)
    return TiktokenTokenizer(
        tiktoken.Encoding("planted", pat_str=r" \S+|\n", mergeable_ranks=ranks, special_tokens={})
    )


def corpus(n_documents: int = 24, n_words: int = 480, seed: int = 0) -> Corpus:
    draw = random.Random(seed)
    texts = [
        "".join(" " + draw.choice([*WORDS, *DIGITS]) for _ in range(n_words)) for _ in range(n_documents)
    ]
    return Corpus.of_documents([Document(f"planted {i}", text) for i, text in enumerate(texts)], "planted")


def model(seed: int = 0) -> Transformer:
    """One layer, four neurons: " self", digits, after " def", and one that follows noise 23 tokens back."""
    tokens = tokenizer()
    width = 2 * _FREQUENCIES
    config = TransformerConfig(
        name="planted", n_layers=1, d_model=_FLAGS + width, n_heads=2, d_head=width, d_mlp=4, d_vocab=tokens.vocab_size,
        n_ctx=N_CTX, norm="none", final_norm=False, activation="relu", tied=False,
    )  # fmt: skip
    planted = Transformer(config, seed=seed, tokenizer=tokens).eval()
    state = {name: torch.zeros_like(tensor) for name, tensor in planted.state_dict().items()}
    embed = state["embed.weight"]
    generator = torch.Generator().manual_seed(seed)
    embed[:, 3] = torch.randn(len(embed), generator=generator)
    for token in range(len(embed)):
        text = tokens.token_str(token)
        embed[token, 0] = text == " self"
        embed[token, 1] = text.strip() in DIGITS
        embed[token, 2] = text == " def"
    angles = torch.arange(N_CTX)[:, None] * _rates()
    state["pos_embed.weight"][:, _FLAGS:] = torch.cat([angles.cos(), angles.sin()], -1)
    state["unembed.weight"][:] = torch.randn(state["unembed.weight"].shape, generator=generator)
    planted.load_state_dict(state)
    with torch.no_grad():
        _look_back(planted, head=0, distance=1, reads=2, writes=4)
        _look_back(planted, head=1, distance=23, reads=3, writes=5)
        mlp = planted.blocks[0].mlp
        for neuron, column in ((SELF, 0), (DIGIT, 1), (AFTER_DEF, 4), (RANDOM, 5)):
            mlp.up.weight[neuron, column] = 2.0
            mlp.down.weight[column, neuron] = 1.0
    return planted


def _rates() -> torch.Tensor:
    return torch.tensor(np.geomspace(math.pi * 0.9, math.pi / N_CTX, _FREQUENCIES), dtype=torch.float32)


def _look_back(planted: Transformer, head: int, distance: int, reads: int, writes: int) -> None:
    """A head whose query at i matches the key at i - distance; it copies one flag to another."""
    attention = planted.blocks[0].attn
    width = 2 * _FREQUENCIES
    rows = slice(head * width, (head + 1) * width)
    turn = _rates() * distance
    cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
    scale = _SHARPNESS * math.sqrt(width)
    attention.q.weight[rows, _FLAGS:] = (
        torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0) * scale
    )
    attention.k.weight[rows, _FLAGS:] = torch.eye(width)
    attention.v.weight[head * width, reads] = 1.0
    attention.out.weight[writes, head * width] = 1.0
