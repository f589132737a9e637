"""Grids of cells: the interventions of a sweep, and the labelled axes they lie on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_lens.errors import RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.tensors import Activations

__all__ = ["Cell", "Grid", "as_grid", "grid"]

Cell = tuple[Intervention, ...] | TransformerHooks

AXIS_FIELDS = {
    "layer": "layers",
    "position": "positions",
    "head": "heads",
    "unit": "units",
    "key": "keys",
    "row": "rows",
}


@dataclass(frozen=True, eq=False)
class Grid:
    """Cells on labelled axes, in row-major order.

    axes: name of each axis, and its labels. cells: one for each combination of labels, the last axis fastest.
    """

    axes: dict[str, tuple[Any, ...]]
    cells: tuple[Cell, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return tuple(len(labels) for labels in self.axes.values())

    def __len__(self) -> int:
        return len(self.cells)

    def labels_of(self, index: int) -> dict[str, Any]:
        """The labels of one cell."""
        labels = {}
        for name, values in reversed(self.axes.items()):
            index, at = divmod(index, len(values))
            labels[name] = values[at]
        return dict(reversed(labels.items()))


def grid(
    site: str | Sequence[str],
    do: type[Intervention] | None = None,
    *,
    layers: int | Iterable[Any] | None = None,
    positions: Any = None,
    heads: int | Iterable[Any] | None = None,
    keys: int | Iterable[Any] | None = None,
    units: int | Iterable[Any] | None = None,
    rows: int | Iterable[Any] | None = None,
    patch_from: Mapping[Any, Any] | None = None,
    **fields: Any,
) -> Grid:
    """One intervention for each combination of places.

    Args:
        site: a site, or several, which become an axis.
        do: the kind of intervention; left out, it is `Patch`, with `patch_from` as its source.
        layers, positions, heads, keys, units, rows: a list or range is an axis of the grid; its entries are single
            places, or tuples acted on together. An int (or for positions a text, Span or other single place) is the
            same for all cells. None: all.
        patch_from: activations of another run, or anything `Activations` takes.
        fields: further fields of the kind, such as `factor=` or `value=`.

    Raises:
        RequestError: a field does not fit the kind, or an axis is empty.

    >>> grid("resid.torso.pre_attn", Scale, layers=range(2), positions=[0, 1, 5], factor=2.0).shape
    (2, 3)
    """
    if do is None:
        if patch_from is None:
            raise RequestError(
                "say what is done: grid(site, Zero, …), or patch_from= another run's activations"
            )
        do = Patch
    if patch_from is not None:
        fields["source"] = patch_from if isinstance(patch_from, Activations) else Activations(patch_from)
    given = {"layer": layers, "position": positions, "head": heads, "key": keys, "unit": units, "row": rows}
    axes: dict[str, tuple[Any, ...]] = {}
    sites = [site] if isinstance(site, str) else list(site)
    if not isinstance(site, str):
        axes["site"] = tuple(sites)
    fixed: dict[str, Any] = {}
    for name, values in given.items():
        if isinstance(values, list | range | tuple):
            axes[name] = tuple(values)
        elif values is not None:
            fixed[AXIS_FIELDS[name]] = values
    empty = [name for name, labels in axes.items() if not labels]
    if empty:
        raise RequestError(f"the axis {empty[0]!r} of the grid has no entries")
    return Grid(axes, tuple(_cells(do, sites, axes, fixed, fields)))


def _cells(
    do: type[Intervention],
    sites: list[str],
    axes: dict[str, tuple[Any, ...]],
    fixed: dict[str, Any],
    fields: dict[str, Any],
) -> Iterable[Cell]:
    """The cells in row-major order: one checked intervention for each site, then copies at each place."""
    names = [name for name in axes if name != "site"]
    first = {AXIS_FIELDS[name]: axes[name][0] for name in names}
    base = {"site": sites[0], **fixed, **fields, **first}

    def read(field: str, label: Any) -> Any:
        return getattr(do(**{**base, field: label}), field)

    # every label is read once by the kind's own validators; the copies then need none
    values = [[read(AXIS_FIELDS[name], label) for label in axes[name]] for name in names]
    for site in sites:
        template = do(**{**base, "site": site})
        for place in itertools.product(*values):
            update = {AXIS_FIELDS[name]: value for name, value in zip(names, place, strict=True)}
            yield (template.model_copy(update=update) if update else template,)


def as_grid(cells: Grid | Iterable[Intervention | Sequence[Intervention] | TransformerHooks]) -> Grid:
    """Cells of any form as a grid; a plain list has the one axis `cell`.

    Raises RequestError when there are none, or one is no cell.
    """
    if isinstance(cells, Grid):
        return cells
    listed: list[Cell] = []
    for cell in cells:
        parts = (cell,) if isinstance(cell, Intervention) else cell
        if not isinstance(parts, TransformerHooks):
            parts = tuple(parts) if isinstance(parts, Iterable) else (parts,)
            wrong = [part for part in parts if not isinstance(part, Intervention)]
            if wrong or not parts:
                raise RequestError(
                    f"cell {len(listed)}: expected an intervention, several, or TransformerHooks; "
                    f"got {wrong[0] if wrong else parts!r}"
                )
        listed.append(parts)
    if not listed:
        raise RequestError("a sweep needs at least one cell")
    return Grid({"cell": tuple(range(len(listed)))}, tuple(listed))
