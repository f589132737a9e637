"""What a forward pass is, as far as a hook may ask: the `run` of a hook's context.

A `Run` knows which tokens are in the tensors, where they stand (absolute positions, whatever the padding
and whatever a key-value cache already holds), and where the prompt ends. It knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["Run"]


@dataclass(frozen=True, eq=False)
class Run:
    """One forward pass, as hooks see it. Narrowed along with the tensor by the combinators that select a part.

    Attributes:
        batch: rows in the tensors of this pass.
        length: positions (columns) in the tensors of this pass.
        tokens: token ids, [batch, pos]; None when the pass started from a residual stream.
        pad: true where a column is padding, [batch, pos]; None when nothing is.
        starts: how many real tokens of each row came before this pass (in the key-value cache): one int
            when it is the same for all rows, else [batch].
        prompt_lengths: real tokens of each row's prompt during generation: one int when equal for all rows,
            else [batch]; None outside generation, when the whole row is the prompt.
        step: generation step (0 reads the prompt, k feeds the k-th generated token); None outside generation.
        config: the model's configuration.
        columns: absolute position of each column when a combinator has selected some, [batch, pos];
            None when the columns are those of the pass.
        keys: absolute position of each key that attention looks at, [batch, key_pos], -1 where padding; None when
            it follows from the rest: the keys are the columns of the pass behind those of a cache of whole rows.
        carried: what hooks of this pass leave for later hooks of the same pass; narrowed runs share it.
    """

    batch: int
    length: int
    tokens: Tensor | None = None
    pad: Tensor | None = None
    starts: int | Tensor = 0
    prompt_lengths: int | Tensor | None = None
    step: int | None = None
    config: Any = None
    columns: Tensor | None = None
    keys: Tensor | None = None
    carried: dict[Any, Any] = field(default_factory=dict)

    @property
    def uniform(self) -> bool:
        """True when every row has the same tokens at the same columns: no padding, one shared start."""
        return self.pad is None and isinstance(self.starts, int) and self.columns is None

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Absolute position of each column, -1 where it is padding. [batch, pos]"""
        if self.columns is not None:
            return self.columns.to(device) if device is not None else self.columns
        starts: Any = self.starts
        if isinstance(starts, Tensor):
            starts = starts.to(device)[:, None]
        if self.pad is None:
            return (starts + torch.arange(self.length, device=device)).expand(self.batch, self.length)
        real = ~self.pad.to(device)
        return torch.where(real, starts + real.cumsum(-1) - 1, -1)

    def key_positions(self, device: torch.device | str | None = None) -> Tensor:
        """Absolute position of each key, those of a key-value cache first, -1 where it is padding. [batch, key_pos]"""
        if self.keys is not None:
            return self.keys.to(device) if device is not None else self.keys
        if self.uniform:
            assert isinstance(self.starts, int), "uniform runs start at one position"
            return torch.arange(self.starts + self.length, device=device).expand(self.batch, -1)
        return self.positions(device)

    def ends(self, device: torch.device | str | None = None) -> int | Tensor:
        """Real tokens of each row's prompt, from which negative positions count: one int, or [batch]."""
        if self.prompt_lengths is not None:
            lengths = self.prompt_lengths
            return lengths.to(device) if isinstance(lengths, Tensor) else lengths
        if self.pad is None and isinstance(self.starts, int):
            return self.starts + self.length
        starts = self.starts.to(device) if isinstance(self.starts, Tensor) else self.starts
        if self.pad is None:
            return starts + self.length
        return starts + (~self.pad.to(device)).sum(-1)

    def select_rows(self, rows: Tensor) -> Run:
        """The run of some batch rows. rows: long indices, [rows]"""

        def pick(value: Any) -> Any:
            return value[rows.to(value.device)] if isinstance(value, Tensor) else value

        return replace(
            self,
            batch=int(rows.numel()),
            tokens=pick(self.tokens),
            pad=pick(self.pad),
            starts=pick(self.starts),
            prompt_lengths=pick(self.prompt_lengths),
            columns=pick(self.columns),
            keys=pick(self.keys),
        )

    def select_columns(self, columns: Tensor) -> Run:
        """The run of some columns of each row. columns: long column indices, [batch, selected]"""
        positions = self.positions(columns.device)
        return replace(
            self,
            length=int(columns.shape[1]),
            tokens=None if self.tokens is None else self.tokens.gather(1, columns.to(self.tokens.device)),
            pad=None if self.pad is None else self.pad.gather(1, columns.to(self.pad.device)),
            prompt_lengths=self.ends(columns.device),
            columns=positions.gather(1, columns),
            keys=self.key_positions(columns.device),
        )
