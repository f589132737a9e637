"""From hook points that hold hooks to a tree of hooks for one forward of the engine.

Only points with hooks are translated, so a model without any runs as the bare engine does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.faces.hooked_transformer.caching_hook import CachingHook
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint, LensHandle
from neuron_lens.faces.hooked_transformer.names import PointPlace
from neuron_lens.hooks import Site, TransformerHooks
from neuron_lens.hooks.chain import SiteAware, describe

__all__ = ["hook_tree"]


def hook_tree(
    points: Mapping[str, HookPoint], places: Mapping[str, PointPlace], *, forward_only: bool = False
) -> TransformerHooks | None:
    """The tree for one forward; None when no point holds a hook. forward_only: leave out hooks on gradients.

    The hooks are those there are now: a backward pass of this forward runs them even if they are gone by then.
    """
    hooked = [(point, places[name]) for name, point in points.items() if name in places and _holds(point)]
    if not hooked:
        return None
    caching = any(_is_caching(handle) for point, _ in hooked for handle in point.fwd_hooks)
    tree = TransformerHooks()
    chains_at = {site.path: site for site in tree.sites()}
    forward: dict[str, _PointsAtSite] = {}
    backward: dict[str, _PointsAtSite] = {}
    for point, place in hooked:
        for chains, handles in ((forward, point.fwd_hooks), (backward, point.bwd_hooks)):
            if handles and not (forward_only and chains is backward):
                here = chains.setdefault(place.site, _PointsAtSite(copy_first=caching and chains is forward))
                here.points[place.layer] = (point, tuple(handles))
    for path, here in forward.items():
        chains_at[path].fwd.append(cast(Any, here))
    for path, here in backward.items():
        chains_at[path].bwd.append(cast(Any, here))
    return tree


class _PointsAtSite(SiteAware):
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
        try:
            for handle in handles:
                if _is_caching(handle):
                    shared = self.copy_first
                elif shared:
                    x, shared = x.clone(), False
                x = _checked(x, point.call(handle, x), point, handle)
        except IndexError as error:
            explained = _position_error(error, point, context, x)
            if explained is error:
                raise
            raise explained from error
        finally:
            state["run"] = None
        return x

    def tree_lines(self, indent: int = 0) -> list[str]:
        return ["  " * indent + str(point.name) for point, _ in self.points.values()]


def _position_error(error: IndexError, point: HookPoint, context: dict[str, Any], x: Tensor) -> Exception:
    """What an IndexError of a hook most likely means: a position that this step of a generation does not hold."""
    run = context.get("run")
    if run is None or not run.step:
        return error
    return HookError(
        f"{point.name}: {error}. In step {run.step} of a generation with the key-value cache the tensor {list(x.shape)} holds "
        "only the newest position: compare hook.run.positions() with the position meant, or pass use_past_kv_cache=False"
    )


def _holds(point: HookPoint) -> bool:
    return bool(point.fwd_hooks or point.bwd_hooks)


def _is_caching(handle: LensHandle) -> bool:
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
