"""What a pass holds and hardly ever touches: on disk, in a file that is gone when the pass is, however it ends.

The uniform sample of a wide layer is hundreds of megabytes, of all layers of a model more than memory; a window of it
is written once and read when the pass is over.
"""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

__all__ = ["ScratchFile", "ScratchRows"]

_ALIGNMENT = 64  # bytes: whatever is mapped lies at multiples of its size


class ScratchFile:
    """A nameless file on the disk of a folder; `rows` and `array` give arrays in it. Only what is written takes space."""

    def __init__(self, folder: Path) -> None:
        # The folder is there when there is something to keep: a refused run leaves none behind.
        there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
        self._file = tempfile.TemporaryFile(dir=there, buffering=0)  # noqa: SIM115 - closed below
        weakref.finalize(self, self._file.close)
        self._size = 0

    def rows(self, count: int, *shape: int) -> ScratchRows:
        """An array `[count, *shape]` of float16 zeros."""
        size = 2 * count * int(np.prod(shape))
        return ScratchRows(self, self._take(size), (count, *shape))

    def array(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A mapped array of zeros; see `release_pages`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(shape, dtype)
        return np.memmap(self._file, dtype, "r+", self._take(size), shape)

    def _take(self, size: int) -> int:
        """Where a new part of the file begins."""
        begin = self._size
        self._size += -(-size // _ALIGNMENT) * _ALIGNMENT
        self._file.truncate(self._size)
        return begin

    def write(self, place: int, data: memoryview) -> None:
        """Write bytes at a place. Raises OSError when the disk is full."""
        self._file.seek(place)
        while data:
            data = data[self._file.write(data) :]

    def read(self, place: int, into: memoryview) -> None:
        """Fill a buffer from a place on. Raises OSError when the file ends before."""
        self._file.seek(place)
        while into:
            count = self._file.readinto(into)
            if not count:
                raise OSError(
                    f"the scratch file of a harvest ends at {self._size} bytes, {place} was asked for"
                )
            into = into[count:]

    def mapped(self, place: int, shape: tuple[int, ...]) -> Tensor:
        """A part of the file as a tensor, float16; pages are read when they are looked at."""
        return torch.from_numpy(np.memmap(self._file, np.float16, "r+", place, shape))


class ScratchRows:
    """An array `[row, ...]` of float16 in a scratch file: rows are set and got by their numbers, as a tensor's are."""

    device = torch.device("cpu")

    def __init__(self, file: ScratchFile, begin: int, shape: tuple[int, ...]) -> None:
        self._file, self._begin, self.shape = file, begin, shape
        self.row_bytes = 2 * int(np.prod(shape[1:]))

    def __setitem__(self, rows: Tensor, values: Tensor) -> None:
        for row, value in zip(rows.tolist(), values.half().cpu(), strict=True):
            data = memoryview(value.contiguous().numpy()).cast("B")
            self._file.write(self._begin + row * self.row_bytes, data)

    def __getitem__(self, rows: Tensor) -> Tensor:
        found = np.empty((len(rows), *self.shape[1:]), dtype=np.float16)
        for row, value in zip(rows.tolist(), found, strict=True):
            self._file.read(self._begin + row * self.row_bytes, memoryview(value).cast("B"))
        return torch.from_numpy(found)

    def mapped(self) -> Tensor:
        """The whole of it."""
        return self._file.mapped(self._begin, self.shape)
