"""The tree: named collections of hooks, addressed by dotted paths.

A `HookCollection` holds ordered, named children as attributes; the leaves are chains (`Hooks`). `FwdBwdHooks` is
the collection at one site of a model: `fwd`, then `bwd` (gradient hooks), then `fwd2`.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self, overload

from torch import Tensor

from neuron_lens.errors import HookError, did_you_mean
from neuron_lens.hooks.chain import Handle, Hook, Hooks, Site, WrapperHooks
from neuron_lens.hooks.gradient import grad_hook_wrapper
from neuron_lens.hooks.record import Recorder, Recording
from neuron_lens.shapes import Axis

__all__ = ["FwdBwdHooks", "HookCollection"]


class HookCollection:
    """Ordered, named sub-hooks as attributes. The base of every inner node of a tree."""

    def __init__(self) -> None:
        self._children: dict[str, HookCollection | Hooks] = {}
        self._path = ""

    @property
    def path(self) -> str:
        """Dotted path of this node from the root of its tree; empty at the root."""
        return self._path

    def add_subhooks(self, name: str, child: HookCollection | Hooks) -> Self:
        """Hang a collection or a chain below this node, as the attribute `name`. Returns self.

        Raises HookError when the name is taken or is not an identifier.
        """
        # not hasattr(self, …): __getattr__ would look for near names on every call
        if not name.isidentifier() or name in self.__dict__ or hasattr(type(self), name):
            raise HookError(
                f"cannot add sub-hooks {name!r} to {self._path or 'the tree'}: not a free attribute name"
            )
        self._children[name] = child
        setattr(self, name, child)
        _set_path(child, f"{self._path}.{name}".lstrip("."))
        return self

    def __getattr__(self, name: str) -> Any:
        # Only reached when the attribute does not exist: say what does.
        children = self.__dict__.get("_children", {})
        if name.startswith("__") or not children:
            raise AttributeError(name)
        raise AttributeError(
            f"{self._path or 'the tree'} has no sub-hooks {name!r}; {did_you_mean(name, children)}"
        )

    def chains(self) -> Iterator[tuple[str, Hooks]]:
        """Every leaf chain below with its path relative to this node, in computation order."""
        for name, child in self._children.items():
            if isinstance(child, Hooks):
                yield name, child
            else:
                for below, chain in child.chains():
                    yield f"{name}.{below}", chain

    def sites(self) -> Iterator[FwdBwdHooks]:
        """Every site (`FwdBwdHooks`) below, in computation order."""
        for child in self._children.values():
            if isinstance(child, FwdBwdHooks):
                yield child
            elif isinstance(child, HookCollection):
                yield from child.sites()

    def paths(self) -> list[str]:
        """Paths of every leaf chain below, for `append_to_path`: `resid.torso.post_mlp.fwd` and so on."""
        return [path for path, _ in self.chains()]

    def matching(self, path: str) -> list[tuple[str, Hooks]]:
        """The leaf chains a path or glob names; `*` stands for any part of one name, `**` for any names.

        Raises HookError when nothing matches.
        """
        known = dict(self.chains())
        if path in known:
            return [(path, known[path])]
        found = [(name, chain) for name, chain in known.items() if _matches(path.split("."), name.split("."))]
        if found:
            return found
        below = [name for name in known if name.startswith(path + ".")]
        if below:
            raise HookError(
                f"{path!r} is not a chain but has chains below it: append to one of {', '.join(below[:6])}"
            )
        raise HookError(f"no hook path matches {path!r}; {did_you_mean(path, known)}")

    @overload
    def append_to_path(self, path: str, hook: Hook, *, handle: Literal[False] = False) -> Self: ...

    @overload
    def append_to_path(self, path: str, hook: Hook, *, handle: Literal[True]) -> list[Handle]: ...

    def append_to_path(self, path: str, hook: Hook, *, handle: bool = False) -> Self | list[Handle]:
        """Append a hook to the chain at `path`, or to all chains a glob matches (`attn.*.fwd`).

        Returns self, or with `handle=True` the handles that `remove` takes. Raises HookError when nothing matches
        (with the nearest paths), or when the hook is not callable.
        """
        handles = [chain.append(hook, handle=True) for _, chain in self.matching(path)]
        return handles if handle else self

    def append_all(self, hook: Hook) -> Self:
        """Append a hook to every leaf chain below."""
        for _, chain in self.chains():
            chain.append(hook)
        return self

    def remove(self, handle: Handle | Iterable[Handle]) -> Self:
        """Remove what `append_to_path(…, handle=True)` added. Raises HookError when it is gone already."""
        for one in [handle] if isinstance(handle, Handle) else handle:
            one.remove()
        return self

    @contextmanager
    def temporarily(self, path: str, hook: Hook) -> Iterator[Self]:
        """`with hooks.temporarily(path, f):` the hook is there inside the block, and gone after it."""
        handles = self.append_to_path(path, hook, handle=True)
        try:
            yield self
        finally:
            self.remove(handles)

    def bind(self, **kwargs: Any) -> Self:
        """Add names to the context of every hook below. Raises HookError for a name bound already."""
        for _, chain in self.chains():
            chain.bind(**kwargs)
        return self

    def unbind(self, keys: Iterable[str]) -> Self:
        """Take bound names away from every chain below."""
        keys = [keys] if isinstance(keys, str) else list(keys)
        for _, chain in self.chains():
            chain.unbind(keys)
        return self

    def is_empty(self) -> bool:
        """True when no chain below holds a hook that could do anything."""
        return all(chain.is_empty() for _, chain in self.chains())

    def acts_at(self, layer: int | None) -> bool:
        """True when some hook below may run at this layer (None: at any layer)."""
        # asked by every norm of every pass, so it walks the children and spells out no paths
        for child in self._children.values():  # noqa: SIM110 - a generator costs more than the answer
            if child.acts_at(layer):
                return True
        return False

    def record(
        self,
        paths: str | Iterable[str],
        *,
        layers: Iterable[int] | int | None = None,
        positions: Any = None,
        dtype: Any = None,
        device: Any = None,
        detach: bool = True,
    ) -> Recording:
        """Append hooks that keep what passes at some paths, and return the store they will fill.

        Args:
            paths: one path or glob, or several; a site's path stands for its `fwd2` (what leaves the site).
            layers: keep only these layers; None keeps all.
            positions: keep only these positions (as `AtPositions` takes them); None keeps all.
            dtype, device: convert what is kept; None keeps it as it is, without a copy.
            detach: cut what is kept from the graph; False keeps gradients flowing.

        Returns:
            Recording: after a forward, `store["mlp.post_act", 3]` is the tensor of layer 3. Reading a tensor
            that somebody edited in place since raises HookError.
        """
        chosen = [paths] if isinstance(paths, str) else list(paths)
        store = Recording(self, dtype=dtype, device=device, detach=detach)
        sites = {site.path.removeprefix(self._path).lstrip("."): site for site in self.sites()}
        for path in chosen:
            whole_site = _any_site(path, sites)
            for _, chain in self.matching(f"{path}.fwd2" if whole_site else path):
                name = chain._site.path.removesuffix(".fwd2" if whole_site else "")
                store.attach(chain, Recorder(store, name), layers, positions)
        return store

    def __or__(self, other: HookCollection) -> Self:
        """A new tree with the hooks of both, self's first at each path. Neither is changed; callables are shared.

        Raises HookError when the two trees have different shapes.
        """
        if not isinstance(other, HookCollection):
            return NotImplemented
        mine, theirs = dict(self.chains()), dict(other.chains())
        if mine.keys() != theirs.keys():
            raise HookError(
                f"cannot merge trees of different sites: {sorted(mine.keys() ^ theirs.keys())[:6]}"
            )
        merged = self._with_chains({path: mine[path]._merged(theirs[path]) for path in mine})
        return merged

    def copy(self) -> Self:
        """A new tree with the same callables; appending to one does not change the other."""
        return self._with_chains({path: _same(chain) for path, chain in self.chains()})

    def _with_chains(self, chains: dict[str, Hooks]) -> Self:
        fresh = copy.copy(self)
        fresh._children = {}
        for name, child in self._children.items():
            if isinstance(child, Hooks):
                new: HookCollection | Hooks = chains[name]
            else:
                new = child._with_chains(
                    {
                        path.removeprefix(f"{name}."): c
                        for path, c in chains.items()
                        if path.startswith(f"{name}.")
                    }
                )
            fresh._children[name] = new
            fresh.__dict__[name] = new
        return fresh

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and dict(self.chains()) == dict(other.chains())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return self.to_text()

    def to_text(self, *, empty: bool = False) -> str:
        """The tree as indented text: how many hooks each path holds, and which. `empty` shows empty paths too."""
        lines = []
        for path, chain in self.chains():
            if chain or empty:
                first, *rest = chain.tree_lines(0)
                lines += [path + first[len(chain.name) :], *rest]
        shown = "\n".join("  " + line for line in lines) or "  (no hooks)"
        return f"{type(self).__name__}\n{shown}"


class FwdBwdHooks(HookCollection):
    """The hooks at one site: `fwd`, then `bwd` on the gradient, then `fwd2`.

    Gradient hooks see the gradient of what leaves `fwd`; since `fwd2` runs after them in the forward pass,
    by default (hooks in `fwd` and `bwd`) they see the gradient of the final hooked output.

    axes: the words of `neuron_lens.shapes` for the dimensions of the tensor at this site.
    """

    fwd: Hooks
    bwd: WrapperHooks
    fwd2: Hooks

    def __init__(
        self, axes: tuple[Axis, ...] | None = None, *, path: str = "", per_layer: bool = True
    ) -> None:
        super().__init__()
        self.axes = axes
        self.per_layer = per_layer
        self._path = path
        self.add_subhooks("fwd", Hooks(name="fwd"))
        self.add_subhooks("bwd", WrapperHooks(grad_hook_wrapper, name="bwd"))
        self.add_subhooks("fwd2", Hooks(name="fwd2"))
        _set_path(self, path)

    def append_fwd(self, hook: Hook) -> Self:
        """Append a forward hook that runs before the gradient hooks."""
        self.fwd.append(hook)
        return self

    def append_bwd(self, hook: Hook) -> Self:
        """Append a gradient hook: `hook(gradient, **context) -> Tensor | None`."""
        self.bwd.append(hook)
        return self

    def append_fwd2(self, hook: Hook) -> Self:
        """Append a forward hook that runs after the gradient hooks."""
        self.fwd2.append(hook)
        return self

    def has_any(self) -> bool:
        """True when something is appended here: the one question asked at every site of every forward."""
        return bool(self.fwd._hooks or self.bwd._hooks or self.fwd2._hooks)

    def acts_at(self, layer: int | None) -> bool:
        fwd, bwd, fwd2 = self.fwd, self.bwd, self.fwd2
        if not (fwd._hooks or bwd._hooks or fwd2._hooks):
            return False
        return fwd.acts_at(layer) or bwd.acts_at(layer) or fwd2.acts_at(layer)

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        if self.fwd._hooks:
            x = self.fwd._run(x, context, self.fwd._site)
        if self.bwd._hooks:
            x = self.bwd._run(x, context, self.bwd._site)
        if self.fwd2._hooks:
            x = self.fwd2._run(x, context, self.fwd2._site)
        return x


def _set_path(node: HookCollection | Hooks, path: str, axes: tuple[Axis, ...] | None = None) -> None:
    """Tell a node and everything below it where it hangs."""
    if isinstance(node, Hooks):
        node._site = Site(path, axes if axes is not None else node._site.axes)
        return
    node._path = path
    below = node.axes if isinstance(node, FwdBwdHooks) else None
    for name, child in node._children.items():
        _set_path(child, f"{path}.{name}".lstrip("."), below)


def _matches(pattern: list[str], names: list[str]) -> bool:
    if not pattern or not names:
        return not pattern and not names
    if pattern[0] == "**":
        return any(_matches(pattern[1:], names[i:]) for i in range(len(names) + 1))
    return fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(pattern[1:], names[1:])


def _any_site(path: str, sites: Iterable[str]) -> bool:
    return any(_matches(path.split("."), name.split(".")) for name in sites)


def _same(chain: Hooks) -> Hooks:
    return chain._merged(Hooks())
