"""One forward pass without hooks, against transformers with fused attention and against the matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformers, tokens_of, write_gpt2

TARGETS = {"transformers": "at most 1.0"}


def cases(tiny: bool) -> list[Case]:
    """Shapes [batch, pos]."""
    model, shapes = (TINY, [(2, 8)]) if tiny else (SMALL, [(8, 128), (1, 512)])
    return [Case(f"{b} × {p}", {"model": model, "batch": b, "pos": p}, tolerance=1e-4) for b, p in shapes]


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
    return torch.no_grad()(lambda: model(tokens))


def _transformers(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, tokens = open_transformers(folder), _tokens(case)
    return torch.no_grad()(lambda: model(tokens, use_cache=False).logits)


def _products(case: Case, folder: Path) -> Callable[[], Any]:
    """Every matrix product of the pass, with biases, and nothing else: no attention, no norms."""
    import torch

    model = open_ours(folder)
    x = model.embed(_tokens(case)).detach()
    wide = x.repeat(1, 1, 4)

    def run() -> Any:
        for block in model.blocks:
            for linear in (block.attn.q, block.attn.k, block.attn.v, block.attn.out, block.mlp.up):
                linear(x)
            block.mlp.down(wide)
        return model.unembed(x)

    return torch.no_grad()(run)
