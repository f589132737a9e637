"""Sweeps of patches: cells a second against a forward pass for each cell, ours and others'.

A loop over all cells takes many minutes, so loops run only the share of the cells that a case's name says, spread over
all axes; ours sweeps the whole grid, and the values of those cells are compared. The ratio for the whole grid is the
printed one times that share. Of the 64 positions of the heads' grid every 8th is swept, 3 to 59: its cells cost what
those of the whole grid cost (33 columns each, against 32.5), and 1,152 of them take seconds, where 9,216 take minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import (
    SMALL,
    TINY,
    open_ours,
    open_transformer_lens,
    open_transformers,
    tokens_of,
    write_gpt2,
)

TARGETS = {
    "transformers, loop (stream)": "at most 0.15, printed 2.4",
    "transformer-lens 3.9.0 (stream)": "at most 0.06, printed 0.96",
    "our own loop (heads)": "at most 0.10, printed 7.2",
}
BUDGET = 1 << 30


def cases(tiny: bool) -> list[Case]:
    """The stream at 12 layers × 16 positions; heads at 12 × 12 × 64."""
    if tiny:
        sizes = {"model": TINY, "pos": 6, "positions": range(6), "site": "stream", "every": 3}
        return [Case("tiny, loops 1/4 of the cells", sizes, tolerance=1e-3)]
    return [
        Case(
            "stream 12 × 16, loops 1/16 of the cells",
            {"model": SMALL, "pos": 16, "positions": range(16), "site": "stream", "every": 16},
            tolerance=1e-3,
        ),
        Case(
            "heads 12 × 12 × 64, every 8th position, loops 1/72 of the cells",
            {"model": SMALL, "pos": 64, "positions": range(3, 64, 8), "site": "heads", "every": 72},
            tolerance=1e-3,
        ),
    ]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours sweeps the whole grid; loops run a sample of it."""
    return [
        Peer("sweep", _sweep, process="ours"),
        Peer("our own loop", _own_loop, process="ours"),
        Peer("transformers, loop", _transformers, environment="transformers"),
        Peer("transformer-lens 3.9.0", _transformer_lens, environment="transformer-lens"),
    ]


def _prompts(case: Case) -> tuple[Any, Any]:
    both = tokens_of(case.sizes["model"], 2, case.sizes["pos"])
    return both[:1], both[1:]


def _places(case: Case) -> list[tuple[int, ...]]:
    """All cells in order: (layer, position), or (layer, position, head)."""
    model, columns = case.sizes["model"], case.sizes["positions"]
    places: list[tuple[int, ...]] = [(layer, p) for layer in range(model["n_layer"]) for p in columns]
    if case.sizes["site"] == "heads":
        places = [(*place, head) for place in places for head in range(model["n_head"])]
    return places


def _sample(case: Case) -> list[tuple[int, ...]]:
    # a step that shares no factor with the axes, so that layers, positions and heads are all met
    return _places(case)[:: case.sizes["every"] + 1]


def _sweep(case: Case, folder: Path) -> Callable[[], Any]:
    from neuron_lens.interventions import LogitDifference, capture, grid, sweep

    model = open_ours(folder)
    tokens, clean = _prompts(case)
    heads = case.sizes["site"] == "heads"
    site = "attn.v_out" if heads else "resid.torso.pre_attn"
    places: dict[str, Any] = {"layers": range(model.config.n_layers), "positions": case.sizes["positions"]}
    if heads:
        places["heads"] = range(model.config.n_heads)
    cells = grid(site, patch_from=capture(model, clean, site), **places)
    metric = LogitDifference(7, 9)
    index = [_places(case).index(place) for place in _sample(case)]

    def run() -> Any:
        return sweep(model, tokens, cells, metric, memory_budget=BUDGET).values().flatten()[index]

    return run


def _repeated(case: Case, one: Callable[[tuple[int, ...]], Any]) -> Callable[[], Any]:
    """The cells of the sample, one after another."""
    import torch

    return lambda: torch.stack([one(place) for place in _sample(case)])


def _own_loop(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    from neuron_lens.interventions import Patch, capture, to_hooks

    model = open_ours(folder)
    tokens, clean = _prompts(case)
    site = "attn.v_out" if case.sizes["site"] == "heads" else "resid.torso.pre_attn"
    source = capture(model, clean, site)

    def one(place: tuple[int, ...]) -> Any:
        patch = Patch(site=site, layers=place[0], positions=place[1], heads=place[2:] or None, source=source)
        logits = model(tokens, hooks=to_hooks(patch, model))
        return logits[0, -1, 7] - logits[0, -1, 9]

    return torch.no_grad()(_repeated(case, one))


def _transformers(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model = open_transformers(folder)
    tokens, clean = _prompts(case)
    heads = case.sizes["site"] == "heads"
    blocks = model.transformer.h
    kept: dict[int, Any] = {}

    def target(layer: int) -> Any:
        return blocks[layer].attn.c_proj if heads else blocks[layer]

    def keeps(layer: int) -> Callable[..., None]:
        return lambda module, inputs: kept.__setitem__(layer, inputs[0].clone())

    handles = [target(layer).register_forward_pre_hook(keeps(layer)) for layer in range(len(blocks))]
    with torch.no_grad():
        model(clean)
    for handle in handles:
        handle.remove()
    width = case.sizes["model"]["n_embd"] // case.sizes["model"]["n_head"]

    def one(place: tuple[int, ...]) -> Any:
        units = slice(place[2] * width, (place[2] + 1) * width) if heads else slice(None)

        def put(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x = inputs[0].clone()
            x[:, place[1], units] = kept[place[0]][:, place[1], units]
            return (x, *inputs[1:])

        handle = target(place[0]).register_forward_pre_hook(put)
        logits = model(tokens).logits
        handle.remove()
        return logits[0, -1, 7] - logits[0, -1, 9]

    return torch.no_grad()(_repeated(case, one))


def _transformer_lens(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    sizes = case.sizes["model"]
    model = open_transformer_lens(folder)
    tokens, clean = _prompts(case)
    heads = case.sizes["site"] == "heads"
    names = [f"blocks.{i}.{'attn.hook_z' if heads else 'hook_resid_pre'}" for i in range(sizes["n_layer"])]
    _, cache = model.run_with_cache(clean, names_filter=names)

    def one(place: tuple[int, ...]) -> Any:
        def put(x: Any, hook: Any) -> Any:
            at = (slice(None), *place[1:])
            x[at] = cache[hook.name][at]
            return x

        logits = model.run_with_hooks(tokens, fwd_hooks=[(names[place[0]], put)])
        return logits[0, -1, 7] - logits[0, -1, 9]

    return torch.no_grad()(_repeated(case, one))
