"""HookedTransformer: forward, everything cached, the residual stream cached, greedy generation, against transformer-lens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformer_lens, tokens_of, write_gpt2

TARGETS = {
    "engine": "forward at most 1.05",
    "transformer-lens, everything": "at most 0.6 at 1 x 512, 0.8 at 8 x 128; peak memory at most 0.8",
    "transformer-lens, residual stream": "at most 0.75 at 1 x 512, 0.9 at 8 x 128",
    "transformer-lens, generation": "at most 0.25 at batch 1",
}

MEASURES_MEMORY = True


def cases(tiny: bool) -> list[Case]:
    """What is done, at two shapes."""
    model, shapes = (TINY, [(2, 8), (1, 16)]) if tiny else (SMALL, [(8, 128), (1, 512)])
    found = []
    for batch, pos in shapes:
        sizes = {"model": model, "batch": batch, "pos": pos}
        for what in ("forward", "everything", "residual stream"):
            found.append(Case(f"{what} {batch} x {pos}", {**sizes, "what": what}, tolerance=1e-3))
    new = 4 if tiny else 32
    found.append(Case("generation", {"model": model, "batch": 1, "pos": 8, "new": new, "what": "generation"}))
    return found


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours, the engine without the face, and the original."""
    return [
        Peer("neuron_lens", _ours),
        Peer("engine", _engine, process="neuron_lens", checked=False),
        Peer("transformer-lens", _theirs, environment="transformer-lens"),
    ]


def _ours(case: Case, folder: Path) -> Callable[[], Any]:
    from neuron_lens.faces.hooked_transformer import HookedTransformer

    return _measured(HookedTransformer.from_engine(open_ours(folder)), case)


def _engine(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, tokens = open_ours(folder), _tokens(case)
    return torch.no_grad()(lambda: model(tokens))


def _theirs(case: Case, folder: Path) -> Callable[[], Any]:
    return _measured(open_transformer_lens(folder), case)


def _tokens(case: Case) -> Any:
    return tokens_of(case.sizes["model"], case.sizes["batch"], case.sizes["pos"])


def _measured(model: Any, case: Case) -> Callable[[], Any]:
    """The same calls for both: theirs is the interface."""
    import torch

    tokens, what = _tokens(case), case.sizes["what"]
    if what == "forward":
        return torch.no_grad()(lambda: model(tokens))
    if what == "everything":
        return torch.no_grad()(lambda: model.run_with_cache(tokens)[0])
    if what == "residual stream":
        wanted = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
        return torch.no_grad()(lambda: model.run_with_cache(tokens, names_filter=wanted)[0])
    options = {
        "max_new_tokens": case.sizes["new"],
        "do_sample": False,
        "stop_at_eos": False,
        "verbose": False,
    }

    def generate() -> Any:
        # what is generated is not compared: cached and without a tokenizer, the original's later positions are wrong
        return torch.tensor(model.generate(tokens, **options).shape)

    return torch.no_grad()(generate)
