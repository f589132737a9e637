"""Edge attribution over all edges: against a forward and a backward pass alone, and written out over TransformerLens's hooks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformer_lens, tokens_of, write_gpt2

TARGETS = {"edge attribution": "time and peak memory are reported"}
MEASURES_MEMORY = True


def cases(tiny: bool) -> list[Case]:
    """One pair of prompts."""
    if tiny:
        return [Case("tiny", {"model": TINY, "batch": 2, "pos": 6}, tolerance=1e-3)]
    sizes = {"model": SMALL, "batch": 1, "pos": 16}
    return [Case("GPT-2 small, all 32,491 edges, 16 tokens", sizes, tolerance=1e-3)]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours and its integrated form; the passes it cannot do without; the same scores by TransformerLens's hooks."""
    return [
        Peer("edge attribution", lambda case, folder: _ours(case, folder, "gradient")),
        Peer("three forwards and a backward", _passes_alone, process="edge attribution", checked=False),
        Peer(
            "integrated, 5 steps",
            lambda case, folder: _ours(case, folder, "integrated_inputs"),
            process="edge attribution",
            checked=False,
        ),
        Peer("transformer-lens 3.9.0, its hooks", _transformer_lens, environment="transformer-lens"),
    ]


def _prompts(case: Case) -> tuple[Any, Any]:
    batch = case.sizes["batch"]
    both = tokens_of(case.sizes["model"], 2 * batch, case.sizes["pos"])
    return both[:batch], both[batch:]


def _metric(logits: Any) -> Any:
    return logits[:, -1, 7] - logits[:, -1, 9]


def _ours(case: Case, folder: Path, method: Any) -> Callable[[], Any]:
    from neuron_lens.interventions import Ablation, OfLogits, attribute_edges

    model = open_ours(folder).requires_grad_(False)
    tokens, others = _prompts(case)
    metric, ablation = OfLogits(_metric, columns=-1), Ablation("patch", others)
    return lambda: attribute_edges(model, tokens, ablation, metric, method=method, steps=5).scores


def _passes_alone(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    from neuron_lens.hooks import TransformerHooks

    model = open_ours(folder).requires_grad_(False)
    tokens, others = _prompts(case)

    def traced(x: Any) -> Any:
        return x.requires_grad_()

    hooks = TransformerHooks().append_to_path("resid.post_emb.fwd", traced)

    def run() -> Any:
        with torch.no_grad():
            model(others, logits_at=-1)
            model(tokens, logits_at=-1)
        _metric(model(tokens, hooks=hooks, logits_at=-1)).sum().backward()

    return run


def _transformer_lens(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    sizes = case.sizes["model"]
    model = open_transformer_lens(folder)
    model.requires_grad_(False)
    model.set_use_split_qkv_input(True)
    model.set_use_attn_result(True)
    model.set_use_hook_mlp_in(True)
    tokens, others = _prompts(case)
    layers = range(sizes["n_layer"])
    last = f"blocks.{sizes['n_layer'] - 1}.hook_resid_post"
    written = ["hook_embed", "hook_pos_embed"]
    written += [f"blocks.{i}.{name}" for i in layers for name in ("attn.hook_result", "hook_mlp_out")]
    per_head = ("hook_q_input", "hook_k_input", "hook_v_input")
    read = [f"blocks.{i}.{name}" for i in layers for name in (*per_head, "hook_mlp_in")] + [last]

    def senders(kept: dict[str, Any]) -> Any:
        rows = [(kept["hook_embed"] + kept["hook_pos_embed"])[None]]
        for i in layers:
            rows += [
                kept[f"blocks.{i}.attn.hook_result"].movedim(2, 0),
                kept[f"blocks.{i}.hook_mlp_out"][None],
            ]
        return torch.cat(rows)

    def run() -> Any:
        kept: dict[str, Any] = {}
        gradients: dict[str, Any] = {}

        def keep(x: Any, hook: Any) -> None:
            kept[hook.name] = x.detach()

        def keep_gradient(gradient: Any, hook: Any) -> None:
            gradients[hook.name] = gradient

        with torch.no_grad():
            model.run_with_hooks(others, fwd_hooks=[(name, keep) for name in written])
        corrupted = senders(kept)

        def traced(x: Any, hook: Any) -> Any:
            return x.requires_grad_()

        forward = [("hook_embed", traced), *((name, keep) for name in written)]
        with model.hooks(forward, [(name, keep_gradient) for name in read]):
            _metric(model(tokens)).sum().backward()
        rows = []
        for i in layers:
            rows += [gradients[f"blocks.{i}.{name}"].movedim(2, 0) for name in per_head]
            rows.append(gradients[f"blocks.{i}.hook_mlp_in"][None])
        rows.append(gradients[last][None])
        difference = corrupted - senders(kept)
        scores = difference.flatten(1) @ torch.cat(rows).flatten(1).T / len(tokens)
        return scores * _possible(sizes["n_layer"], sizes["n_head"])

    return run


def _possible(n_layers: int, n_heads: int) -> Any:
    """Which senders have written when each receiver reads."""
    import torch

    before = []
    for layer in range(n_layers):
        start = 1 + layer * (n_heads + 1)
        before += [start] * (3 * n_heads) + [start + n_heads]
    before.append(1 + n_layers * (n_heads + 1))
    return torch.arange(before[-1])[:, None] < torch.tensor(before)
