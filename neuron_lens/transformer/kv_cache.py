"""Keys and values of the positions read so far, preallocated for a whole generation."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer.config import TransformerConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys (after rotary) and values of every layer: each [batch, kv_head, capacity, d_head].

    `Transformer.forward(tokens, kv_cache=cache)` reads what is there, appends its own, and advances `length`. A frozen
    cache is read but not advanced, so that many continuations can share one prompt.

    Args:
        config: the model's configuration.
        batch: rows.
        capacity: columns there is room for (prompt with padding, and everything generated).
    """

    def __init__(
        self,
        config: TransformerConfig,
        batch: int,
        capacity: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = config.n_ctx if capacity is None else capacity
        shape = (batch, config.n_kv_heads, self.capacity, config.d_head)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.length = 0
        self.frozen = False
        # absolute position of each column, -1 for padding; None while all rows are alike and unpadded
        self.positions: Tensor | None = None
        self.batch = batch

    @property
    def starts(self) -> int | Tensor:
        """Real tokens read so far: one int when all rows are alike, else [batch]."""
        return self.length if self.positions is None else self.positions.amax(-1) + 1

    def freeze(self) -> KVCache:
        """Stop advancing: further passes read this cache and leave it as it is. Returns self."""
        self.frozen = True
        return self

    def unfreeze(self) -> KVCache:
        """Advance again with every pass. Returns self."""
        self.frozen = False
        return self

    def check_room(self, batch: int, new: int) -> None:
        """Raises RequestError when a pass of `batch` rows and `new` columns does not fit."""
        if batch != self.batch:
            raise RequestError(f"the key-value cache holds {self.batch} rows, the tokens have {batch}")
        if not self.frozen and self.length + new > self.capacity:
            raise RequestError(
                f"the key-value cache has room for {self.capacity} positions, {self.length} are used and {new} more came; "
                f"make it larger: KVCache(config, batch, capacity=…)"
            )

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values at a layer with these new ones behind. keys, values: [batch, kv_head, pos, d_head]"""
        end = self.length + keys.shape[2]
        if self.frozen:
            old_keys, old_values = (
                self.keys[layer][:, :, : self.length],
                self.values[layer][:, :, : self.length],
            )
            return torch.cat((old_keys, keys), 2), torch.cat((old_values, values), 2)
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, new_positions: Tensor | None, new: int) -> None:
        """Count a finished pass. new_positions: absolute positions of its columns [batch, pos]; None: all alike."""
        if self.frozen:
            return
        if new_positions is not None or self.positions is not None:
            self.positions = self.all_positions(new_positions, new)
        self.length += new

    def all_positions(self, new_positions: Tensor | None, new: int) -> Tensor | None:
        """Absolute position of every column, old and new, [batch, columns]; None while all rows are alike."""
        if new_positions is None and self.positions is None:
            return None
        old = self.positions
        if old is None:
            assert new_positions is not None, "one of them is known"
            old = torch.arange(self.length, device=new_positions.device).expand(self.batch, -1)
        if new_positions is None:
            new_positions = (old.amax(-1, keepdim=True) + 1) + torch.arange(new, device=old.device)
        return torch.cat((old, new_positions), -1)

    def repeat(self, rows: int, *, room: int | None = None) -> KVCache:
        """A copy with every row repeated `rows` times, for continuing one prompt in several ways.

        room: columns there is space for after those already read; None keeps the capacity.
        """
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.capacity = self.capacity if room is None else self.length + room
        other.keys = [self._repeated(keys, rows, other.capacity) for keys in self.keys]
        other.values = [self._repeated(values, rows, other.capacity) for values in self.values]
        other.positions = None if self.positions is None else self.positions.repeat_interleave(rows, 0)
        other.batch = self.batch * rows
        other.frozen = False
        return other

    def _repeated(self, kept: Tensor, rows: int, capacity: int) -> Tensor:
        """kept [batch, kv_head, capacity, d_head] with rows repeated and a capacity of its own."""
        batch, heads, _, d_head = kept.shape
        fresh = kept.new_empty((batch * rows, heads, capacity, d_head))
        fresh[:, :, : self.length] = kept[:, :, : self.length].repeat_interleave(rows, 0)
        return fresh
