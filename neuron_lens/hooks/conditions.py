"""Combinators: hooks that run only somewhere, or that see only a part of the tensor.

`AtLayers` and `When` decide whether their hooks run. `AtPositions`, `AtSteps`, `AtHeads`, `AtUnits` and `AtRows`
give their hooks a copy of a part, and write the result back into a new tensor: what they were given stays as
it was. They nest in any order: `AtLayers([3, 5]).append(AtPositions(-1).append(f))`.

Which dimension is which comes from the site's declared axes. Positions are absolute: 0 is a row's first real
token whatever the padding, and negative positions count from the end of each row's own prompt, so that a
hook means the same position with and without a key-value cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.hooks.chain import ConditionalHooks, Hooks, Site, edited_in_place, version_of
from neuron_lens.hooks.run import Run
from neuron_lens.shapes import Axis

__all__ = ["AtHeads", "AtLayers", "AtPositions", "AtRows", "AtSteps", "AtUnits", "When"]

Indices = int | Sequence[int] | slice | range | Tensor


@dataclass(frozen=True)
class _LayerAmong:
    layers: frozenset[int]

    def __call__(self, x: Tensor, layer: int) -> bool:
        return layer in self.layers


class AtLayers(ConditionalHooks):
    """Runs its hooks at some layers only. layers: one index or several, counted from 0."""

    def __init__(self, layers: int | Sequence[int] | range) -> None:
        chosen = [layers] if isinstance(layers, int) else list(layers)
        if not chosen or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in chosen):
            raise HookError(
                f"AtLayers takes a layer or layers counted from 0 upwards, at least one; got {layers!r}"
            )
        self.layers = frozenset(chosen)
        # Not a method of its own: a chain that holds itself keeps its hooks, and their tensors, until Python
        # looks for cycles.
        condition = _LayerAmong(self.layers)
        super().__init__(condition, name="at layers " + ", ".join(map(str, sorted(self.layers))))

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        if "layer" not in context:
            raise HookError(
                f"{site.path or self.name}: AtLayers at a site that belongs to no layer; append its hooks plainly"
            )
        return Hooks._run(self, x, context, site) if context["layer"] in self.layers else x

    def acts_at(self, layer: int | None) -> bool:
        return (layer is None or layer in self.layers) and super().acts_at(layer)

    def layers_named(self) -> set[int]:
        return set(self.layers) | super().layers_named()

    def _key(self) -> tuple[Any, ...]:
        return (self.layers, *Hooks._key(self))


class When(ConditionalHooks):
    """Runs its hooks when `predicate(x, **context)` is true, for instance `When(lambda x, run: run.step == 0)`."""


class _AtPart(Hooks):
    """Base of the combinators that select a part: subclasses say which."""

    def _run_on(self, part: Tensor, run: Run | None, context: dict[str, Any], site: Site) -> Tensor | None:
        """The hooks' result for a part; None when they changed nothing."""
        version = version_of(part)
        inner = context if run is None else {**context, "run": run}
        result = Hooks._run(self, part, inner, site)
        return None if result is part and not edited_in_place(part, version) else result


class _AtIndices(_AtPart):
    """Selects the same indices of one axis for every row."""

    axes: tuple[Axis, ...] = ()
    what = "index"

    def __init__(self, indices: Indices) -> None:
        self.indices = _frozen(indices, type(self).__name__)
        super().__init__(name=f"at {self.what} {_shown(self.indices)}")

    def _dim(self, site: Site) -> int:
        if site.axes is None:
            return site.dim(self.axes[0])
        for axis in self.axes:
            if axis in site.axes:
                return site.axes.index(axis)
        raise HookError(
            f"{site.path} has no {' or '.join(self.axes)} axis: its axes are [{', '.join(site.axes)}]"
        )

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        dim = self._dim(site)
        index = _resolve(self.indices, x.shape[dim], x.device, f"{site.path}: {self.name}")
        result = self._run_on(
            x.index_select(dim, index), self._narrowed(context.get("run"), index), context, site
        )
        return x if result is None else x.index_copy(dim, index, result)

    def _narrowed(self, run: Run | None, index: Tensor) -> Run | None:
        return run

    def _key(self) -> tuple[Any, ...]:
        return (_shown(self.indices), *super()._key())


class AtHeads(_AtIndices):
    """Its hooks see only some heads (the site's `head` axis, or `kv_head` where there are only those)."""

    axes = ("head", "kv_head")
    what = "heads"


class AtUnits(_AtIndices):
    """Its hooks see only some units: neurons, latents, or directions of the last axis of the site."""

    axes = ("d_mlp", "d_latent", "d_head", "d_vocab", "d_model", "expert")
    what = "units"


class AtRows(_AtIndices):
    """Its hooks see only some rows of the batch: one intervention per batch row, in one forward."""

    axes = ("batch",)
    what = "rows"

    def _narrowed(self, run: Run | None, index: Tensor) -> Run | None:
        return None if run is None else run.select_rows(index)


class AtPositions(_AtPart):
    """Its hooks see only some positions.

    positions: an absolute position, several, a slice, a range, or a long tensor [batch] or [batch, k] with
    positions of its own for each row. 0 is a row's first real token; negatives count from the end of its
    prompt. A single hook call sees [batch, selected, …] in the site's axis order. A position that no row
    has is an error, except during generation, when it may come at another step.
    """

    def __init__(self, positions: Indices) -> None:
        self.positions = _frozen(positions, "AtPositions")
        super().__init__(name=f"at positions {_shown(self.positions)}")

    def _key(self) -> tuple[Any, ...]:
        return (_shown(self.positions), *super()._key())

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        dim = site.dim("pos")
        run: Run = context.get("run") or Run(batch=x.shape[0], length=x.shape[dim])
        if run.uniform and not isinstance(self.positions, Tensor):
            return self._run_uniform(x, run, dim, context, site)
        wanted = self._wanted(run, x.device)
        return _run_on_columns(self, x, run, wanted, dim, context, site)

    def _run_uniform(self, x: Tensor, run: Run, dim: int, context: dict[str, Any], site: Site) -> Tensor:
        """All rows alike: plain integer columns, no masks."""
        end, start = run.ends(), run.starts
        assert isinstance(end, int) and isinstance(start, int), "uniform runs have whole-batch lengths"
        absolute = _absolute(self.positions, end, start + run.length)
        columns = [p - start for p in absolute if start <= p < start + run.length]
        if not columns:
            self._refuse_empty(run, site)
            return x
        index = torch.tensor(columns, device=x.device)
        narrowed = run.select_columns(index.expand(run.batch, -1))
        result = self._run_on(x.index_select(dim, index), narrowed, context, site)
        return x if result is None else x.index_copy(dim, index, result)

    def _wanted(self, run: Run, device: torch.device) -> Tensor:
        """Which columns are selected, [batch, pos], bool."""
        at = run.positions(device)
        end = run.ends(device)
        ends = end[:, None] if isinstance(end, Tensor) else torch.full((run.batch, 1), end, device=device)
        spec = self.positions
        if isinstance(spec, slice):
            low = _from_end(spec.start if spec.start is not None else 0, ends)
            high = ends.new_full(ends.shape, 2**62) if spec.stop is None else _from_end(spec.stop, ends)
            wanted = (at >= low) & (at < high)
            return wanted if spec.step in (None, 1) else wanted & ((at - low) % spec.step == 0)
        given = (
            spec.to(device) if isinstance(spec, Tensor) else torch.tensor(list(_listed(spec)), device=device)
        )
        if isinstance(spec, Tensor) and spec.shape[0] != run.batch:
            raise HookError(f"{self.name}: positions for {spec.shape[0]} rows, but the batch has {run.batch}")
        given = given.reshape(run.batch, -1) if isinstance(spec, Tensor) else given.expand(run.batch, -1)
        absolute = torch.where(given < 0, given + ends, given)
        return (at[:, :, None] == absolute[:, None, :]).any(-1) & (at >= 0)

    def _refuse_empty(self, run: Run, site: Site) -> None:
        if run.step is None and run.columns is None:
            raise HookError(
                f"{site.path}: {self.name} selects nothing: this pass has {run.length} positions from {run.starts} on"
            )


class AtSteps(_AtPart):
    """Its hooks see only the positions read at some generation steps: 0 is the prompt, k the k-th new token.

    The same positions are meant with and without a key-value cache. Outside generation everything is step 0.
    """

    def __init__(self, steps: int | Sequence[int] | range) -> None:
        self.steps = frozenset([steps] if isinstance(steps, int) else steps)
        if any(step < 0 for step in self.steps) or not self.steps:
            raise HookError(f"AtSteps takes generation steps counted from 0 (the prompt); got {steps!r}")
        super().__init__(name="at steps " + ", ".join(map(str, sorted(self.steps))))

    def _key(self) -> tuple[Any, ...]:
        return (self.steps, *super()._key())

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        dim = site.dim("pos")
        run: Run = context.get("run") or Run(batch=x.shape[0], length=x.shape[dim])
        at = run.positions(x.device)
        end = run.ends(x.device)
        ends = end[:, None] if isinstance(end, Tensor) else end
        step = torch.where(at < ends, torch.zeros_like(at), at - ends + 1)
        wanted = torch.isin(step, torch.tensor(sorted(self.steps), device=x.device)) & (at >= 0)
        return _run_on_columns(self, x, run, wanted, dim, context, site)


def _run_on_columns(
    hooks: AtPositions | AtSteps,
    x: Tensor,
    run: Run,
    wanted: Tensor,
    dim: int,
    context: dict[str, Any],
    site: Site,
) -> Tensor:
    """Give `hooks` the wanted columns of each row, rows with equally many columns together, and write back."""
    counts = wanted.sum(-1)
    groups = [int(count) for count in counts.unique() if count > 0]
    if not groups and isinstance(hooks, AtPositions):
        hooks._refuse_empty(run, site)
    batch_dim = site.dim("batch")
    for count in groups:
        rows = (counts == count).nonzero()[:, 0]
        columns = wanted[rows].nonzero()[:, 1].reshape(rows.numel(), count)
        # [rows, count, …]: batch and pos first, so that one pair of index tensors picks the part
        front = x.movedim((batch_dim, dim), (0, 1))
        part = front[rows[:, None], columns].movedim((0, 1), (batch_dim, dim))
        result = hooks._run_on(part, run.select_rows(rows).select_columns(columns), context, site)
        if result is not None:
            values = result.movedim((batch_dim, dim), (0, 1))
            x = front.index_put((rows[:, None], columns), values).movedim((0, 1), (batch_dim, dim))
    return x


def _frozen(indices: Indices, name: str) -> int | tuple[int, ...] | slice | Tensor:
    """Indices as something that cannot be changed from outside. Raises HookError for other things."""
    if isinstance(indices, bool) or not isinstance(indices, int | slice | range | Tensor | list | tuple):
        raise HookError(f"{name} takes an int, a list, a slice, a range or a long tensor; got {indices!r}")
    if isinstance(indices, int | slice):
        return indices
    if isinstance(indices, Tensor):
        if indices.is_floating_point() or indices.dtype == torch.bool:
            raise HookError(f"{name} takes whole-number indices; got a tensor of {indices.dtype}")
        return indices.clone()
    if not indices or any(not isinstance(i, int) or isinstance(i, bool) for i in indices):
        raise HookError(f"{name} takes at least one whole number; got {indices!r}")
    return tuple(indices)


def _listed(spec: int | tuple[int, ...]) -> tuple[int, ...]:
    return (spec,) if isinstance(spec, int) else spec


def _shown(spec: Any) -> str:
    if isinstance(spec, slice):
        return (
            ":".join("" if part is None else str(part) for part in (spec.start, spec.stop, spec.step)).rstrip(
                ":"
            )
            or ":"
        )
    if isinstance(spec, Tensor):
        return str(spec.tolist())
    return ", ".join(map(str, _listed(spec)))


def _resolve(spec: Any, size: int, device: torch.device, where: str) -> Tensor:
    """Indices into an axis of `size`, negatives from its end. Raises HookError when one is out of range."""
    if isinstance(spec, slice):
        chosen: list[int] = list(range(size)[spec])
    else:
        chosen = spec.reshape(-1).tolist() if isinstance(spec, Tensor) else list(_listed(spec))
    wrong = [i for i in chosen if not -size <= i < size]
    if wrong or not chosen:
        raise HookError(
            f"{where}: {wrong or 'nothing'} selected of an axis of length {size}; use 0 to {size - 1}"
        )
    return torch.tensor([i % size for i in chosen], device=device)


def _absolute(spec: Any, end: int, total: int) -> list[int]:
    """Absolute positions meant by a spec when all rows' prompts end at `end` and `total` positions are known."""
    if isinstance(spec, slice):
        low = 0 if spec.start is None else spec.start + end * (spec.start < 0)
        high = total if spec.stop is None else spec.stop + end * (spec.stop < 0)
        return list(range(max(low, 0), min(high, total), spec.step or 1))
    return sorted({p + end if p < 0 else p for p in _listed(spec)})


def _from_end(position: int, ends: Tensor) -> Tensor:
    return ends + position if position < 0 else torch.full_like(ends, position)
