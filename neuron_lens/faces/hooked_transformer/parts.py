"""Parts of the model called on their own, and parts that somebody replaced.

`model.ln_final(x)`, `block.mlp(x)`: the engine's part, with the hooks on its points. A module assigned to `block.mlp` or
`model.unembed` runs in the engine's place of that part; when it calls what it replaced, the engine's part runs with
the hooks of the pass it is in. The engine itself is not changed: a pass with replacements runs a shallow copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.names import PointPlace
from neuron_lens.faces.hooked_transformer.translate import Slot, hook_tree
from neuron_lens.hooks import Run, TransformerHooks
from neuron_lens.transformer import Transformer, TransformerConfig
from neuron_lens.transformer.frame import Frame

__all__ = [
    "attended",
    "block_of",
    "causal_mask",
    "embedded",
    "expert_of",
    "mlp_of",
    "normalised",
    "running_engine",
    "taken_over",
    "ungrouped",
]

# Of the pass that is running in this thread: what the replaced parts were, ready to be called with their input.
_REPLACED: ContextVar[Mapping[str, Callable[[Tensor], Tensor]]] = ContextVar("replaced", default={})  # noqa: B039
_Kind = TypeVar("_Kind", bound=nn.Module)


def taken_over(path: str) -> Callable[[Tensor], Tensor] | None:
    """The engine's part that a module replaces in the pass that is running; None outside such a pass."""
    return _REPLACED.get().get(path)


class _Replacement(nn.Module):
    """Runs a module of the user's where the engine calls one of its parts."""

    def __init__(self, path: str, original: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.held = (path, original, module)  # a tuple: the parameters stay where they are

    def forward(self, x: Tensor, *hooks: Any, **context: Any) -> Tensor:
        path, original, module = self.held
        before = _REPLACED.get()
        token = _REPLACED.set({**before, path: lambda y: original(y, *hooks, **context)})
        try:
            found: Tensor = module(x)
        finally:
            _REPLACED.reset(token)
        return found


class _ForEachHead(nn.Module):
    """A projection to shared heads, repeated for the heads that share them: keys and values without groups."""

    def __init__(self, original: nn.Linear, groups: int, d_head: int) -> None:
        super().__init__()
        self.held = (original,)
        self.groups, self.d_head = groups, d_head
        self.out_features = original.out_features * groups

    @property
    def weight(self) -> Tensor:
        """[head · d_head, d_model]"""
        return self._repeated(self.held[0].weight)

    @property
    def bias(self) -> Tensor | None:
        """[head · d_head]"""
        bias: Tensor | None = self.held[0].bias
        return None if bias is None else self._repeated(bias)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.d_head)).repeat_interleave(self.groups, 0).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] -> [batch, pos, head · d_head]"""
        shared: Tensor = self.held[0](x)
        return shared.unflatten(-1, (-1, self.d_head)).repeat_interleave(self.groups, -2).flatten(-2)


def ungrouped(engine: Transformer) -> Transformer:
    """The engine with keys and values for every head, where several heads share them; it shares every weight.

    Raises RequestError for norms of all shared heads together, which cannot be repeated.
    """
    config = engine.config
    if config.qk_norm in ("full", "per_head"):
        raise RequestError(f"keys are normalised by {config.qk_norm!r}, which ungrouping would change")
    clone, groups = _shallow(engine), config.n_heads // config.n_kv_heads
    clone.config = config.model_copy(update={"n_kv_heads": config.n_heads})
    clone.blocks = _shallow(engine.blocks)
    for layer, block in enumerate(engine.blocks):
        new: Any = _shallow(block)
        new.config = clone.config
        new.attn = _shallow(new.attn)
        new.attn.config = clone.config
        for name in ("k", "v"):
            new.attn._modules[name] = _ForEachHead(getattr(new.attn, name), groups, config.d_head)
        clone.blocks._modules[str(layer)] = new
    return clone


def running_engine(
    engine: Transformer, replaced: Mapping[str, nn.Module], config: TransformerConfig | None = None
) -> Transformer:
    """The engine with modules of the user's in place of some parts; it shares every weight.

    replaced: path of a part -> module. config: instead of the engine's.
    """
    clone = _shallow(engine)
    if config is not None:
        clone.config = config
    if any(path.startswith("blocks.") for path in replaced):
        clone.blocks = _shallow(engine.blocks)
    for path, module in replaced.items():
        original = engine.get_submodule(path)
        owner: nn.Module = clone
        if path.startswith("blocks."):
            _, layer, _ = path.split(".")
            owner = clone.blocks._modules[layer] = _shallow(engine.blocks[int(layer)])
        owner._modules[path.rpartition(".")[2]] = _Replacement(path, original, module)
    return clone


def _shallow(module: _Kind) -> _Kind:
    """A module with the same contents, whose parts can be exchanged without touching the original."""
    clone: _Kind = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(module._modules)
    return clone


def embedded(engine: Transformer, tokens: Tensor) -> Tensor:
    """Token embeddings as they enter the stream, [batch, pos, d_model]"""
    x: Tensor = engine.embed(tokens)
    x = x if engine.config.embedding_scale == 1.0 else x * engine.config.embedding_scale
    return x if engine.embed_norm is None else engine.embed_norm(x)


def normalised(
    engine: Transformer, path: str, places: Mapping[str, PointPlace], slots: Sequence[Slot], x: Tensor
) -> Tensor:
    """x through one norm, with the hooks on its points."""
    norm = engine.get_submodule(path)
    tree = hook_tree(slots)
    if tree is None:
        plain: Tensor = norm(x)
        return plain
    place = next(iter(places.values()))
    hooks = attrgetter(place.site.rpartition(".")[0])(tree)
    found: Tensor = norm(x, hooks, layer=place.layer, run=_run(engine, x))
    return found


def mlp_of(engine: Transformer, path: str, slots: Sequence[Slot], x: Tensor) -> Tensor:
    """What one MLP gives, with the hooks on its points. [batch, pos, d_model]"""
    _check_stream(engine, x)
    tree = hook_tree(slots) or TransformerHooks()
    layer = int(path.split(".")[1])
    found: Tensor = engine.get_submodule(path)(x, tree.mlp, layer=layer, run=_run(engine, x))
    return found


def expert_of(engine: Transformer, path: str, number: int, slots: Sequence[Slot], x: Tensor) -> Tensor:
    """What one expert makes of tokens [token, d_model], with the hooks on its points."""
    if x.dim() != 2 or x.shape[-1] != engine.config.d_model:
        raise RequestError(f"an expert reads tokens [token, {engine.config.d_model}]; got {list(x.shape)}")
    tree = hook_tree(slots) or TransformerHooks()
    experts: Any = engine.get_submodule(path)
    found: Tensor = experts.output_of(number, x, tree.mlp, layer=int(path.split(".")[1]))
    return found


def attended(
    engine: Transformer, layer: int, slots: Sequence[Slot], inputs: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """What one layer's attention adds, with the hooks on its points. [batch, pos, d_model]"""
    tree, run = hook_tree(slots) or TransformerHooks(), _run(engine, inputs[0])
    frame = Frame.make(engine.config, run, None, inputs[0].device, engine.embed.weight.dtype)
    block: Any = engine.blocks[layer]
    found: Tensor = block.attn(*inputs, tree.attn, frame, layer=layer, run=run)
    return found


def block_of(
    engine: Transformer, path: str, slots: Sequence[Slot], replaced: Mapping[str, nn.Module], x: Tensor
) -> Tensor:
    """The stream behind one block, with the hooks on its points. [batch, pos, d_model]"""
    _check_stream(engine, x)
    run = _run(engine, x)
    frame = Frame.make(engine.config, run, None, x.device, engine.embed.weight.dtype)
    engine = running_engine(engine, replaced) if replaced else engine
    tree = hook_tree(slots) or TransformerHooks()
    found: Tensor = engine.get_submodule(path)(x, tree, frame, layer=int(path.split(".")[1]), run=run)
    return found


def _check_stream(engine: Transformer, x: Tensor) -> None:
    if x.dim() != 3 or x.shape[-1] != engine.config.d_model:
        raise RequestError(f"expected a stream [batch, pos, {engine.config.d_model}]; got {list(x.shape)}")


def _run(engine: Transformer, x: Tensor) -> Run:
    return Run(x.shape[0], x.shape[1] if x.dim() > 2 else 1, config=engine.config)


@lru_cache(maxsize=4)
def causal_mask(n_ctx: int, window: int | None) -> Tensor:
    """[n_ctx, n_ctx] bool: query may look at key."""
    mask = torch.ones(n_ctx, n_ctx, dtype=torch.bool).tril()
    return mask if window is None else mask.triu(1 - window)
