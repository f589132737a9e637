"""The tensors of a checkpoint folder, read on demand by memory map.

One interface over safetensors files and PyTorch state dicts, single or sharded. The safetensors library's
`safe_open` maps the file copy-on-write: a tensor it returns views the map, so memory is touched only when
the tensor is read, and writing to the tensor never reaches the file. The headers are checked here first,
because a truncated download is the commonest wrong file and deserves to be named as such.

Knows nothing of what the tensors mean. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import CheckpointError, did_you_mean
from neuron_lens.files.pickles import read_pickle

if TYPE_CHECKING:
    import torch

__all__ = [
    "PickleSource",
    "SafetensorsSource",
    "TensorEntry",
    "TensorSource",
    "open_tensors",
    "read_header",
]

# The format's dtype -> torch's name of it, bytes per element.
_DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """What a safetensors header says of one tensor."""

    dtype: str  # torch's name of it, "float16"
    shape: tuple[int, ...]
    start: int  # first byte, counted from the end of the header
    end: int  # one past the last byte


class TensorSource(ABC):
    """Named tensors on disk. Names, shapes and dtypes cost no tensor memory; `get` gives a CPU tensor."""

    def __init__(self, folder: Path, file_of: dict[str, Path]) -> None:
        self.folder = folder
        self._file_of = file_of

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor. Raises CheckpointError for a name that is not there."""
        try:
            return self._file_of[name]
        except KeyError:
            hint = did_you_mean(name, self.names())
            raise CheckpointError(f"{self.folder} holds no tensor {name!r}: {hint}") from None

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype as stored."""

    @abstractmethod
    def get(self, name: str) -> torch.Tensor:
        """The tensor on the CPU, in the stored shape and dtype, viewing the mapped file where it can."""

    def read(self, name: str) -> torch.Tensor:
        """The same for a reader that copies: what it touched of the file is given back with the tensor."""
        return self.get(name)


class SafetensorsSource(TensorSource):
    """Tensors of one or several `.safetensors` files."""

    def __init__(self, folder: Path, files: Iterable[Path], expected: dict[str, Path] | None = None) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._handles: dict[Path, Any] = {}
        file_of: dict[str, Path] = {}
        for path in files:
            for name, entry in read_header(path).items():
                if name in file_of:
                    raise CheckpointError(
                        f"the tensor {name!r} is in both {file_of[name].name} and {path.name} of {folder}; "
                        "remove the file that does not belong to this checkpoint"
                    )
                file_of[name] = path
                self._entries[name] = entry
        _check_index(folder, expected, file_of)
        super().__init__(folder, file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        self.path_of(name)
        return self._entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        import torch

        self.path_of(name)
        dtype = getattr(torch, self._entries[name].dtype)
        assert isinstance(dtype, torch.dtype), f"{self._entries[name].dtype} is not a torch dtype"
        return dtype

    def get(self, name: str) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        path = self.path_of(name)
        if path not in self._handles:
            self._handles[path] = safe_open(path, framework="pt", device="cpu")
        tensor = self._handles[path].get_tensor(name)
        assert isinstance(tensor, torch.Tensor), f"safe_open gave a {type(tensor).__name__}"
        return tensor

    def read(self, name: str) -> torch.Tensor:
        import torch
        from safetensors import safe_open

        # a mapping of its own, which is undone when the tensor goes
        with safe_open(self.path_of(name), framework="pt", device="cpu") as file:
            tensor = file.get_tensor(name)
        assert isinstance(tensor, torch.Tensor), f"safe_open gave a {type(tensor).__name__}"
        return tensor


class PickleSource(TensorSource):
    """Tensors of one or several `pytorch_model*.bin` state dicts, unpickled without running code."""

    def __init__(self, folder: Path, files: Iterable[Path], expected: dict[str, Path] | None = None) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        file_of: dict[str, Path] = {}
        for path in files:
            for name, tensor in _load_state_dict(path).items():
                file_of[name] = path
                self._tensors[name] = tensor
        _check_index(folder, expected, file_of)
        super().__init__(folder, file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.get(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.get(name).dtype

    def get(self, name: str) -> torch.Tensor:
        self.path_of(name)
        return self._tensors[name]


def open_tensors(folder: str | Path) -> TensorSource:
    """Open the tensors of a checkpoint folder (or of one `.safetensors` or `.bin` file).

    Looked for, in this order: `model.safetensors.index.json` and its shards, `model.safetensors`, the one
    other `.safetensors` file, `pytorch_model.bin.index.json` and its shards, `pytorch_model.bin`.

    Raises CheckpointError when there are none, a shard is missing, a file is truncated or corrupt, or a
    pickle holds anything but tensors.
    """
    path = Path(folder)
    if path.is_file():
        reader = PickleSource if path.suffix in {".bin", ".pt", ".pth"} else SafetensorsSource
        return reader(path.parent, [path])
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {path}")
    for index, single, pattern, reader in (
        ("model.safetensors.index.json", "model.safetensors", "*.safetensors", SafetensorsSource),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model.bin", PickleSource),
    ):
        if (path / index).is_file():
            expected = _read_index(path / index)
            return reader(path, sorted(set(expected.values())), expected)
        if (path / single).is_file():
            return reader(path, [path / single])
        others = sorted(path.glob(pattern))
        if len(others) == 1:
            return reader(path, others)
        if others:
            raise CheckpointError(
                f"{path} holds {len(others)} safetensors files and no {index} to say which belong together: "
                + ", ".join(other.name for other in others[:8])
            )
    raise CheckpointError(
        f"{path} holds no weights: expected model.safetensors, a sharded model.safetensors.index.json, or "
        f"pytorch_model.bin; it holds {', '.join(sorted(p.name for p in path.iterdir())[:12]) or 'nothing'}"
    )


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """The tensors a safetensors file declares, without its data: name -> entry.

    Raises CheckpointError, naming the file and what is wrong, unless the header is whole and the file is
    exactly as long as the header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if len(start) < 8:
                raise CheckpointError(
                    _broken(path, f"it is {size} bytes long, and 8 hold the header's length")
                )
            (length,) = struct.unpack("<Q", start)
            if length > size - 8:
                raise CheckpointError(
                    _broken(path, f"its header should be {length} bytes long, but {size - 8} bytes follow")
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(_broken(path, f"its header is not JSON ({error})")) from error
    if not isinstance(header, dict):
        raise CheckpointError(_broken(path, f"its header is a JSON {type(header).__name__}, not an object"))
    header.pop("__metadata__", None)
    entries = {name: _parse_entry(path, name, value) for name, value in header.items()}
    data_bytes = max((entry.end for entry in entries.values()), default=0)
    if data_bytes != size - 8 - length:
        raise CheckpointError(
            _broken(
                path, f"its header declares {data_bytes} bytes of tensors, but {size - 8 - length} follow it"
            )
        )
    return entries


def _parse_entry(path: Path, name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(map(int, value["shape"])), value["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            _broken(path, f"its header describes the tensor {name!r} as {value!r}")
        ) from error
    if dtype not in _DTYPES:
        raise CheckpointError(
            f"the tensor {name!r} of {path} has the dtype {dtype!r}, which is not supported; "
            f"known: {', '.join(_DTYPES)}"
        )
    name_in_torch, width = _DTYPES[dtype]
    if min(shape, default=0) < 0 or end - start != math.prod(shape) * width:
        raise CheckpointError(
            _broken(
                path, f"the tensor {name!r} of shape {list(shape)} and dtype {dtype} has {end - start} bytes"
            )
        )
    return TensorEntry(dtype=name_in_torch, shape=shape, start=start, end=end)


def _broken(path: Path, what: str) -> str:
    return f"{path} is truncated or corrupt: {what}; download or save it again"


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> shard file, from a `*.index.json`; every shard exists."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        expected = {str(name): index.parent / str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read the shard index {index}: expected an object with 'weight_map' ({error!r})"
        ) from error
    outside = sorted({str(p) for p in expected.values() if p.parent != index.parent})
    if outside:
        raise CheckpointError(f"the shard index {index} points outside its folder: {', '.join(outside)}")
    missing = sorted({path.name for path in expected.values() if not path.is_file()})
    if missing:
        raise CheckpointError(
            f"{index.parent} lacks {len(missing)} of its shards: {', '.join(missing[:8])}; fetch them again"
        )
    return expected


def _check_index(folder: Path, expected: dict[str, Path] | None, found: dict[str, Path]) -> None:
    """Hold the shards to the index: the same tensors in the same files."""
    if expected is None:
        return
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        name = wrong[0]
        says, has = expected.get(name), found.get(name)
        raise CheckpointError(
            f"the shard index of {folder} and its shards disagree on {len(wrong)} tensors, first {name!r}: "
            f"the index says {says.name if says else 'nothing'}, it is in {has.name if has else 'no shard'}"
        )


def _load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """A pickled state dict: names with tensors and nothing else. Raises CheckpointError."""
    import torch

    loaded = read_pickle(path)
    others = sorted(name for name, value in loaded.items() if not isinstance(value, torch.Tensor))
    if others:
        raise CheckpointError(
            f"{path} is no state dict: expected names with tensors, but {', '.join(others[:4])} is something else; "
            "save `model.state_dict()` alone"
        )
    return loaded
