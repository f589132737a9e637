"""Writing safetensors one tensor at a time: `safetensors` makes the bytes of the whole file first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.files.atomic import atomic_path

__all__ = ["write_tensor_file"]

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16",
    "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


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
            np.ascontiguousarray(tensors.pop(name)).tofile(file)
