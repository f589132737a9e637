"""HookPoint: an identity module that holds the user's hooks, and the record of one hook.

Hooks are kept as plain lists and run by the point itself, so a point copies, pickles and holds no graph. Usable in
people's own modules; HookedTransformer uses the same points and lets the engine run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from torch import Tensor, nn

from neuron_lens.errors import HookError
from neuron_lens.faces.hooked_transformer.not_offered import OF_HOOK_POINTS, not_offered
from neuron_lens.hooks import Run, Site, grad_hook_wrapper
from neuron_lens.hooks.chain import SiteAware
from neuron_lens.shapes import Axis

__all__ = ["Direction", "HookFunction", "HookPoint", "LensHandle"]

HookFunction = Callable[..., Any]  # hook(tensor, *, hook: HookPoint) -> Tensor | None
Direction = Literal["fwd", "bwd"]
Directions = Literal["fwd", "bwd", "both"]


@dataclass(eq=False)
class _Removable:
    """What `LensHandle.hook` is: takes its handle out of the list it is in."""

    handles: list[LensHandle] = field(repr=False)

    def remove(self) -> None:
        """Take the hook out; doing so twice is harmless."""
        self.handles[:] = [handle for handle in self.handles if handle.hook is not self]


@dataclass(eq=False)
class LensHandle:
    """One hook at a point: how to remove it, whether it is permanent, the context depth it was added at."""

    hook: _Removable
    is_permanent: bool = False
    context_level: int | None = None
    user_hook: HookFunction | None = None
    alias_names: tuple[str, ...] = ()


class HookPoint(nn.Module):
    """Identity that hooks can watch and change: `hook(tensor, hook=point) -> Tensor | None` (None: unchanged).

    Attributes:
        fwd_hooks, bwd_hooks: records of the hooks, in the order they run.
        ctx: free for the user's state.
        name: dotted name from the root, set by `HookedRootModule.setup`.
        axes: the meaning of the tensor's dimensions, where known.
        run: while a hook runs inside a HookedTransformer, what the forward is (token ids, absolute positions,
            padding, generation step); else None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fwd_hooks: list[LensHandle] = []
        self.bwd_hooks: list[LensHandle] = []
        self.ctx: dict[Any, Any] = {}
        self.name: str | None = None
        self.axes: tuple[Axis, ...] | None = None
        self.run: Run | None = None
        self.fired = 0

    def add_hook(
        self,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        alias_names: Sequence[str] | None = None,
    ) -> None:
        """Add a hook.

        Args:
            hook: called as `hook(tensor, hook=self)`.
            dir: "fwd" sees the activation; "bwd" its gradient.
            is_permanent: stays when hooks are reset, unless permanent ones are included.
            level: context depth it belongs to.
            prepend: run before the hooks already there.
            alias_names: run the hook once under each of these names instead of once.
        """
        if not callable(hook) and not isinstance(hook, SiteAware):
            raise HookError(f"{self._label}: a hook is called as hook(tensor, hook=point); got {hook!r}")
        handles = self._handles(dir)[0]
        removable = _Removable(handles)
        handle = LensHandle(removable, is_permanent, level, hook, tuple(alias_names or ()))
        handles.insert(0 if prepend else len(handles), handle)

    def add_perma_hook(self, hook: HookFunction, dir: Direction = "fwd") -> None:
        """Add a hook that stays when hooks are reset."""
        self.add_hook(hook, dir=dir, is_permanent=True)

    def has_hooks(
        self, dir: Directions = "both", including_permanent: bool = True, level: int | None = None
    ) -> bool:
        """Whether some hook is here; `level` counts only those of one context depth."""
        return any(
            (including_permanent or not handle.is_permanent)
            and (level is None or handle.context_level == level)
            for handles in self._handles(dir)
            for handle in handles
        )

    def remove_hooks(
        self, dir: Directions = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Take hooks out; `level` limits to one context depth. Permanent ones stay unless included."""
        for handles in self._handles(dir):
            handles[:] = [
                handle
                for handle in handles
                if (handle.is_permanent and not including_permanent)
                or (level is not None and handle.context_level != level)
            ]

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.ctx = {}

    def layer(self) -> int:
        """The block this point is in. Raises HookError when its name has no block number."""
        if self._block is None:
            raise HookError(f"the hook point {self._label} is in no block: it has no layer")
        return self._block

    @property
    def _block(self) -> int | None:
        parts = (self.name or "").split(".")
        return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else None

    def forward(self, x: Tensor) -> Tensor:
        """x, as the hooks leave it."""
        if self.fwd_hooks:
            x = self.run_forward(x)
        if self.bwd_hooks:
            handles = tuple(self.bwd_hooks)
            x = grad_hook_wrapper(lambda gradient: self.run_backward(gradient, handles))(x)
        return x

    def run_forward(self, x: Tensor) -> Tensor:
        """Run the forward hooks on x."""
        self.fired += 1
        for handle in tuple(self.fwd_hooks):
            x = self.call(handle, x)
        return x

    def run_backward(self, gradient: Tensor, handles: Iterable[LensHandle]) -> Tensor:
        """Run some backward hooks on a gradient. Those of the forward pass that made it are given."""
        for handle in handles:
            gradient = self.call(handle, gradient)
        return gradient

    def call(self, handle: LensHandle, x: Tensor) -> Tensor:
        """The tensor after one hook; once for each alias if it has any."""
        hook: Any = handle.user_hook
        if isinstance(hook, SiteAware):  # a chain or condition of neuron_lens.hooks, such as AtPositions
            context: dict[str, Any] = {"hook": self}
            if self.run is not None:
                context["run"] = self.run
            if self._block is not None:
                context["layer"] = self._block
            return hook._run(x, context, Site(self._label, self.axes))
        if not handle.alias_names:
            return _replaced(x, hook(x, hook=self))
        own = self.name
        for name in handle.alias_names:
            self.name = name
            try:
                x = _replaced(x, hook(x, hook=self))
            finally:
                self.name = own
        return x

    @property
    def _label(self) -> str:
        return self.name or "(unnamed hook point)"

    def _handles(self, dir: Directions) -> list[list[LensHandle]]:
        found = {"fwd": [self.fwd_hooks], "bwd": [self.bwd_hooks], "both": [self.fwd_hooks, self.bwd_hooks]}
        if dir not in found:
            raise HookError(f"{self._label}: dir must be 'fwd' or 'bwd' (or 'both' to remove); got {dir!r}")
        return found[dir]

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoint:
        # hooks belong to the user: a copy has the same callables, never copies of them
        clone = type(self)()
        memo[id(self)] = clone
        clone.name, clone.axes, clone.training = self.name, self.axes, self.training
        clone.ctx = dict(self.ctx)
        for dir, handles in (("fwd", self.fwd_hooks), ("bwd", self.bwd_hooks)):
            for h in handles:
                hook = cast(HookFunction, h.user_hook)
                clone.add_hook(
                    hook, cast(Direction, dir), h.is_permanent, h.context_level, False, h.alias_names
                )
        return clone

    def __getattr__(self, name: str) -> Any:
        if name in OF_HOOK_POINTS:
            raise not_offered("HookPoint", name, OF_HOOK_POINTS[name])
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return (
            f"{len(self.fwd_hooks)} forward, {len(self.bwd_hooks)} backward hooks" if self.has_hooks() else ""
        )


def _replaced(x: Tensor, y: Any) -> Any:
    """What a hook's result makes of x. Backward hooks of torch return tuples of one."""
    if isinstance(y, tuple) and len(y) == 1:
        y = y[0]
    return x if y is None else y
