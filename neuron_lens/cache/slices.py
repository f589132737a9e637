"""Slices of one axis in the forms people write them: an int, a (start, stop) pair, a list, a slice, or everything."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["Slice", "SliceInput"]

SliceInput = Any  # int | tuple[int | None, ...] | list[int] | Tensor | slice | Slice | None


class Slice:
    """Part of an axis.

    An int removes the axis; a tuple is `slice(*tuple)`; a list, array or tensor picks entries in that order; None
    keeps everything.
    """

    mode: Literal["int", "slice", "array", "identity"]

    def __init__(self, input_slice: SliceInput = None) -> None:
        self.slice: Any = input_slice
        if isinstance(input_slice, Slice):
            self.slice, self.mode = input_slice.slice, input_slice.mode
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, bool):
            raise RequestError(
                f"cannot slice by {input_slice!r}: give an int, a tuple, a list, a slice or None"
            )
        elif isinstance(input_slice, int):
            self.mode = "int"
        elif isinstance(input_slice, slice):
            self.mode = "slice"
        elif isinstance(input_slice, tuple):
            self.slice, self.mode = slice(*input_slice), "slice"
        elif isinstance(input_slice, list | Tensor) or hasattr(input_slice, "__array__"):
            self.slice, self.mode = torch.as_tensor(input_slice, dtype=torch.long), "array"
        else:
            raise RequestError(
                f"cannot slice by {input_slice!r}: give an int, a tuple, a list, a slice or None"
            )

    def apply(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The slice of a tensor along `dim`. Raises RequestError for entries beyond the axis."""
        length = tensor.shape[dim]
        self._check(length)
        if self.mode == "identity":
            return tensor
        if self.mode == "int":
            return tensor.select(dim, self.slice)
        if self.mode == "array":
            return tensor.index_select(dim, (self.slice % length).to(tensor.device))
        index: list[Any] = [slice(None)] * tensor.dim()
        index[dim] = self.slice
        return tensor[tuple(index)]

    def indices(self, max_ctx: int | None = None) -> Tensor:
        """The entries kept of an axis of length `max_ctx`, as long indices."""
        if self.mode == "int":
            return torch.tensor([self.slice])
        if max_ctx is None:
            raise RequestError(f"the entries of {self} depend on the length of the axis: give max_ctx")
        return torch.arange(max_ctx)[self.slice]

    def _check(self, length: int) -> None:
        if self.mode == "int":
            wrong = not -length <= self.slice < length
        else:
            wrong = self.mode == "array" and bool(((self.slice >= length) | (self.slice < -length)).any())
        if wrong:
            raise RequestError(f"{self} is outside an axis of length {length}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slice) and repr(self) == repr(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Slice({self.slice}, mode={self.mode!r})"
