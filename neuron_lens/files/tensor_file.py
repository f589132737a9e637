"""Safetensors a piece at a time: `safetensors` makes the bytes of a whole file before it writes one, and reads whole
tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from neuron_lens.files.atomic import atomic_path
from neuron_lens.files.mapped import release_pages

__all__ = ["map_tensor_file", "write_tensor_file"]

_BYTES_AT_ONCE = 2**24

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_TYPES = {short: np.dtype(name) for name, short in _NAMES.items()}


def write_tensor_file(
    path: Path, tensors: dict[str, NDArray[Any]], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as a safetensors file, atomically. `tensors` is emptied: each leaves memory when it is written.

    The format: 8 bytes little-endian length of a JSON header, the header (dtype, shape and offsets of each tensor),
    and the tensors without gaps, wide types first, so that each lies at a multiple of its size.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    begin = 0
    for name in order:
        array = tensors[name]
        end = begin + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write(file, tensors.pop(name))


def map_tensor_file(path: Path) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """A safetensors file's metadata, and its tensors as arrays that stay in the file and are read as they are looked at.

    Raises OSError where it cannot be read, ValueError where it is no such file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ValueError("its header is missing or cut off")
        header = json.loads(file.read(length))
    whole = np.memmap(path, np.uint8, "r")
    metadata: dict[str, str] = header.pop("__metadata__", {})
    return metadata, {name: _part(whole, 8 + length, **facts) for name, facts in header.items()}


def _part(
    whole: NDArray[np.uint8], first: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]
) -> NDArray[Any]:
    begin, end = data_offsets
    if first + end > len(whole):
        raise ValueError(f"it ends at {len(whole)} bytes, before the {first + end} that its header speaks of")
    return np.ndarray(tuple(shape), _TYPES[dtype], whole[first + begin : first + end])


def _write(file: BinaryIO, array: NDArray[Any]) -> None:
    """An array's bytes, some rows at a time: what is mapped, or in another order, is never in memory whole."""
    if array.ndim == 0 or not array.size:
        np.ascontiguousarray(array).tofile(file)
        return
    step = max(1, _BYTES_AT_ONCE * len(array) // array.nbytes)
    for begin in range(0, len(array), step):
        np.ascontiguousarray(array[begin : begin + step]).tofile(file)
        release_pages(array)
