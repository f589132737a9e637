"""What hooks cost: an empty tree against the same modules with every hook call deleted, and reading hooks everywhere.

All are measured in one process. The modules without hook calls are made from our own source: calls of hooks are replaced
by their first argument, and questions whether a site is hooked by `False`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, tokens_of, write_gpt2

TARGETS = {"hook calls deleted, GPT-2 small": "at most 1.01", "hook calls deleted, toy": "at most 1.05"}
TOY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 113, "n_positions": 128}
# sites that make the pass compute something it would not: copies for each head, each head's output
COSTLY = ("attn_in", "q_in", "k_in", "v_in", "result", "qk_softmax_denominator")


def cases(tiny: bool) -> list[Case]:
    """GPT-2 small at two shapes, and a toy in which arithmetic hides nothing."""
    if tiny:
        return [Case("tiny", {"model": TINY, "batch": 2, "pos": 8}, tolerance=1e-4)]
    return [
        Case("GPT-2 small 8 × 128", {"model": SMALL, "batch": 8, "pos": 128}, tolerance=1e-4),
        Case("GPT-2 small 1 × 64", {"model": SMALL, "batch": 1, "pos": 64}, tolerance=1e-4),
        Case("toy 8 × 32", {"model": TOY, "batch": 8, "pos": 32}, tolerance=1e-4),
        Case("toy 1 × 8", {"model": TOY, "batch": 1, "pos": 8}, tolerance=1e-4),
    ]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """All of them ours; the ratios say how much each of the others differs from an empty tree."""
    return [
        Peer("empty tree", _empty, process="ours"),
        Peer("hook calls deleted", _deleted, process="ours"),
        Peer(
            "reading hooks, fused attention",
            lambda case, folder: _reading(case, folder, fused=True),
            process="ours",
        ),
        Peer(
            "reading hooks on every site",
            lambda case, folder: _reading(case, folder, fused=False),
            process="ours",
        ),
    ]


def _tokens(case: Case) -> Any:
    return tokens_of(case.sizes["model"], case.sizes["batch"], case.sizes["pos"])


def _empty(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    from neuron_lens.hooks import TransformerHooks

    model, tokens, hooks = open_ours(folder), _tokens(case), TransformerHooks()
    return torch.no_grad()(lambda: model(tokens, hooks=hooks))


def _reading(case: Case, folder: Path, *, fused: bool) -> Callable[[], Any]:
    import torch

    from neuron_lens.hooks import TransformerHooks

    def read(x: Any) -> None:
        return None

    model, tokens, hooks = open_ours(folder), _tokens(case), TransformerHooks()
    absent = model.config.absent_sites()
    for site in hooks.sites():
        name = site.path.rpartition(".")[2]
        if site.path not in absent and name not in COSTLY and not (fused and name.startswith("qk_")):
            site.append_fwd(read)
    return torch.no_grad()(lambda: model(tokens, hooks=hooks))


def _deleted(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    ours = open_ours(folder)
    bare = _bare_package(folder).Transformer(ours.config, seed=None)
    bare.load_state_dict(ours.state_dict(), assign=True)
    if ours.config.tied:
        bare.unembed.weight = bare.embed.weight
    tokens = _tokens(case)
    return torch.no_grad()(lambda: bare(tokens))


def _bare_package(folder: Path) -> Any:
    """A copy of `neuron_lens.transformer` without hook calls, as a package of its own."""
    import neuron_lens.transformer as source

    target = folder / "bare_transformer"
    target.mkdir(exist_ok=True)
    deleted = 0
    for path in sorted(Path(source.__file__).parent.glob("*.py")):
        deleter = _DeleteHookCalls()
        tree = deleter.visit(ast.parse(path.read_text()))
        text = ast.unparse(ast.fix_missing_locations(tree)).replace(
            "neuron_lens.transformer", "bare_transformer"
        )
        (target / path.name).write_text(text)
        deleted += deleter.deleted
    if deleted < 25:
        raise RuntimeError(
            f"only {deleted} hook calls were found in the source: has the way they are written changed?"
        )
    sys.path.insert(0, str(folder))
    import bare_transformer  # type: ignore[import-not-found]

    return bare_transformer


class _DeleteHookCalls(ast.NodeTransformer):
    """`hooks.q(x, **context)` becomes `x`; `site.acts_at(layer)` and `site.has_any()` become False."""

    def __init__(self) -> None:
        self.deleted = 0

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute):
            return node
        if node.func.attr in ("acts_at", "has_any"):
            self.deleted += 1
            return ast.Constant(False)
        root: ast.expr = node.func
        while isinstance(root, ast.Attribute):
            root = root.value
        told = any(keyword.arg in (None, "run") for keyword in node.keywords)
        if isinstance(root, ast.Name) and root.id in ("hooks", "torso") and told and len(node.args) == 1:
            self.deleted += 1
            return node.args[0]
        return node
