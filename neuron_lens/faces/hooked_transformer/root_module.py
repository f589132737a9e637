"""HookedRootModule: hooks by name on any module tree that contains HookPoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from neuron_lens.cache import Slice, SliceInput
from neuron_lens.errors import HookError, RequestError
from neuron_lens.faces.hooked_transformer.caching_hook import CachingHook
from neuron_lens.faces.hooked_transformer.hook_point import (
    Direction,
    Directions,
    HookFunction,
    HookPoint,
    LensHandle,
)
from neuron_lens.faces.hooked_transformer.name_filter import NamesFilter, chosen_names, is_exact

__all__ = ["HookedRootModule", "NamedHook"]

NamedHook = tuple[str | Callable[[str], bool], HookFunction]


class HookedRootModule(nn.Module):
    """Root of a tree of modules with hook points. Call `setup()` at the end of `__init__`.

    Attributes:
        mod_dict: every named module below. hook_dict: every hook point below, by name.
        is_caching: whether hooks that fill a cache were added. context_level: depth of nested `hooks()`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.is_caching = False
        self.context_level = 0
        self.mod_dict: dict[str, nn.Module] = {}
        self.hook_dict: dict[str, HookPoint] = {}

    def setup(self) -> None:
        """Name every hook point below, and fill `mod_dict` and `hook_dict`."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self._hookable_modules():
            self.mod_dict[name] = module
            if isinstance(module, HookPoint):
                module.name = name
                self.hook_dict[name] = module

    def _hookable_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, module) for name, module in self.named_modules() if name)

    def hook_points(self) -> Iterable[HookPoint]:
        """Every hook point below."""
        return self.hook_dict.values()

    def get_hook_point(self, name: str) -> HookPoint:
        """The hook point of a name. Raises HookError with the nearest names."""
        found = self.hook_dict.get(name)
        return self.hook_dict[self._names([name])[0]] if found is None else found

    def list_hooks(
        self, name_filter: NamesFilter = None, dir: Directions = "both", including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """The hooks there are, by the name of their point; points without any are left out."""
        found: dict[str, list[LensHandle]] = {}
        for name in self.hook_dict if name_filter is None else self._names(name_filter):
            point = self.hook_dict[name]
            handles = [
                h for each in point._handles(dir) for h in each if including_permanent or not h.is_permanent
            ]
            if handles:
                found[name] = handles
        return found

    def _closed_names(self) -> Iterable[str]:
        """Names that are not cached by default because they are costly."""
        return ()

    def _absent_names(self) -> dict[str, str]:
        """Names that others have and this module does not, with the reason."""
        return {}

    def _names(self, names_filter: NamesFilter) -> list[str]:
        if isinstance(names_filter, str) and names_filter in self.hook_dict:
            return [names_filter]
        return chosen_names(names_filter, self.hook_dict, self._closed_names(), self._absent_names())

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook at the point of this name, or at all whose name a glob matches or a predicate accepts.

        Raises HookError when that is none.
        """
        for chosen in self._names(name):
            self.check_and_add_hook(chosen, hook, dir, is_permanent, level, prepend)

    def check_and_add_hook(
        self,
        name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook at one point, after `check_hooks_to_add`."""
        point = self.get_hook_point(name)
        self.check_hooks_to_add(point, name, hook, dir, is_permanent, prepend)
        point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def check_hooks_to_add(
        self,
        hook_point: HookPoint,
        hook_point_name: str,
        hook: HookFunction,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> None:
        """For subclasses: raise when a hook must not be added at this point."""

    def add_perma_hook(
        self, name: str | Callable[[str], bool], hook: HookFunction, dir: Direction = "fwd"
    ) -> None:
        """Add a hook that stays when hooks are reset."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    def remove_all_hook_fns(
        self, direction: Directions = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Take out all hooks (of one direction, of one context depth)."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Empty the `ctx` of every point."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Directions = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Take out hooks and empty contexts. Permanent hooks stay unless included."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level=level)
        self.is_caching = False

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[NamedHook] = (),
        bwd_hooks: Sequence[NamedHook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Hooks that are there inside the `with` block, and gone after it, whatever happens inside."""
        self.context_level += 1
        try:
            for name, hook in fwd_hooks:
                self.add_hook(name, hook, dir="fwd", level=self.context_level)
            for name, hook in bwd_hooks:
                self.add_hook(name, hook, dir="bwd", level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Sequence[NamedHook] = (),
        bwd_hooks: Sequence[NamedHook] = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """One forward with hooks that are gone after it.

        Backward hooks act in the backward pass of this forward, whenever that comes. Raises HookError when a
        hook's point was never reached.
        """
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            before = self._fire_counts()
            output = self(*model_args, **model_kwargs)
            for name, _ in fwd_hooks:
                self._check_fired([name], self._names(name), before, exact=is_exact(name))
        return output

    def _fire_counts(self) -> dict[str, int]:
        return {name: point.fired for name, point in self.hook_dict.items()}

    def _check_fired(
        self, asked: Sequence[Any], names: list[str], before: dict[str, int], *, exact: bool
    ) -> None:
        """Raise when points that were asked for did not run: all of them if named exactly, else none at all."""
        silent = [name for name in names if self.hook_dict[name].fired == before[name]]
        if silent and (exact or len(silent) == len(names)):
            raise HookError(
                f"the hook point {silent[0]!r} (asked for as {asked[0]!r}) never ran in this forward; is it behind "
                f"stop_at_layer, before start_at_layer, or on a path this call does not take?"
            )

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: SliceInput = None,
    ) -> tuple[dict[str, Tensor], list[NamedHook], list[NamedHook]]:
        """A cache, and the forward and backward hooks that fill it, for `hooks()` or `run_with_hooks()`."""
        kept: dict[str, Tensor] = {} if cache is None else cache
        # one position stays an axis of length 1, so that what is cached keeps its number of dimensions
        chosen = (
            None if pos_slice is None else Slice([pos_slice] if isinstance(pos_slice, int) else pos_slice)
        )

        def filler(gradient: bool) -> CachingHook:
            return CachingHook(
                kept, device=device, remove_batch_dim=remove_batch_dim, pos_slice=chosen, gradient=gradient
            )

        names = self._names(names_filter)
        forward: list[NamedHook] = [(name, filler(False)) for name in names]
        backward: list[NamedHook] = [(name, filler(True)) for name in names] if incl_bwd else []
        return kept, forward, backward

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Add hooks that fill a cache with every forward until they are reset. Returns the cache."""
        kept, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache
        )
        for name, hook in forward:
            self.add_hook(name, hook, dir="fwd")
        for name, hook in backward:
            self.add_hook(name, hook, dir="bwd")
        self.is_caching = True
        return kept

    def cache_all(self, cache: dict[str, Tensor], **options: Any) -> None:
        """Fill `cache` with every forward; the older form of `add_caching_hooks`."""
        self.add_caching_hooks(cache=cache, **options)

    def cache_some(self, cache: dict[str, Tensor], names: NamesFilter, **options: Any) -> None:
        """Fill `cache` with some names; the older form of `add_caching_hooks`."""
        self.add_caching_hooks(names, cache=cache, **options)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: SliceInput = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """One forward, and what passed the points that `names_filter` names.

        Args:
            names_filter: None for all; a name, a glob, several, or a predicate.
            device: where to keep tensors; None where they are.
            remove_batch_dim: drop the batch dimension (of one sequence).
            incl_bwd: call `.backward()` on the output, which must be one number, and keep gradients as
                `<name>_grad`.
            pos_slice: keep only these positions.

        Returns:
            the output, and a dictionary from name to tensor: detached, and safe from later edits.
        """
        if (
            isinstance(names_filter, Iterable)
            and not callable(names_filter)
            and not isinstance(names_filter, str)
        ):
            names_filter = list(names_filter)
        kept, forward, backward = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(forward, backward, reset_hooks_end, clear_contexts):
            before = self._fire_counts()
            output = self(*model_args, **model_kwargs)
            self._check_asked(names_filter, before)
            if incl_bwd:
                if not isinstance(output, Tensor) or output.numel() != 1:
                    shown = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise RequestError(
                        f"incl_bwd calls backward() on the output, which must be one number, not {shown}; "
                        "use return_type='loss', or call backward yourself inside hooks()"
                    )
                output.backward()
        return output, kept

    def _check_asked(self, names_filter: NamesFilter, before: dict[str, int]) -> None:
        if names_filter is None:
            return
        parts: Sequence[Any] = (
            [names_filter] if isinstance(names_filter, str) or callable(names_filter) else names_filter
        )
        for part in parts:
            self._check_fired([part], self._names(part), before, exact=is_exact(part))
