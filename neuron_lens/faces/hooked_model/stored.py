"""Caches on disk: one folder, one safetensors file and one JSON file for each batch. Whole or not there, never overwritten."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.fields import newer_key
from neuron_lens.files.atomic import atomic_path, write_json_atomic

__all__ = ["CacheWriter", "StoredCache", "jsonable"]

METADATA = "metadata.json"


class CacheWriter:
    """Writes batches into a folder that appears when the block ends without an exception, and not otherwise.

    `with CacheWriter(folder) as writer: writer.add(cache)`. One batch is in memory at a time.

    Raises RequestError when the folder exists, before anything is written.
    """

    def __init__(self, folder: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise RequestError(
                f"{self.folder} exists already, and stored activations are never overwritten; choose another folder"
            )
        self.metadata = _json_value("metadata", dict(metadata or {}))
        self.batches = 0
        self._keys: list[str] | None = None
        self._temporary = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex[:12]}.tmp")

    def __enter__(self) -> Self:
        try:
            self._temporary.mkdir(parents=True)
        except OSError as error:
            raise RequestError(f"cannot write in {self.folder.parent}: {error.strerror or error}") from error
        return self

    def add(self, cache: ActivationCache) -> None:
        """Write one batch. Raises RequestError when its keys differ from the first batch's, or a value cannot be stored."""
        keys = [key for key in cache if key != "metadata"]
        if self._keys is None:
            self._keys = keys
        elif set(keys) != set(self._keys):
            changed = sorted(set(keys) ^ set(self._keys))
            raise RequestError(
                f"batch {self.batches} has other keys than batch 0: {changed[:6]} are in one of them only"
            )
        tensors: dict[str, Tensor] = {}
        described = {key: _described(cache[key], key, tensors) for key in keys}
        name = _batch_name(self.batches)
        with atomic_path(self._temporary / f"{name}.safetensors") as file:
            save_file(tensors, file)
        write_json_atomic(self._temporary / f"{name}.json", described, indent=None)
        self.batches += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                write_json_atomic(
                    self._temporary / METADATA,
                    {**self.metadata, "batches": self.batches, "keys": self._keys or []},
                )
                if self.folder.exists():
                    raise RequestError(
                        f"{self.folder} appeared meanwhile; nothing was overwritten, choose another folder"
                    )
                os.rename(self._temporary, self.folder)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)


class StoredCache(Mapping[str, Any]):
    """A cache on disk. Reading a key joins it over all batches; `iter_batches` gives one batch at a time.

    Raises RequestError for a folder that holds no stored cache.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.metadata: dict[str, Any] = json.loads((self.folder / METADATA).read_text(encoding="utf-8"))
            self._batches, self._keys = int(self.metadata["batches"]), list(self.metadata["keys"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{self.folder} holds no stored activations: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, key: str) -> Any:
        name = key if key in self._keys else newer_key(key)
        if name not in self._keys:
            raise KeyError(f"{self.folder} has no {key!r}; {did_you_mean(key, self._keys)}")
        describing = [k for k in ("token_dict", "n_examples") if k in self._keys]
        parts = [self._read(batch, [name, *describing]) for batch in range(self._batches)]
        return ActivationCache.join(parts)[name]

    def iter_batches(self) -> Iterator[ActivationCache]:
        """One batch after another, each read when it is asked for."""
        for batch in range(self._batches):
            yield self._read(batch, self._keys)

    def load(self) -> ActivationCache:
        """Everything in memory, joined."""
        joined = ActivationCache.join(self.iter_batches())
        extra = {key: value for key, value in self.metadata.items() if key not in ("batches", "keys")}
        return joined.add_metadata(**extra)

    def _read(self, batch: int, keys: list[str]) -> ActivationCache:
        path = self.folder / _batch_name(batch)
        try:
            described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            with safe_open(path.with_suffix(".safetensors"), "pt") as file:
                return ActivationCache({key: _restored(described[key], file) for key in keys})
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise RequestError(
                f"{path}.safetensors cannot be read: {error}; extract the activations again"
            ) from None

    def __repr__(self) -> str:
        return f"StoredCache({str(self.folder)!r}: {len(self)} keys, {self._batches} batches)"


def jsonable(value: Any) -> Any:
    """Requests as they are written in metadata: tuples as lists, configurations as dicts, interventions as their labels."""
    if hasattr(value, "label"):
        return value.label()
    if hasattr(value, "activation"):
        return {"activation": value.activation, "type": value.type, "does": value.does} | {
            "token_positions": jsonable(value.token_positions)
        }
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | range):
        return [jsonable(entry) for entry in value]
    if isinstance(value, slice):
        return [value.start, value.stop]
    if isinstance(value, Tensor):
        return {"tensor": list(value.shape)}
    if hasattr(value, "keys"):
        return f"cache of {len(value)} keys"
    return value


def _json_value(name: str, value: Any) -> Any:
    """A value as JSON gives it back. Raises RequestError when it is no JSON."""
    try:
        return json.loads(json.dumps(jsonable(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise RequestError(
            f"{name} cannot be written as JSON: {error}; give texts, numbers, lists and dicts"
        ) from None


def _batch_name(number: int) -> str:
    return f"batch_{number:06d}"


def _described(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A value's structure as JSON; its tensors are put under names of their own."""
    if isinstance(value, Tensor):
        # a copy of its own: safetensors takes neither views of shared memory nor strides
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        entries = [
            [_key(key), _described(v, f"{name}/{i}", tensors)] for i, (key, v) in enumerate(value.items())
        ]
        return {"dict": entries}
    if isinstance(value, list | tuple) and any(isinstance(entry, Tensor | dict) for entry in value):
        return {"list": [_described(entry, f"{name}/{i}", tensors) for i, entry in enumerate(value)]}
    return {"value": _json_value(name, value)}


def _key(key: Any) -> Any:
    return {"tuple": list(key)} if isinstance(key, tuple) else key


def _restored(described: dict[str, Any], file: Any) -> Any:
    if "tensor" in described:
        return file.get_tensor(described["tensor"])
    if "dict" in described:
        return {
            tuple(key["tuple"]) if isinstance(key, dict) else key: _restored(value, file)
            for key, value in described["dict"]
        }
    if "list" in described:
        return [_restored(entry, file) for entry in described["list"]]
    return described["value"]
