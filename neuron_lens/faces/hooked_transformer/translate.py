"""From hook points that hold hooks to a tree of hooks for one forward of the engine.

Only points with hooks are translated, so a model without any runs as the bare engine does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from neuron_lens.errors import HookError
from neuron_lens.faces.hooked_transformer.caching_hook import CachingHook
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint, LensHandle
from neuron_lens.faces.hooked_transformer.names import PointPlace
from neuron_lens.hooks import Site, TransformerHooks
from neuron_lens.hooks.chain import SiteAware, describe

__all__ = ["PointsAtSite", "Slot", "hook_tree", "is_caching"]


class Slot(NamedTuple):
    """Where a hook point is held: `owner.name`. People put modules of their own there (an autoencoder, say)."""

    owner: nn.Module
    name: str
    place: PointPlace


def hook_tree(slots: Iterable[Slot], *, forward_only: bool = False) -> TransformerHooks | None:
    """The tree for one forward; None when no point holds a hook. forward_only: leave out hooks on gradients.

    The hooks are those there are now: a backward pass of this forward runs them even if they are gone by then. A
    module in the place of a hook point is called with the tensor, and what it returns goes on.
    """
    hooked: list[tuple[nn.Module, PointPlace]] = []
    for owner, name, place in slots:
        module = owner._modules[name]
        if not isinstance(module, HookPoint) or module.fwd_hooks or module.bwd_hooks:
            hooked.append((cast(nn.Module, module), place))
    if not hooked:
        return None
    caching = any(
        is_caching(h) for point, _ in hooked if isinstance(point, HookPoint) for h in point.fwd_hooks
    )
    tree = TransformerHooks()
    tree.resid.torso.ln_attn.per_head = True  # as the original: its ln1 runs for queries, keys and values
    chains_at = {site.path: site for site in tree.sites()}
    forward: dict[str, PointsAtSite | PointsOfExperts] = {}
    backward: dict[str, PointsAtSite | PointsOfExperts] = {}
    for module, place in hooked:
        if not isinstance(module, HookPoint):
            here = _points_of(forward, place, caching)
            here.points[place.layer] = _module_in_place(module, place)
            continue
        for chains, handles in ((forward, module.fwd_hooks), (backward, module.bwd_hooks)):
            if handles and not (forward_only and chains is backward):
                here = _points_of(chains, place, caching and chains is forward)
                here.points[place.layer] = (module, tuple(handles))
    for path, points in forward.items():
        chains_at[path].fwd.append(cast(Any, points))
    for path, points in backward.items():
        chains_at[path].bwd.append(cast(Any, points))
    return tree


def _points_of(
    chains: dict[str, PointsAtSite | PointsOfExperts], place: PointPlace, copy_first: bool
) -> PointsAtSite:
    """Where the point of a place belongs: to its site; inside an expert, to that expert at its site."""
    found = chains.get(place.site)
    if found is None:
        kind = RowsJoined if place.joins_rows else PointsAtSite
        found = PointsOfExperts() if place.expert is not None else kind(copy_first=copy_first)
        chains[place.site] = found
    if isinstance(found, PointsAtSite):
        return found
    assert place.expert is not None, "only experts have points at a site of experts"
    return found.by_expert.setdefault(place.expert, PointsAtSite(copy_first=copy_first))


def _module_in_place(module: nn.Module, place: PointPlace) -> tuple[HookPoint, tuple[LensHandle, ...]]:
    """A point whose one hook calls a module that somebody put in a hook point's place."""
    point = HookPoint()
    point.name, point.axes = place.full_name, place.axes

    def call(x: Tensor, hook: HookPoint) -> Tensor:
        replaced: Tensor = module(x)
        return replaced

    call.__qualname__ = type(module).__name__
    point.add_hook(call)
    return point, tuple(point.fwd_hooks)


class PointsAtSite(SiteAware):
    """The hook points of one site in one direction, by layer.

    copy_first: hooks that are not the library's own caching get a tensor of their own to edit, because caches hold
    the tensors of other points, which may be the same.
    """

    def __init__(self, *, copy_first: bool) -> None:
        self.points: dict[int | None, tuple[HookPoint, tuple[LensHandle, ...]]] = {}
        self.copy_first = copy_first

    def is_empty(self) -> bool:
        return not self.points

    def acts_at(self, layer: int | None) -> bool:
        return layer is None or layer in self.points or None in self.points

    def layers_named(self) -> set[int]:
        return {layer for layer in self.points if layer is not None}

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        found = self.points.get(context.get("layer"))
        if found is None:
            return x
        point, handles = found
        # past nn.Module's slow setting of attributes: this runs at every hooked point of every forward
        state = point.__dict__
        state["fired"] += 1
        state["run"] = context.get("run")
        shared = self.copy_first
        run = state["run"]
        later = run is not None and run.step and (isinstance(run.starts, Tensor) or run.starts > 0)
        try:
            for handle in handles:
                if is_caching(handle):
                    shared = self.copy_first
                elif shared:
                    x, shared = x.clone(), False
                run_one = _in_later_step if later else _checked_call
                x = run_one(x, point, handle)
        finally:
            state["run"] = None
        return x

    def tree_lines(self, indent: int = 0) -> list[str]:
        return ["  " * indent + str(point.name) for point, _ in self.points.values()]


class RowsJoined(PointsAtSite):
    """Points that see batch and position in one axis, as the classic router has them."""

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        return super()._run(x.flatten(0, 1), context, site).view_as(x)


class PointsOfExperts(SiteAware):
    """The hook points of a site that runs once for each expert."""

    def __init__(self) -> None:
        self.by_expert: dict[int, PointsAtSite] = {}

    def is_empty(self) -> bool:
        return not self.by_expert

    def acts_at(self, layer: int | None) -> bool:
        return any(points.acts_at(layer) for points in self.by_expert.values())

    def layers_named(self) -> set[int]:
        return {layer for points in self.by_expert.values() for layer in points.layers_named()}

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        points = self.by_expert.get(context["expert"])
        return x if points is None else points._run(x, context, site)

    def tree_lines(self, indent: int = 0) -> list[str]:
        return [line for points in self.by_expert.values() for line in points.tree_lines(indent)]


def _checked_call(x: Tensor, point: HookPoint, handle: LensHandle) -> Tensor:
    return _checked(x, point.call(handle, x), point, handle)


def _in_later_step(x: Tensor, point: HookPoint, handle: LensHandle) -> Tensor:
    """One hook in a later step of a generation, where the tensor may hold only the newest position.

    An index to a position that the key-value cache holds leaves this step unchanged: the hook acted there in the
    pass that read that position, as it would in every pass without the cache.
    """
    try:
        return _checked_call(x.clone(), point, handle)
    except IndexError as error:
        run = point.run
        assert run is not None, "set by the caller"
        before = run.starts if isinstance(run.starts, int) else int(run.starts.max())
        found = _OUT_OF_BOUNDS.search(str(error))
        if found and int(found[2]) == run.length and -before - 1 <= int(found[1]) < before:
            return x
        raise HookError(
            f"{point.name}: {error}. In step {run.step} of a generation with the key-value cache the tensor {list(x.shape)} "
            f"holds only the newest position: give the hook as AtPositions(…).append(hook) of neuron_lens.hooks, compare "
            "hook.run.positions() with the position meant, or pass use_past_kv_cache=False"
        ) from error


# How torch reports an index past the end of a dimension.
_OUT_OF_BOUNDS = re.compile(r"index (-?\d+) is out of bounds for dimension \d+ with size (\d+)")


def is_caching(handle: LensHandle) -> bool:
    return isinstance(handle.user_hook, CachingHook)


def _checked(x: Tensor, y: Any, point: HookPoint, handle: LensHandle) -> Tensor:
    if y is x or (
        isinstance(y, Tensor) and y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    ):
        return y
    got = f"a tensor {_looks(y)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
    raise HookError(
        f"{point.name}: hook {describe(handle.user_hook)} returned {got}, expected {_looks(x)} = "
        f"[{', '.join(point.axes or ())}]; return a tensor like the one given, or None to leave it unchanged"
    )


def _looks(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
