"""Who may look at whom: causal masks with padding, windows and a key-value cache, made once a pass."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Masks"]


class Masks:
    """The attention masks of one pass, one for each window size, made on first use.

    Args:
        query_positions: absolute positions of this pass's columns [batch or 1, pos]; -1 where padding.
        key_positions: the same for all columns, cached ones first [batch or 1, key_pos].
        uniform: no padding anywhere: all rows alike, positions count up by one.
        query_columns: column of each query among the keys [batch or 1, pos], when they are not the last ones in order.
    """

    def __init__(
        self,
        query_positions: Tensor,
        key_positions: Tensor,
        *,
        uniform: bool,
        query_columns: Tensor | None = None,
    ) -> None:
        self.query_positions, self.key_positions, self.uniform = query_positions, key_positions, uniform
        self.query_columns = query_columns
        self._made: dict[int | None, Tensor] = {}
        self._added: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def is_plain_causal(self, window: int | None) -> bool:
        """True when the mask is the plain causal triangle, which needs no tensor."""
        keys, queries = self.key_positions.shape[1], self.query_positions.shape[1]
        return self.uniform and keys == queries and (window is None or window >= keys)

    def sees_everything(self, window: int | None) -> bool:
        """True for a single last query that may look at all keys: no mask at all."""
        keys = self.key_positions.shape[1]
        return self.uniform and self.query_positions.shape[1] == 1 and (window is None or window >= keys)

    def allowed(self, window: int | None) -> Tensor:
        """True where a query may look at a key. [batch or 1, 1, pos, key_pos]

        A padding query looks at itself alone, so that its softmax is defined; nobody looks at padding.
        """
        if window not in self._made:
            query, key = self.query_positions[:, :, None], self.key_positions[:, None, :]
            allowed = (key <= query) & (key >= 0)
            if window is not None:
                allowed = allowed & (query - key < window)
            if not self.uniform:
                columns = torch.arange(key.shape[-1], device=key.device)
                own_column = self.query_columns
                if own_column is None:
                    own_column = columns[None, key.shape[-1] - query.shape[1] :]
                allowed = allowed | ((columns == own_column[:, :, None]) & (query < 0))
            self._made[window] = allowed[:, None]
        return self._made[window]

    def added(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """`allowed` as what is added to scores: 0 where a query may look, else -inf. [batch or 1, 1, pos, key_pos]"""
        if (window, dtype) not in self._added:
            allowed = self.allowed(window)
            zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
            self._added[window, dtype] = zeros.masked_fill_(~allowed, -torch.inf)
        return self._added[window, dtype]

    def distances(self) -> Tensor:
        """How far each key lies behind each query, for ALiBi. [batch or 1, 1, pos, key_pos]"""
        return (self.query_positions[:, :, None] - self.key_positions[:, None, :])[:, None]
