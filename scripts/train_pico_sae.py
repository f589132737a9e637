#!/usr/bin/env python3
"""Train the small autoencoder that ships with pico, for its residual stream after the middle layer.

    python scripts/train_pico_sae.py             # a new run, or go on with an interrupted one
    python scripts/train_pico_sae.py --evaluate  # only evaluate what ships, and write the card

Trained on the files pico was trained on (scripts/pico_corpus.py), evaluated on those held out. Seeded and
resumable. Writes model_defs/pico/sae (a SAELens folder, float16) and the section "Autoencoder" of the model card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pico_corpus
import torch

from neuron_lens import Transformer
from neuron_lens.autoencoder_training import (
    Evaluation,
    TrainingSettings,
    evaluate_autoencoder,
    train_autoencoder,
)
from neuron_lens.autoencoders import load_autoencoder, save_saelens
from neuron_lens.files.atomic import write_json_atomic, write_text_atomic
from neuron_lens.harvest.corpus import Corpus, Document

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "model_defs" / "pico"
SHIPPED = FOLDER / "sae"
BEGIN, END = "<!-- sae -->", "<!-- /sae -->"
EVALUATED_TOKENS = 20_000

SETTINGS = TrainingSettings(
    site="resid.torso.post_mlp",
    layer=2,
    d_latent=2048,
    activation="topk",
    k=24,
    n_tokens=900 * 1024,
    batch_tokens=1024,
    buffer_tokens=65_536,
    learning_rate=1e-3,
    decay=0.3,
    dead_after=100_000,
    seed=0,
)


def corpora() -> tuple[Corpus, Corpus]:
    """Training and held-out text."""
    parts = zip(("training files", "held-out files"), pico_corpus.split(), strict=True)
    training, held_out = (
        Corpus.of_documents([Document(path, text) for path, text in documents], name)
        for name, documents in parts
    )
    return training, held_out


def card(evaluation: Evaluation, settings: TrainingSettings) -> str:
    """The section of the model card."""
    e = evaluation
    return f"""{BEGIN}

## Autoencoder

`sae/` holds a top-k sparse autoencoder for the residual stream after layer {settings.layer}
(`{settings.site}`): 192 → {e.d_latent:,} latents, k = {settings.k}, in SAELens' format and float16.
Trained by `scripts/train_pico_sae.py` on {settings.n_tokens / 1e6:.1f} million tokens of the files that
pico was trained on, seed {settings.seed}.

On {e.n_tokens:,} tokens of held-out files:

| | |
|---|---|
| variance explained | {e.variance_explained:.3f} |
| active latents per token (L0) | {e.l0:.1f} |
| loss, nats per token: intact | {e.loss_intact:.3f} |
| … reconstruction in place of the stream | {e.loss_spliced:.3f} |
| … mean activation in place of the stream | {e.loss_mean:.3f} |
| … zeros in place of the stream | {e.loss_zero:.3f} |
| loss recovered, against the mean | {_share(e.loss_recovered_mean)} |
| loss recovered, against zeros | {_share(e.loss_recovered_zero)} |
| latents that never fired there | {e.never_fired} of {e.d_latent} |
| latents that fire on more than one token in ten | {e.dense} |
| absorption, mean of {len(e.absorption)} classes of tokens | {_share(e.absorption_rate)} |
| latents that absorb tokens of these classes | {e.absorbing_latents} |

{END}
"""


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_card(section: str) -> None:
    """Put the section into the card, in place of an older one."""
    path = FOLDER / "README.md"
    text = path.read_text()
    if BEGIN in text and END in text:
        before, after = text[: text.index(BEGIN)], text[text.index(END) + len(END) :]
        text = before + section.strip() + after
    else:
        text = text.rstrip() + "\n\n" + section
    write_text_atomic(path, text.rstrip() + "\n")


def evaluate(model: Transformer, held_out: Corpus, seed: int) -> Evaluation:
    """Figures of what ships, as it is loaded."""
    autoencoder = load_autoencoder(SHIPPED, dtype=torch.float32)
    return evaluate_autoencoder(
        model, autoencoder, held_out, split="all", max_tokens=EVALUATED_TOKENS, seed=seed
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "pico_sae", help="folder of the checkpoint"
    )
    parser.add_argument("--tokens", type=int, default=SETTINGS.n_tokens, help="training tokens")
    parser.add_argument("--layer", type=int, default=SETTINGS.layer, help="layer of the stream, from 0")
    parser.add_argument("--evaluate", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    model = Transformer.load(str(FOLDER)).eval()
    training, held_out = corpora()
    settings = TrainingSettings(
        **{**SETTINGS.model_dump(), "n_tokens": arguments.tokens, "layer": arguments.layer}
    )
    if not arguments.evaluate:
        trained = train_autoencoder(model, training, settings, arguments.work)
        save_saelens(trained.to(torch.float16), SHIPPED)
        for file in SHIPPED.iterdir():
            file.chmod(0o644)
    evaluation = evaluate(model, held_out, settings.seed)
    write_json_atomic(SHIPPED / "evaluation.json", json.loads(evaluation.model_dump_json()))
    write_card(card(evaluation, settings))
    print(card(evaluation, settings))


if __name__ == "__main__":
    main()
