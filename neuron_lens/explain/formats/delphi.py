"""EleutherAI Delphi's latent cache, written and read in bounded memory.

    latents/<module>/{start}_{end}.safetensors   latents start to end, both included
        locations    uint16 or uint32 [n, 3]: row, position, latent - start, of every activation that is not 0
        activations  float16 [n]
        tokens       int64 [row, pos], the same in every file
    latents/<module>/config.json                 Delphi's CacheConfig, and the model's name

uint16 is taken where rows and latents fit. Delphi holds everything in memory until the end; here what is
added goes to disk at once, dealt to the latent ranges, and a reader maps the files. Source: Delphi's
`latents/cache.py` and `latents/loader.py`; safetensors' format.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.json_file import read_json
from neuron_lens.files.atomic import atomic_path, write_json_atomic
from neuron_lens.files.safetensors import TensorEntry, read_header

__all__ = ["LatentActivations", "LatentCache", "LatentCacheWriter"]

_CHUNK = 1 << 16  # locations converted at a time
_UINT16 = 1 << 16
_FLOAT16_MAX = 65504.0


@dataclass(frozen=True, eq=False)
class LatentActivations:
    """Where one latent is active: `rows`, `positions` int64 `[n]`, and its activations float16 `[n]`."""

    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    activations: NDArray[np.float16]


class LatentCacheWriter:
    """Writes one module's cache: `with LatentCacheWriter(...) as writer: writer.add(...)` for every batch.

    The files appear when the block ends, and not at all when it fails. Memory: one batch.

    Args:
        folder: the run's folder; files go to `latents/<module>` in it.
        module: the module's name, such as "layers.5".
        n_latents: latents in all; `n_splits` files share them evenly.
        config: what config.json says besides the context length, the tokens and the splits; Delphi reads
            "model_name", "dataset_repo", "dataset_split", "dataset_name" and "dataset_column" from it.
    """

    def __init__(
        self,
        folder: Path | str,
        module: str,
        *,
        n_latents: int,
        n_splits: int = 5,
        config: Mapping[str, Any],
    ) -> None:
        if not 1 <= n_splits <= n_latents:
            raise RequestError(
                f"{n_latents} latents cannot be shared by {n_splits} files; give fewer n_splits"
            )
        if not config.get("model_name"):
            raise RequestError('the config needs a "model_name": Delphi loads the tokenizer by it')
        self.folder = _module_folder(folder, module)
        self.n_latents = n_latents
        self.starts = [split * n_latents // n_splits for split in range(n_splits)]
        self._config = dict(config)
        self._context: int | None = None
        self._n_rows = 0
        self._spools: list[tuple[BinaryIO, BinaryIO]] = []

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=self.folder))
        self._tokens = (self._scratch / "tokens").open("w+b")
        for split in range(len(self.starts)):
            names = (self._scratch / f"{kind}-{split}" for kind in ("locations", "activations"))
            locations, activations = (name.open("w+b") for name in names)
            self._spools.append((locations, activations))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for spool in (self._tokens, *(file for pair in self._spools for file in pair)):
                spool.close()
            shutil.rmtree(self._scratch)

    def add(self, tokens: ArrayLike, locations: ArrayLike, activations: ArrayLike) -> None:
        """Add a batch: token ids `[row, pos]`, and its activations that are not zero.

        `locations` `[n, 3]` holds row (counted in this batch), position and latent; `activations` `[n]` is
        theirs. Raises RequestError when shapes disagree, an index lies outside, or a value is too large for
        float16 or not finite.
        """
        ids = _integers("tokens", tokens, 2)
        places = _integers("locations", locations, 2)
        values = np.asarray(activations, dtype=np.float32)
        if self._context is not None and ids.shape[1] != self._context:
            raise RequestError(
                f"tokens have {ids.shape[1]} positions; the batches before had {self._context}"
            )
        if places.shape != (len(places), 3) or values.shape != (len(places),):
            raise RequestError(
                f"locations of shape {list(places.shape)} and activations of shape {list(values.shape)} were given; "
                "expected [n, 3] and [n]"
            )
        _check_places(places, (*ids.shape, self.n_latents), "locations")
        if not (np.abs(values) <= _FLOAT16_MAX).all():
            worst = places[int(np.argmin(np.abs(values) <= _FLOAT16_MAX))].tolist()
            raise RequestError(
                f"the activation at (row, position, latent) = {tuple(worst)} is not finite or above "
                f"{_FLOAT16_MAX:.0f}, the largest of float16, in which the format keeps it; scale it down"
            )
        split = np.searchsorted(self.starts, places[:, 2], side="right") - 1
        for index in np.unique(split):
            own = split == index
            located = places[own] + np.array([self._n_rows, 0, -self.starts[index]])
            located.astype("<u4").tofile(self._spools[index][0])
            values[own].astype("<f2").tofile(self._spools[index][1])
        ids.astype("<i8").tofile(self._tokens)
        self._context = ids.shape[1]
        self._n_rows += len(ids)

    def _finish(self) -> None:
        if self._context is None:
            raise RequestError(f"nothing was added to the cache in {self.folder}; add at least one batch")
        ends = [*self.starts[1:], self.n_latents]
        for (locations, activations), start, end in zip(self._spools, self.starts, ends, strict=True):
            fits = max(self._n_rows, self._context, end - start) <= _UINT16
            width = np.dtype("<u2" if fits else "<u4")
            n = activations.tell() // 2
            shapes = [
                ("tokens", "I64", [self._n_rows, self._context], 8),
                ("locations", "U16" if width.itemsize == 2 else "U32", [n, 3], width.itemsize),
                ("activations", "F16", [n], 2),
            ]
            with atomic_path(self.folder / f"{start}_{end - 1}.safetensors") as path, path.open("wb") as file:
                file.write(_header(shapes))
                for spool in (self._tokens, locations, activations):
                    spool.seek(0)
                shutil.copyfileobj(self._tokens, file)
                while len(chunk := np.frombuffer(locations.read(12 * _CHUNK), dtype="<u4")):
                    file.write(chunk.astype(width).tobytes())
                shutil.copyfileobj(activations, file)
        own = {
            "ctx_len": self._context,
            "cache_ctx_len": self._context,  # its name since Delphi 0.1
            "n_tokens": self._n_rows * self._context,
            "n_splits": len(self.starts),
        }
        write_json_atomic(self.folder / "config.json", {**self._config, **own})


class LatentCache:
    """Reads one module's cache; files are memory-mapped, and one range's order by latent is kept at a time.

    Raises RequestError (CheckpointError for a truncated file) when files are missing, overlap, or disagree
    with the format.
    """

    def __init__(self, folder: Path | str, module: str) -> None:
        self.folder = _module_folder(folder, module)
        found: dict[int, tuple[int, Path]] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            start, _, end = path.stem.partition("_")
            if not (start.isdecimal() and end.isdecimal() and int(start) <= int(end)):
                raise RequestError(f"{path} is not named <first latent>_<last latent>.safetensors")
            found[int(start)] = (int(end), path)
        if not found:
            raise RequestError(
                f"{self.folder} holds no latent cache: expected files <first>_<last>.safetensors"
            )
        self.starts = sorted(found)
        self._files = [found[start] for start in self.starts]
        for (last, path), following in zip(self._files, self.starts[1:], strict=False):
            if last + 1 != following:
                raise RequestError(
                    f"after {path} comes a file for latents from {following}; expected {last + 1}"
                )
        self._ordered: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        value = read_json(self.folder / "config.json")
        if not isinstance(value, dict):
            raise RequestError(
                f"{self.folder / 'config.json'} holds a {type(value).__name__}; expected an object"
            )
        return value

    @property
    def latents(self) -> range:
        """The latents the files cover."""
        return range(self.starts[0], self._files[-1][0] + 1)

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """Token ids `[row, pos]`, mapped. Raises RequestError for a cache saved without its tokens."""
        _, path = self._files[0]
        entries = read_header(path)
        if "tokens" not in entries:
            raise RequestError(f"{path} holds no tokens; load them from the data set its config.json names")
        return np.asarray(_mapped(path, "tokens", entries["tokens"], ("int64", "int32"), 2))

    def latent(self, index: int) -> LatentActivations:
        """Where a latent is active, in order of row and position as written."""
        if index not in self.latents:
            raise RequestError(f"latent {index} is not in {self.folder}: it holds {self.latents}")
        split = bisect_right(self.starts, index) - 1
        locations, activations = self._split(split)
        if self._ordered is None or self._ordered[0] != split:
            column = np.asarray(locations[:, 2])
            order = np.argsort(column, kind="stable")
            self._ordered = (split, order, column[order].astype(np.int64))
        _, order, sorted_latents = self._ordered
        begin, end = np.searchsorted(
            sorted_latents, [index - self.starts[split], index - self.starts[split] + 1]
        )
        own = order[begin:end]
        places = locations[own].astype(np.int64)
        return LatentActivations(places[:, 0], places[:, 1], np.asarray(activations[own]))

    def dense(self, index: int) -> NDArray[np.float32]:
        """A latent's activation at every token, `[row, pos]`, zero where the cache has none."""
        found = self.latent(index)
        values = np.zeros(self.tokens.shape, dtype=np.float32)
        values[found.rows, found.positions] = found.activations
        return values

    def __iter__(self) -> Iterator[tuple[int, LatentActivations]]:
        """Every latent with its activations, in order; also those that never fire."""
        return ((index, self.latent(index)) for index in self.latents)

    def _split(self, split: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The mapped locations and activations of one file, checked when it is opened first."""
        if split not in self._opened:
            end, path = self._files[split]
            entries = read_header(path)
            if missing := {"locations", "activations"} - entries.keys():
                raise RequestError(f"{path} is not a latent cache: it lacks {' and '.join(sorted(missing))}")
            locations = _mapped(path, "locations", entries["locations"], ("uint16", "uint32", "int64"), 2)
            activations = _mapped(path, "activations", entries["activations"], ("float16", "float32"), 1)
            if locations.shape != (len(activations), 3):
                raise RequestError(
                    f"{path}: locations have the shape {list(locations.shape)} for {len(activations)} activations; "
                    f"expected [{len(activations)}, 3]"
                )
            shape = self.tokens.shape if "tokens" in entries else (2**63 - 1, 2**63 - 1)
            _check_places(locations, (*shape, end - self.starts[split] + 1), f"{path}: locations")
            self._opened[split] = (locations, activations)
        return self._opened[split]

    @cached_property
    def _opened(self) -> dict[int, tuple[NDArray[Any], NDArray[Any]]]:
        return {}


def _module_folder(folder: Path | str, module: str) -> Path:
    parts = Path(module).parts
    if not parts or Path(module).is_absolute() or ".." in parts:
        raise RequestError(f"{module!r} is no module name; expected something like 'layers.5'")
    return Path(folder) / "latents" / module


def _integers(name: str, values: ArrayLike, ndim: int) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        array = array.reshape(0, 3) if name == "locations" else array.astype(np.int64)
    if array.ndim != ndim or not (np.issubdtype(array.dtype, np.integer) or array.size == 0):
        raise RequestError(
            f"{name} of shape {list(array.shape)} and dtype {array.dtype} were given; expected integers with "
            f"{ndim} axes"
        )
    return array.astype(np.int64)


def _check_places(places: NDArray[Any], shape: tuple[int, ...], what: str) -> None:
    """Raise RequestError unless every (row, position, latent) lies in `shape`."""
    if not len(places):
        return
    for column, (name, size) in enumerate(zip(("row", "position", "latent"), shape, strict=True)):
        low, high = int(places[:, column].min()), int(places[:, column].max())
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise RequestError(f"{what} hold the {name} {wrong}; expected 0 to {size - 1}")


def _header(tensors: list[tuple[str, str, list[int], int]]) -> bytes:
    """A safetensors header for (name, dtype, shape, bytes per element) laid out one after the other."""
    header: dict[str, Any] = {}
    start = 0
    for name, dtype, shape, width in tensors:
        end = start + int(np.prod(shape, dtype=np.int64)) * width
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _mapped(path: Path, name: str, entry: TensorEntry, dtypes: tuple[str, ...], ndim: int) -> NDArray[Any]:
    if entry.dtype not in dtypes or len(entry.shape) != ndim:
        raise RequestError(
            f"{path}: {name} have dtype {entry.dtype} and shape {list(entry.shape)}; expected "
            f"{' or '.join(dtypes)} with {ndim} axes"
        )
    if entry.start == entry.end:
        return np.zeros(entry.shape, dtype=entry.dtype)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    offset = 8 + length + entry.start
    return np.memmap(path, mode="r", dtype=entry.dtype, offset=offset, shape=entry.shape)
