"""Chains of callables, and the contract of a hook.

A hook is any callable `hook(x, **context) -> Tensor | None`; `None` means unchanged. It names the context it
wants (`def f(x)`, `def f(x, layer)`, `def f(x, layer, **_)`); its signature is read once, when it is appended.
A chain (`Hooks`) calls its hooks in order, each on the result of the one before. Nothing here knows a model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.shapes import Axis

__all__ = ["ConditionalHooks", "Handle", "Hook", "Hooks", "Site", "SiteAware", "WrapperHooks"]

Hook = Callable[..., Any]


class Site(NamedTuple):
    """Where a hook runs: the path of its site and the meaning of the tensor's axes (None when unknown)."""

    path: str
    axes: tuple[Axis, ...] | None

    def dim(self, axis: Axis) -> int:
        """The tensor dimension of an axis. Raises HookError when the site has none of that name."""
        if self.axes is None:
            raise HookError(
                f"{self.path or 'a hook outside a tree'}: which dimension is {axis!r} is not known here; "
                f"append it to a site of TransformerHooks, or pass axes= to FwdBwdHooks"
            )
        if axis not in self.axes:
            raise HookError(f"{self.path} has no axis {axis!r}: its axes are [{', '.join(self.axes)}]")
        return self.axes.index(axis)


NOWHERE = Site("", None)


@dataclass(eq=False)
class Handle:
    """One appended hook, to be handed to `remove`."""

    chain: Hooks
    entry: _Entry

    def remove(self) -> None:
        """Take the hook out of its chain. Raises HookError when it is gone already."""
        self.chain.remove(self)


class SiteAware:
    """Base of hooks that are told the site they run at: chains, combinators, wrapped gradient hooks."""

    def is_empty(self) -> bool:
        """True when calling this can do nothing."""
        raise NotImplementedError

    def acts_at(self, layer: int | None) -> bool:
        """True when something here may run at this layer (None: at any layer)."""
        raise NotImplementedError

    def layers_named(self) -> set[int]:
        """Layers that conditions in here name, so that a model can refuse those it does not have."""
        raise NotImplementedError

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        raise NotImplementedError

    def tree_lines(self, indent: int = 0) -> list[str]:
        """This hook as indented lines of text."""
        raise NotImplementedError


class _Entry:
    """A callable and the context names it wants (None: all of them)."""

    __slots__ = ("fn", "required", "wants")

    def __init__(self, fn: Hook | SiteAware) -> None:
        self.fn: Any = fn
        self.wants, self.required = (None, ()) if isinstance(fn, SiteAware) else wanted_context(fn)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Entry) and bool(self.fn == other.fn)

    __hash__ = None  # type: ignore[assignment]


def wanted_context(fn: Hook) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Context names a callable accepts after its first argument (None: any), and those it cannot do without."""
    if not callable(fn):
        raise HookError(
            f"a hook must be callable as hook(x, **context); got {fn!r} of type {type(fn).__name__}"
        )
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (
        TypeError,
        ValueError,
    ):  # builtins such as torch.relu have no signature: give them the tensor alone
        return (), ()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        wants = None
    else:
        wants = tuple(p.name for p in parameters[1:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    if not parameters or parameters[0].kind in (
        inspect.Parameter.KEYWORD_ONLY,
        inspect.Parameter.VAR_KEYWORD,
    ):
        raise HookError(f"hook {describe(fn)} takes no tensor: it must be callable as hook(x, **context)")
    required = tuple(
        p.name
        for p in parameters[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    )
    return wants, required


def call_with_context(fn: Hook, wants: tuple[str, ...] | None, x: Any, context: dict[str, Any]) -> Any:
    """Call a hook with the part of the context it names."""
    if wants is None:
        return fn(x, **context)
    return fn(x, **{name: context[name] for name in wants if name in context})


def describe(fn: Any) -> str:
    """A hook's name for messages and printouts."""
    named = "__name__" if inspect.isbuiltin(fn) else "__qualname__"
    return getattr(fn, named, None) or getattr(fn, "name", None) or repr(fn)


def check_result(x: Tensor, y: Any, fn: Hook, context: dict[str, Any], site: Site) -> Tensor:
    """`y`, if it may replace `x` at this site; else HookError naming path, layer, hook, and both tensors."""
    if isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype and y.device == x.device:
        return y
    where = site.path or "(a chain outside a tree)"
    if "layer" in context:
        where += f", layer {context['layer']}"
    got = f"{_looks(y)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    axes = f" = [{', '.join(site.axes)}]" if site.axes else ""
    raise HookError(
        f"{where}: hook {describe(fn)} returned {got}, expected {_looks(x)}{axes}; "
        f"return a tensor like the one given, or None to leave it unchanged"
    )


def _looks(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


class Hooks(SiteAware):
    """A callable sequence of hooks: `chain(x, **context)` runs each on the result of the one before.

    Chains nest: a chain is itself a hook. Compared by content; the hooks themselves are never copied.
    """

    def __init__(self, hooks: Iterable[Hook] = (), *, name: str = "hooks") -> None:
        self._name = name
        self._hooks: list[_Entry] = []
        self._bound: dict[str, Any] = {}
        self._site = NOWHERE
        for hook in hooks:
            self.append(hook)

    @property
    def name(self) -> str:
        """What this chain is called in messages and printouts."""
        return self._name

    @overload
    def append(self, hook: Hook, *, handle: Literal[False] = False) -> Self: ...

    @overload
    def append(self, hook: Hook, *, handle: Literal[True]) -> Handle: ...

    def append(self, hook: Hook, *, handle: bool = False) -> Self | Handle:
        """Add a hook at the end. Returns self, or with `handle=True` the handle that `remove` takes.

        Raises HookError when `hook` is not callable with a tensor.
        """
        entry = _Entry(self._wrap(hook))
        self._hooks.append(entry)
        return Handle(self, entry) if handle else self

    def _wrap(self, hook: Hook) -> Hook:
        return hook

    def remove(self, handle: Handle) -> None:
        """Take out the one hook that `handle` stands for. Raises HookError when it is not here."""
        for index, entry in enumerate(self._hooks):
            if entry is handle.entry:
                del self._hooks[index]
                return
        raise HookError(f"{self.name}: hook {describe(handle.entry.fn)} is not here; was it removed before?")

    def bind(self, **kwargs: Any) -> Self:
        """Add names to the context of every hook in this chain. Raises HookError for a name bound already."""
        for key in kwargs:
            if key in self._bound:
                raise HookError(
                    f"{self.name}: {key!r} is bound already (to {self._bound[key]!r}); unbind it first"
                )
        self._bound.update(kwargs)
        return self

    def unbind(self, keys: Iterable[str]) -> Self:
        """Take bound names away. Raises HookError for a name that is not bound."""
        for key in [keys] if isinstance(keys, str) else keys:
            if key not in self._bound:
                raise HookError(
                    f"{self.name}: {key!r} is not bound; bound: {sorted(self._bound) or 'nothing'}"
                )
            del self._bound[key]
        return self

    def is_empty(self) -> bool:
        """True when calling this chain can do nothing."""
        return all(isinstance(entry.fn, SiteAware) and entry.fn.is_empty() for entry in self._hooks)

    def acts_at(self, layer: int | None) -> bool:
        """True when some hook here may run at this layer (None: at any layer)."""
        return any(not isinstance(entry.fn, SiteAware) or entry.fn.acts_at(layer) for entry in self._hooks)

    def layers_named(self) -> set[int]:
        """Layers that conditions in this chain name, so that a model can refuse those it does not have."""
        aware = [entry.fn for entry in self._hooks if isinstance(entry.fn, SiteAware)]
        return {layer for hook in aware for layer in hook.layers_named()}

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return self._run(x, context, self._site)

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        if self._bound:
            context = self._with_bound(context)
        for entry in self._hooks:
            fn = entry.fn
            if isinstance(fn, SiteAware):
                y: Any = fn._run(x, context, site)
            else:
                for name in entry.required:
                    if name not in context:
                        raise HookError(
                            f"{site.path or self.name}: hook {describe(fn)} wants {name!r}, which this call does "
                            f"not give (it gives {sorted(context)}); bind({name}=…) it"
                        )
                y = call_with_context(fn, entry.wants, x, context)
            if y is not None and y is not x:
                x = check_result(x, y, fn, context, site)
        return x

    def _with_bound(self, context: dict[str, Any]) -> dict[str, Any]:
        twice = self._bound.keys() & context.keys()
        if twice:
            raise HookError(f"{self.name}: {sorted(twice)} is both bound and given by the call; unbind it")
        return {**context, **self._bound}

    def __iter__(self) -> Iterator[Hook]:
        return (entry.fn for entry in self._hooks)

    def __len__(self) -> int:
        return len(self._hooks)

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._key() == other._key()

    __hash__ = None  # type: ignore[assignment]

    def _key(self) -> tuple[Any, ...]:
        return (self._hooks, self._bound)

    def _merged(self, other: Hooks) -> Self:
        """A chain like self that runs self's hooks, then other's. Bound chains are kept whole inside it."""
        merged = self._empty_copy()
        for chain in (self, other):
            if not chain._bound:
                merged._hooks.extend(chain._hooks)
            elif chain._hooks:
                whole = Hooks(name=chain.name)
                whole._hooks, whole._bound = list(chain._hooks), dict(chain._bound)
                merged._hooks.append(_Entry(whole))
        return merged

    def _empty_copy(self) -> Self:
        fresh = type(self).__new__(type(self))
        fresh.__dict__.update(self.__dict__)
        fresh._hooks, fresh._bound = [], {}
        return fresh

    def __repr__(self) -> str:
        return "\n".join(self.tree_lines())

    def tree_lines(self, indent: int = 0) -> list[str]:
        """This chain as indented lines of text, one a hook."""
        bound = f" bound to {self._bound}" if self._bound else ""
        lines = [
            "  " * indent + f"{self.name}: {len(self._hooks)} hook{'s' * (len(self._hooks) != 1)}{bound}"
        ]
        for entry in self._hooks:
            if isinstance(entry.fn, SiteAware):
                lines += entry.fn.tree_lines(indent + 1)
            else:
                lines.append("  " * (indent + 1) + describe(entry.fn))
        return lines


class WrapperHooks(Hooks):
    """A chain that wraps whatever is appended: `wrapper(hook)` is what runs."""

    def __init__(self, wrapper: Callable[[Hook], Hook], *, name: str = "wrapped") -> None:
        self.wrapper = wrapper
        super().__init__(name=name)

    def _wrap(self, hook: Hook) -> Hook:
        return self.wrapper(hook)

    def _key(self) -> tuple[Any, ...]:
        return (self.wrapper, *super()._key())


class ConditionalHooks(Hooks):
    """A chain that runs only when `condition(x, **context)` holds. The condition names its context as hooks do."""

    def __init__(self, condition: Callable[..., bool], *, name: str | None = None) -> None:
        self.condition = condition
        self._condition_wants, _ = wanted_context(condition)
        super().__init__(name=name or f"when {describe(condition)}")

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        if call_with_context(self.condition, self._condition_wants, x, context):
            return super()._run(x, context, site)
        return x

    def _key(self) -> tuple[Any, ...]:
        return (self.condition, *super()._key())


def edited_in_place(x: Tensor, version: int) -> bool:
    """Whether a tensor was written to since its version was `version`; assumed so where versions are not kept."""
    return torch.compiler.is_compiling() or version < 0 or version_of(x) != version


def version_of(x: Tensor) -> int:
    """A tensor's in-place version; -1 for tensors that keep none (inside torch.func, inference tensors)."""
    if (
        torch.compiler.is_compiling()
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
        or x.is_inference()
    ):
        return -1
    return x._version
