"""Patches: what another place held, put here: of another run, or of the same one, computed before."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.declared import Sourced, axis_size, site_named
from neuron_lens.interventions.order import computed_before
from neuron_lens.interventions.places import At, keys_meant
from neuron_lens.interventions.tensors import Activations, Place, shown_place
from neuron_lens.transformer import TransformerConfig

__all__ = ["Patch"]


class Patch(Sourced):
    """Replace by what another run had there, or by what another place had (activation patching, interchange).

    source: activations of the other run; None takes from the same run: from `source_positions`, or from a
        `source_layer` or `source_site` that is computed before (positions behind a key-value cache are not there).
    source_positions: take from these positions instead: one for all selected positions, or one for each of `positions`.
    source_layer: take from this layer instead. source_site: take from this site (of the same shape) instead.
    source_row: take from this row of the source for every row.

    A source of padded rows has the columns of the run it is put into: record it with the same padding.
    """

    kind: Literal["patch"] = "patch"
    source: Activations | None = None  # type: ignore[assignment]
    source_positions: tuple[int, ...] | None = None
    source_layer: int | None = None
    source_site: str | None = None
    source_row: int | None = None

    @field_validator("source_positions", mode="before")
    @classmethod
    def _one_or_more(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _says_from_where(self) -> Self:
        if self.source is None:
            if self.source_positions is None and not self.reads_elsewhere():
                raise ValueError(
                    "give source (another run's activations), or source_positions, source_layer or source_site to take "
                    "from the same run"
                )
            if self.source_row is not None:
                raise ValueError("another row is taken from a recorded run: give source")
        many = self.source_positions is not None and len(self.source_positions) > 1
        if many and not (
            isinstance(self.positions, tuple) and len(self.positions) == len(self.source_positions or ())
        ):
            raise ValueError(
                "give one source position, or positions as a list with as many entries as source_positions"
            )
        return self

    def reads_elsewhere(self) -> bool:
        """Whether it takes from another site or layer of the same run."""
        return self.source is None and (self.source_layer is not None or self.source_site is not None)

    def source_place(self, path: str, layer: int | None) -> Place:
        path = self.source_site or path
        if not site_named(path).per_layer:
            return path, None
        return path, layer if self.source_layer is None else self.source_layer

    def depends_on_place(self) -> bool:
        return self.source_positions is not None and len(self.source_positions) > 1

    def looks_back_to(self, length: int) -> int | None:
        if self.source is not None or self.source_positions is None:
            return None
        return min(p % length if p < 0 else p for p in self.source_positions)

    def changed(self, x: Tensor, at: At) -> Tensor:
        place = self.source_place(at.site.path, at.layer)
        if self.source is None:
            source = x if at.kept is None else at.kept
            return source if self.source_positions is None else self._moved(x, source, at)
        moved = self.source_positions is not None
        whole = self.source[place].to(x.device, x.dtype) if moved else self.aligned(x, at, place)
        if self.source_row is not None:
            whole = whole[self.source_row : self.source_row + 1]
        return self._moved(x, whole, at) if moved else whole

    def _moved(self, x: Tensor, source: Tensor, at: At) -> Tensor:
        """The source's positions at the places of the target's."""
        dim, wanted = at.dim("pos"), self.source_positions or ()
        if at.positions is not None:
            return self._moved_in_rows(x, source, at)
        assert isinstance(at.ends, int), "rows without padding end together"
        start, end = (at.start, at.ends) if self.source is None else (0, source.shape[dim])
        columns = [self._column(p, end, start, source.shape[dim]) for p in wanted]
        if len(columns) == 1:
            return source.narrow(dim, columns[0], 1)
        assert isinstance(self.positions, tuple), "checked when built"
        targets = [(p + at.ends if p < 0 else p) - at.start for p in self.positions]
        inside = [(t, c) for t, c in zip(targets, columns, strict=True) if 0 <= t < x.shape[dim]]
        index = torch.tensor([t for t, _ in inside], device=x.device)
        taken = source.index_select(dim, torch.tensor([c for _, c in inside], device=x.device))
        shape = list(x.shape)
        shape[dim] = len(inside)
        return x.index_copy(dim, index, taken.expand(shape))

    def _moved_in_rows(self, x: Tensor, source: Tensor, at: At) -> Tensor:
        """The same where each row has its positions in columns of its own."""
        assert at.positions is not None and at.keys is not None, "padded rows come with their positions"
        assert at.ends is not None, "every pass knows where its prompts end"
        wanted, dim = self.source_positions or (), at.dim("pos")
        found = keys_meant(wanted, at.positions if self.source is None else at.keys, at.ends)
        rows = list(range(found.shape[0]) if self.rows is None else self.rows)
        without = ~found[rows].any(-1)
        if bool(without.any()):
            row, which = without.nonzero()[0].tolist()
            raise RequestError(
                f"{self.label()}: position {wanted[which]} is not in row {rows[row]} of the run it is taken from"
            )
        columns = found.float().argmax(-1)  # [rows, source positions]
        taken = torch.take_along_dim(source, _beside(columns, source, at), dim)
        if len(wanted) == 1:
            return taken
        assert isinstance(self.positions, tuple), "checked when built"
        targets = keys_meant(self.positions, at.positions, at.ends)  # [rows, positions, pos]
        out = x
        for which in range(len(wanted)):
            out = torch.where(_beside(targets[:, which], x, at), taken.narrow(dim, which, 1), out)
        return out

    def _column(self, position: int, end: int, start: int, size: int) -> int:
        column = (position + end if position < 0 else position) - start
        if not 0 <= column < size:
            raise RequestError(
                f"{self.label()}: position {position} is not in the run it is taken from ({size} positions)"
            )
        return column

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        if self.source is not None:
            super()._check_values(config, path)
        elif self.reads_elsewhere():
            for layer in self.layers_in(config, path):
                self._check_place(config, (path, layer))

    def _check_place(self, config: TransformerConfig, target: Place) -> None:
        """Whether the place in the same run that this takes from is there, is of the same shape, and comes before."""
        place = self.source_place(*target)
        absent = config.absent_sites()
        if place[0] in absent:
            raise RequestError(f"{self.label()}: {place[0]} never fires in this model: {absent[place[0]]}")
        if site_named(place[0]).per_layer:
            if place[1] is None:
                raise RequestError(
                    f"{self.label()}: {place[0]} is in every layer: say which with source_layer"
                )
            self._in_range("source layer", (place[1],), config.n_layers)
        have, wanted = (
            [axis_size(config, axis) or axis for axis in site_named(path).axes or ()]
            for path in (place[0], target[0])
        )
        if have != wanted:
            raise RequestError(
                f"{self.label()}: {place[0]} is {_shown(have)} and {target[0]} {_shown(wanted)}: they must have one shape"
            )
        if place != target and not computed_before(place, target):
            raise RequestError(
                f"{self.label()}: {shown_place(place)} is computed after {shown_place(target)}, so the same run cannot give "
                f"it; record a run first and pass it as source"
            )


def _shown(sizes: list[Any]) -> str:
    return f"[{', '.join(map(str, sizes))}]"


def _beside(values: Tensor, x: Tensor, at: At) -> Tensor:
    """values [rows, n] shaped to broadcast to x, rows at its batch axis and n at its pos axis."""
    shape = [1] * x.dim()
    shape[at.dim("batch")], shape[at.dim("pos")] = values.shape
    return values.view(shape)
