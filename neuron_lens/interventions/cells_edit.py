"""One hook for many cells: the same change in different places of different rows of one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lens.hooks import Site
from neuron_lens.interventions.declared import HEAD_AXES, site_named
from neuron_lens.interventions.places import At, keys_meant
from neuron_lens.interventions.sweep_clean import SharedPrompts
from neuron_lens.interventions.sweep_plan import Part

__all__ = ["CellsEdit", "PromptFrame"]


@dataclass(frozen=True, eq=False)
class PromptFrame:
    """What all edits of a sweep share: the prompts, and autoencoders by name."""

    prompts: SharedPrompts
    autoencoders: Mapping[str, Any] | None

    def at(self, site: Site, layer: int | None, first: int, columns: int, meant: Tensor) -> At:
        """What an edit is told of a pass over some columns from `first` on."""
        prompts, padded = self.prompts, self.prompts.pad is not None
        return At(
            site,
            layer,
            start=first,
            ends=prompts.ends,
            positions=prompts.positions[:, first : first + columns] if padded else None,
            keys=prompts.positions if padded else None,
            meant=meant,
            autoencoders=self.autoencoders,
        )


class CellsEdit:
    """One change in different places of different cells: the rows [cells · rows, …] of one pass, edited at once."""

    def __init__(
        self, parts: list[tuple[int, Part]], path: str, cells: int, first: int, frame: PromptFrame
    ) -> None:
        self.parts, self.path, self.cells, self.first, self.frame = parts, path, cells, first, frame
        self.rows = frame.prompts.rows
        self.site = Site(path, site_named(path).axes)
        self.name = parts[0][1].intervention.label()

    def __call__(self, x: Tensor, layer: int | None = None) -> Tensor:
        blocks: Tensor = x.unflatten(0, (self.cells, self.rows))
        chosen = torch.tensor([cell for cell, _ in self.parts], device=x.device)
        part = blocks[chosen]
        mask = self._mask(part)
        at = self.frame.at(self.site, layer, self.first, x.shape[self.site.dim("pos")], mask)
        changed = self.parts[0][1].intervention.changed(part, at)
        blocks[chosen] = torch.where(mask, changed, part).to(x.dtype)  # in place: the pass owns what it gives
        return x

    def _mask(self, x: Tensor) -> Tensor:
        """Which part of x [cells, *axes] is meant; broadcasts to it."""
        axes = self.site.axes or ()
        masks: dict[int, Tensor] = {}  # by dimension of x
        shape = [1] * x.dim()
        pos = 1 + self.site.dim("pos")
        masks[pos] = self._columns_mask(x, pos)
        sizes = {1 + i: x.shape[1 + i] for i, _ in enumerate(axes)}
        for dim, size in sizes.items():
            axis = axes[dim - 1]
            field = (
                "heads" if axis in HEAD_AXES else "units" if dim == len(axes) and axis != "key_pos" else ""
            )
            if axis == "key_pos":
                field = "keys"
            given = [getattr(part.intervention, field) for _, part in self.parts] if field else []
            if field == "keys":
                if self.parts[0][1].intervention.selects_keys():
                    masks[dim] = self._keys_mask(x.shape[dim], shape, x.device)
            elif any(indices is not None for indices in given):
                masks[dim] = self._axis_mask(given, size, dim, shape, x.device)
        combined = masks.pop(pos)
        for mask in masks.values():
            combined = combined & mask
        return combined

    def _columns_mask(self, x: Tensor, pos: int) -> Tensor:
        """Rows and columns meant, shaped to broadcast to x."""
        columns = x.shape[pos]
        mask = torch.zeros(len(self.parts), self.rows, columns, dtype=torch.bool, device=x.device)
        cells, at = [], []
        for index, (_, part) in enumerate(self.parts):
            if part.columns is None:
                assert part.mask is not None, "a part has columns or a mask"
                mask[index] = part.mask[:, self.first : self.first + columns]
                continue
            for column in part.columns:
                if self.first <= column < self.first + columns:
                    cells.append(index)
                    at.append(column - self.first)
        if cells:
            mask[torch.tensor(cells), :, torch.tensor(at)] = True
        for index, (_, part) in enumerate(self.parts):
            if part.intervention.rows is not None:
                others = [row for row in range(self.rows) if row not in part.intervention.rows]
                mask[index, others] = False
        shape = [1] * x.dim()
        shape[0], shape[1], shape[pos] = len(self.parts), self.rows, columns
        return mask.view(shape)

    def _keys_mask(self, keys: int, shape: list[int], device: torch.device) -> Tensor:
        """Keys meant in each cell and row; keys behind the columns of a narrow pass are masked anyway."""
        prompts = self.frame.prompts
        at = prompts.positions[:, :keys].to(device)
        mask = [keys_meant(part.intervention.keys or (), at, prompts.ends).any(1) for _, part in self.parts]
        whole = list(shape)
        whole[0], whole[1], whole[-1] = len(self.parts), self.rows, keys
        return torch.stack(mask).view(whole)

    def _axis_mask(
        self, given: list[tuple[int, ...] | None], size: int, dim: int, shape: list[int], device: torch.device
    ) -> Tensor:
        mask = torch.zeros(len(given), size, dtype=torch.bool, device=device)
        for index, indices in enumerate(given):
            if indices is None:
                mask[index] = True
                continue
            mask[index, list(indices)] = True
        whole = list(shape)
        whole[0], whole[dim] = len(given), size
        return mask.view(whole)
