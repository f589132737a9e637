#!/usr/bin/env python3
"""Train `pico`, the small model that ships in model_defs/pico, on Python's standard library.

    python scripts/train_pico.py                 # a new run, or go on with an interrupted one
    python scripts/train_pico.py --export        # write model_defs/pico from the last checkpoint

Seeded and resumable: a checkpoint holds the weights, the optimisers and the step, and batches are drawn from
(seed, step), so that an interrupted run equals an uninterrupted one up to the rounding of parallel sums.

The hidden matrices are trained with Muon (Jordan et al., 2024), everything else with AdamW; the learning rate warms up,
stays until step 700, and falls linearly to zero. A few rows of each batch repeat a passage, or random
tokens, so that induction is worth learning on this small corpus; the model card says so.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import pico_corpus
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

from neuron_lens.transformer import Transformer, TransformerConfig

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "model_defs" / "pico"
CONTEXT, ROWS, WARMUP, STAY = 512, 12, 100, 700
IGNORED = -100


def pico_config() -> TransformerConfig:
    return TransformerConfig(
        name="pico",
        n_layers=6,
        d_model=192,
        n_heads=6,
        d_mlp=768,
        d_vocab=4096,
        n_ctx=CONTEXT,
        activation="gelu_tanh",
    )


def batch_at(step: int, seed: int, stream: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a step, [rows, context]. Row 0 of every batch repeats something."""
    draw = np.random.default_rng([seed, step])
    starts = draw.integers(0, len(stream) - CONTEXT - 1, ROWS)
    rows = np.stack([stream[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
    length = int(draw.integers(32, 256))
    shown = rows.copy()
    if step % 2:
        once = draw.integers(0, 4096, length)
        shown[0] = np.resize(once, CONTEXT + 1)
        rows[0] = shown[0]
        rows[0, : length + 1] = IGNORED  # nothing can be learned from the first copy of random tokens
    else:
        shown[0] = rows[0] = np.resize(rows[0, :length], CONTEXT + 1)
    return torch.from_numpy(shown[:, :-1]), torch.from_numpy(rows[:, 1:])


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: warm up, stay for a while, and fall linearly to nothing."""
    return min((step + 1) / WARMUP, 1.0, (steps - step) / (steps - STAY))


def make_optimisers(model: Transformer) -> list[torch.optim.Optimizer]:
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [
        torch.optim.Muon(hidden, lr=6e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def save_checkpoint(
    path: Path, model: Transformer, optimisers: list[torch.optim.Optimizer], step: int
) -> None:
    temporary = path.with_suffix(".tmp")
    states = [optimiser.state_dict() for optimiser in optimisers]
    torch.save({"model": model.state_dict(), "optimisers": states, "step": step}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def held_out_bits(model: Transformer, stream: np.ndarray, bytes_per_token: float, rows: int = 48) -> float:
    """Bits per byte on evenly spaced windows of the held-out stream."""
    starts = np.linspace(0, len(stream) - CONTEXT - 1, rows).astype(int)
    total = 0.0
    for chunk in np.array_split(starts, rows // 12):
        ids = torch.from_numpy(np.stack([stream[s : s + CONTEXT + 1] for s in chunk]).astype(np.int64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(ids[:, :-1])
        total += F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
    return total / (rows * CONTEXT) / np.log(2) / bytes_per_token


def train(work: Path, steps: int, seed: int) -> None:
    training, held_out = pico_corpus.split()
    if not (FOLDER / "tokenizer.tiktoken").exists():
        pico_corpus.train_tokenizer([text for _, text in training], 4096, FOLDER)
    encoding = pico_corpus.load_encoding(FOLDER)
    stream = pico_corpus.token_stream([text for _, text in training], encoding)
    held_stream = pico_corpus.token_stream([text for _, text in held_out], encoding)
    bytes_per_token = sum(len(text.encode()) for _, text in held_out) / len(held_stream)

    model = Transformer(pico_config(), seed=seed)
    for block in model.blocks:  # smaller writes at the start keep a deep stream calm (GPT-2)
        block.attn.out.weight.data /= (2 * model.config.n_layers) ** 0.5
        block.mlp.down.weight.data /= (2 * model.config.n_layers) ** 0.5
    optimisers = make_optimisers(model)
    peaks = [optimiser.param_groups[0]["lr"] for optimiser in optimisers]
    first, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimiser, state in zip(optimisers, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        first = saved["step"]

    curve, recent = work / "loss.jsonl", []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="training pico", unit="step")
    for step in bar:
        for optimiser, peak in zip(optimisers, peaks, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = peak * learning_rate(step, steps)
        inputs, targets = batch_at(step, seed, stream)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        recent.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            bits = held_out_bits(model, held_stream, bytes_per_token)
            row = {"step": step + 1, "training_loss": float(np.mean(recent)), "held_out_bits_per_byte": bits}
            row["time"] = round(time.time(), 1)
            with curve.open("a") as file:
                file.write(json.dumps(row) + "\n")
            bar.set_postfix(loss=f"{np.mean(recent):.3f}", held_out=f"{bits:.3f} bits/byte")
            recent.clear()
            save_checkpoint(checkpoint, model, optimisers, step + 1)


def export(work: Path) -> None:
    """Write the folder that ships, in the layout of a Hugging Face GPT-2 checkpoint, weights in float16."""
    saved = torch.load(work / "checkpoint.pt", weights_only=True)
    state = saved["model"]
    tensors = {"wte.weight": state["embed.weight"], "wpe.weight": state["pos_embed.weight"]}
    config = pico_config()
    for layer in range(config.n_layers):
        ours, theirs = f"blocks.{layer}.", f"h.{layer}."
        for part in ("weight", "bias"):
            tensors[f"{theirs}ln_1.{part}"] = state[f"{ours}ln_attn.{part}"]
            tensors[f"{theirs}ln_2.{part}"] = state[f"{ours}ln_mlp.{part}"]
            together = torch.cat([state[f"{ours}attn.{name}.{part}"] for name in "qkv"])
            tensors[f"{theirs}attn.c_attn.{part}"] = transposed(together)
            for source, name in (
                ("attn.out", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                tensors[f"{theirs}{name}.{part}"] = transposed(state[f"{ours}{source}.{part}"])
    tensors |= {f"ln_f.{part}": state[f"ln_f.{part}"] for part in ("weight", "bias")}
    half = {name: tensor.to(torch.float16).contiguous() for name, tensor in tensors.items()}
    save_file(half, FOLDER / "model.safetensors", metadata={"format": "pt"})
    (FOLDER / "model.safetensors").chmod(0o644)
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.n_ctx,
        "vocab_size": config.d_vocab,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True,
        "bos_token_id": 4095,
        "eos_token_id": 4095,
        "dtype": "float16",
    }
    (FOLDER / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    pico_corpus.write_sample(pico_corpus.split()[1], FOLDER / "sample" / "held_out.jsonl.gz", 700_000)
    print(f"wrote {FOLDER} from step {saved['step']}")


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Weights from [out, in] to GPT-2's [in, out]; biases as they are."""
    return tensor.T if tensor.dim() == 2 else tensor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "pico", help="folder of checkpoint and loss curve"
    )
    parser.add_argument(
        "--export", action="store_true", help="only write model_defs/pico from the last checkpoint"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if not arguments.export:
        train(arguments.work, arguments.steps, arguments.seed)
    export(arguments.work)


if __name__ == "__main__":
    main()
