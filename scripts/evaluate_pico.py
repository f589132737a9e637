#!/usr/bin/env python3
"""Evaluate `pico` on the files held out from its training, and write the figures into its model card.

    python scripts/evaluate_pico.py

Prints held-out loss in bits per byte beside an interpolated trigram model over the same tokens, and how much better the
second copy of a repeated passage is predicted than the first (induction), for held-out passages and for random tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pico_corpus
import torch
import torch.nn.functional as F
from tqdm import tqdm

from neuron_lens import Transformer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "model_defs" / "pico"
CONTEXT, STRIDE = 512, 256
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"


@torch.no_grad()
def model_loss(model: Transformer, stream: np.ndarray) -> float:
    """Nats per token; every token but the first few is predicted from at least 256 tokens of context."""
    starts = range(0, len(stream) - CONTEXT - 1, STRIDE)
    total, count = 0.0, 0
    for chunk in tqdm(
        np.array_split(np.array(starts), max(1, len(starts) // 16)), desc="held-out loss", unit="batch"
    ):
        ids = torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in chunk]).astype(np.int64))
        losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
        scored = losses[:, CONTEXT - STRIDE :]
        total, count = total + scored.sum().item(), count + scored.numel()
    return total / count


class Trigram:
    """Interpolated trigram model; weights by expectation-maximisation, one set for each size of the context's count."""

    def __init__(self, stream: np.ndarray, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        stream = stream.astype(np.int64)
        fit, tune = stream[: int(len(stream) * 0.95)], stream[int(len(stream) * 0.95) :]
        self.tables = [np.unique(self._keys(fit, order), return_counts=True) for order in (1, 2, 3)]
        self.total = len(fit)
        parts, bucket = self._parts(tune)
        self.weights = np.full((bucket.max() + 1, 4), 0.25)
        for _ in range(30):
            share = self.weights[bucket] * parts
            share /= share.sum(1, keepdims=True)
            for b in range(len(self.weights)):
                if (bucket == b).any():
                    self.weights[b] = share[bucket == b].mean(0)

    def _keys(self, stream: np.ndarray, order: int) -> np.ndarray:
        keys = np.zeros(len(stream) - order + 1, dtype=np.int64)
        for offset in range(order):
            keys = keys * self.vocabulary + stream[offset : len(stream) - order + 1 + offset]
        return keys

    def _count(self, keys: np.ndarray, order: int) -> np.ndarray:
        known, counts = self.tables[order - 1]
        at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        return np.where(known[at] == keys, counts[at], 0)

    def _parts(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of each token from the third on by four models [tokens, 4], and the context's bucket."""
        stream = stream.astype(np.int64)
        pairs, triples = self._keys(stream[:-1], 2), self._keys(stream, 3)
        context2 = self._count(pairs, 2)
        context1 = self._count(stream[1:-1], 1)
        uniform = np.full(len(triples), 1 / self.vocabulary)
        unigram = self._count(stream[2:], 1) / self.total
        bigram = self._count(self._keys(stream[1:], 2), 2) / np.maximum(context1, 1)
        trigram = self._count(triples, 3) / np.maximum(context2, 1)
        bucket = np.minimum(np.log2(context2 + 1).astype(int), 10)
        return np.stack([uniform, unigram, bigram, trigram], 1), bucket

    def loss(self, stream: np.ndarray) -> float:
        """Nats per token."""
        parts, bucket = self._parts(stream)
        bucket = np.minimum(bucket, len(self.weights) - 1)
        return float(-np.log((self.weights[bucket] * parts).sum(1)).mean())


@torch.no_grad()
def induction(model: Transformer, rows: torch.Tensor) -> tuple[float, float]:
    """Loss on the first and on the second copy of each row, nats per token. rows: [rows, length]"""
    length = rows.shape[1]
    begun = torch.cat((torch.full((len(rows), 1), model.config.d_vocab - 1), rows, rows), 1)
    losses = F.cross_entropy(model(begun[:, :-1]).transpose(1, 2), begun[:, 1:], reduction="none")
    # the first token of the second copy cannot be foreseen
    return losses[:, :length].mean().item(), losses[:, length + 1 :].mean().item()


def loss_curve_svg(rows: list[dict[str, float]]) -> str:
    """Held-out bits per byte over steps, as a small drawing."""
    steps, bits = [r["step"] for r in rows], [r["held_out_bits_per_byte"] for r in rows]
    low, high = min(bits), max(bits)
    points = " ".join(
        f"{40 + 340 * s / max(steps):.0f},{20 + 140 * (high - b) / (high - low):.0f}"
        for s, b in zip(steps, bits, strict=True)
    )
    text = 'font-family="sans-serif" font-size="11" fill="#555"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 190" role="img"><title>held-out bits per byte</title>'
        f'<polyline points="{points}" fill="none" stroke="#2563eb" stroke-width="2"/>'
        f'<text x="4" y="24" {text}>{high:.2f}</text><text x="4" y="164" {text}>{low:.2f}</text>'
        f'<text x="40" y="182" {text}>step 0</text><text x="380" y="182" text-anchor="end" {text}>{max(steps):,}</text></svg>\n'
    )


def main() -> None:
    model = Transformer.load("pico")
    training, held_out = pico_corpus.split()
    encoding = pico_corpus.load_encoding(FOLDER)
    train_stream = pico_corpus.token_stream([text for _, text in training], encoding)
    stream = pico_corpus.token_stream([text for _, text in held_out], encoding)
    bits = 1 / np.log(2) / (sum(len(text.encode()) for _, text in held_out) / len(stream))
    ours = model_loss(model, stream) * bits
    trigram = Trigram(train_stream, model.config.d_vocab).loss(stream) * bits

    draw = np.random.default_rng(0)
    starts = draw.integers(0, len(stream) - 128, 64)
    passages = torch.from_numpy(np.stack([stream[s : s + 128] for s in starts]).astype(np.int64))
    random = torch.from_numpy(draw.integers(0, model.config.d_vocab - 1, (64, 128)))
    lines = [
        "| held-out files | bits per byte |",
        "|---|---|",
        f"| pico | {ours:.3f} |",
        f"| interpolated trigram, same tokens | {trigram:.3f} |",
        "",
        "| 128 tokens, twice in a row | first copy | second copy | lower by |",
        "|---|---|---|---|",
    ]
    for name, rows in (("held-out passages", passages), ("random tokens", random)):
        first, second = induction(model, rows)
        lines.append(f"| {name} | {first:.2f} nats | {second:.2f} nats | {1 - second / first:.0%} |")
    table = "\n".join(lines)
    print(table)

    card = FOLDER / "README.md"
    before, rest = card.read_text().split(BEGIN)
    card.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")
    curve = ROOT / "runs" / "pico" / "loss.jsonl"
    if curve.exists():
        rows = [json.loads(line) for line in curve.read_text().splitlines()]
        (FOLDER / "loss_curve.svg").write_text(loss_curve_svg(rows))


if __name__ == "__main__":
    main()
