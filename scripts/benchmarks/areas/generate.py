"""Greedy generation with a key-value cache, against transformers and against the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformers, tokens_of, write_gpt2

TARGETS = {"transformers": "at most 0.9"}


def cases(tiny: bool) -> list[Case]:
    """Batches; `new` tokens are generated from `pos`."""
    model, pos, new = (TINY, 6, 4) if tiny else (SMALL, 64, 32)
    sizes = {"model": model, "pos": pos, "new": new}
    return [Case(f"{new} tokens from {pos}, batch {batch}", {**sizes, "batch": batch}) for batch in (1, 4)]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours, transformers, and the floor below both."""
    return [
        Peer("neuron_lens", _ours),
        Peer("transformers", _transformers, environment="transformers"),
        Peer("matrix products alone", _products, checked=False),
    ]


def _tokens(case: Case) -> Any:
    return tokens_of(case.sizes["model"], case.sizes["batch"], case.sizes["pos"])


def _ours(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, tokens = open_ours(folder), _tokens(case)

    def run() -> Any:
        return torch.tensor(
            [r.ids for r in model.sample(tokens, temperature=0, max_new_tokens=case.sizes["new"])]
        )

    return run


def _transformers(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, tokens, new = open_transformers(folder), _tokens(case), case.sizes["new"]
    mask = torch.ones_like(tokens)
    model.generation_config.pad_token_id = 0

    def run() -> Any:
        return model.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False)[
            :, tokens.shape[1] :
        ]

    return torch.no_grad()(run)


def _products(case: Case, folder: Path) -> Callable[[], Any]:
    """Every matrix product with a weight, of the prompt's pass and of each new token's; unembedding last columns only."""
    import torch

    model = open_ours(folder)
    prompt = model.embed(_tokens(case)).detach()

    def run() -> Any:
        for step in range(case.sizes["new"]):
            x = prompt if step == 0 else prompt[:, :1]
            wide = x.repeat(1, 1, 4)
            for block in model.blocks:
                for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.out, block.mlp.up):
                    linear(x)
                block.mlp.down(wide)
            model.unembed(x[:, -1:])

    return torch.no_grad()(run)
