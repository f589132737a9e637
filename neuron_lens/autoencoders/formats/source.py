"""The files of one checkpoint, read once, and the pieces that every loader uses.

A loader sees a `Checkpoint` (names, JSON, tensors) and returns `Loaded` (config and weights under canonical
names). It never opens a file itself, so that the guards hold for all: no pickle runs code, no npz holds
pickled objects, and a truncated file is named.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_lens.autoencoders.config import AutoencoderConfig, CrossLayerTranscoderConfig
from neuron_lens.autoencoders.folding import Weights
from neuron_lens.errors import CheckpointError
from neuron_lens.files.pickles import read_pickle
from neuron_lens.files.safetensors import SafetensorsSource

__all__ = [
    "Checkpoint",
    "LoadOptions",
    "Loaded",
    "check_names",
    "integer",
    "layer_in_path",
    "number",
    "take_field",
]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a file may leave open and the caller knows."""

    scaling_factor: float | None = None  # SAELens "expected_average_only_in": what x was multiplied with


@dataclass(kw_only=True)
class Loaded:
    """What a format's loader found."""

    config: AutoencoderConfig | CrossLayerTranscoderConfig
    weights: Weights  # under the names of the module's state dict
    source_config: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Checkpoint:
    """A folder or a file, by the names in it. Files are opened on demand and kept."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(
                f"there is no autoencoder at {self.path}: expected a folder or a file; "
                "download it first, or correct the path"
            )
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.files_read: list[str] = []
        self._json: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, dict[str, Any]] = {}

    @cached_property
    def names(self) -> list[str]:
        """The files there are: of a folder all (one level of folders deep), of a file its own name."""
        if self.path.is_file():
            return [self.path.name]
        found = [*self.path.glob("*"), *self.path.glob("*/*.safetensors")]
        return sorted(str(each.relative_to(self.path)) for each in found if each.is_file())

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def matching(self, pattern: str) -> dict[int, str]:
        """Files whose name is the pattern with a number in it: number -> name, in order."""
        found = {int(hit[1]): name for name in self.names if (hit := re.fullmatch(pattern, name))}
        return dict(sorted(found.items()))

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises CheckpointError for anything else."""
        if name not in self._json:
            try:
                value = json.loads((self.folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot read {self.folder / name} as JSON: {error}") from error
            if not isinstance(value, dict):
                raise CheckpointError(
                    f"{self.folder / name} holds a JSON {type(value).__name__}, not an object"
                )
            self._json[name] = value
            self.files_read.append(name)
        return self._json[name]

    def tensors(self, name: str) -> dict[str, Any]:
        """What a weights file holds, by name: tensors, and in a `.pt` also numbers and strings."""
        if name not in self._tensors:
            path = self.folder / name
            if path.suffix == ".safetensors":
                source = SafetensorsSource(self.folder, [path])
                self._tensors[name] = {each: source.get(each) for each in source.names()}
            else:
                self._tensors[name] = _read_npz(path) if path.suffix == ".npz" else read_pickle(path)
            self.files_read.append(name)
        return self._tensors[name]


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        # opened here, because numpy leaves the file open where it is no archive
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise CheckpointError(
            f"cannot read {path}: truncated, or it holds more than plain arrays ({error})"
        ) from error


def check_names(
    tensors: Collection[str], required: Iterable[str], where: str, optional: Iterable[str] = ()
) -> None:
    """Raise CheckpointError naming every tensor that is missing and every one nobody would read."""
    required, optional = list(required), set(optional)
    missing = [name for name in required if name not in tensors]
    surplus = sorted(set(tensors) - set(required) - optional)
    if missing or surplus:
        parts = [f"it lacks {', '.join(missing)}"] if missing else []
        parts += [f"it has {', '.join(surplus)}, which this format does not know"] if surplus else []
        raise CheckpointError(
            f"{where}: {'; '.join(parts)}; it holds {', '.join(sorted(tensors)) or 'nothing'}"
        )


def take_field(config: Mapping[str, Any], name: str, where: str) -> Any:
    """A field the config must have. Raises CheckpointError naming it."""
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"{where} lacks {name!r}; it has {', '.join(sorted(config)) or 'no fields'}")
    return value


def integer(value: Any, name: str, where: str) -> int:
    """A whole number out of JSON or a tensor of one element. Raises CheckpointError."""
    whole = number(value, name, where)
    if whole != int(whole):
        raise CheckpointError(f"{where}: {name} is {value!r}, expected a whole number")
    return int(whole)


def number(value: Any, name: str, where: str) -> float:
    """A number out of JSON or a tensor of one element. Raises CheckpointError."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise CheckpointError(f"{where}: {name} is {value!r}, expected a number")


def layer_in_path(path: Path) -> int | None:
    """The layer that the innermost of a path's last parts names, or None.

    `layer_12`, `resid_post_layer_3`; failing that `L12R` or `l19`, but not the `l0` of `average_l0_71`.
    """
    parts = path.absolute().parts[-5:]
    for pattern in (r"layers?[_.\-]?(\d+)", r"(?<![A-Za-z])[lL](\d+)(?![\d_])"):
        for part in reversed(parts):
            hit = re.search(pattern, part)
            if hit:
                return int(hit[1])
    return None
