"""What all blocks of one pass share: positions, masks, rotary tables, the key-value cache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from neuron_lens.hooks import Run
from neuron_lens.transformer.config import TransformerConfig
from neuron_lens.transformer.kv_cache import KVCache
from neuron_lens.transformer.masks import Masks
from neuron_lens.transformer.rotary import RotaryTable, rotary_table

__all__ = ["Frame"]


@dataclass
class Frame:
    """Made once at the start of a pass, read by every block.

    Attributes:
        run: the pass as hooks see it.
        positions: absolute position of each column, 0 where padding [batch or 1, pos].
        masks: attention masks by window.
        cache: keys and values of earlier passes, or None.
        read: columns that queries are made of [batch or 1, columns], or None: all. Keys are always those of all columns.
    """

    config: TransformerConfig
    run: Run
    positions: Tensor
    masks: Masks
    cache: KVCache | None
    dtype: torch.dtype
    read: Tensor | None = None
    _rotary: dict[bool, RotaryTable] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        config: TransformerConfig,
        run: Run,
        cache: KVCache | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Frame:
        """The frame of a pass over `run`'s columns, after what `cache` holds."""
        uniform = run.uniform
        if uniform:
            assert isinstance(run.starts, int), "uniform runs start at one position"
            query = torch.arange(run.starts, run.starts + run.length, device=device)[None]
            key = torch.arange(run.starts + run.length, device=device)[None]
        else:
            query = key = run.positions(device)
            if cache is not None:
                key = cache.all_positions(query, run.length)  # type: ignore[assignment]
                run = replace(
                    run, keys=key
                )  # hooks of attention patterns cannot know what stands in the cache
        masks = Masks(query, key, uniform=uniform)
        return cls(config, run, query.clamp(min=0), masks, cache, dtype)

    def reading(self, columns: Tensor) -> Frame:
        """The same pass for a block whose output is wanted at some columns only. columns: [batch or 1, columns]"""
        query, key = self.masks.query_positions, self.masks.key_positions
        rows = max(query.shape[0], columns.shape[0])
        there = columns.expand(rows, -1)
        masks = Masks(
            query.expand(rows, -1).gather(1, there),
            key,
            uniform=False,
            query_columns=there + (key.shape[1] - query.shape[1]),
        )
        return replace(self, masks=masks, read=columns)

    def wanted(self, x: Tensor) -> Tensor:
        """x [batch or 1, pos, …] at the columns that queries are made of."""
        if self.read is None:
            return x
        rows = max(x.shape[0], self.read.shape[0])
        index = self.read.view(*self.read.shape, *[1] * (x.dim() - 2))
        return x.expand(rows, *x.shape[1:]).gather(1, index.expand(rows, -1, *x.shape[2:]))

    def query_rotary(self, local: bool) -> RotaryTable:
        """The rotary table of the queries: that of the pass, at the columns they are made of."""
        table = self.rotary(local)
        return table if self.read is None else RotaryTable(self.wanted(table.cos), self.wanted(table.sin))

    def rotary(self, local: bool) -> RotaryTable:
        """The rotary table of this pass; `local` for layers with a window and a base of their own."""
        if local not in self._rotary:
            assert self.config.rotary is not None, "asked for rotary tables of a model without"
            table = rotary_table(self.config.rotary, self.positions, local=local, dtype=self.dtype)
            self._rotary[local] = table
        return self._rotary[local]
