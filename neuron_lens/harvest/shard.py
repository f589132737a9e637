"""A harvested layer on disk: self-describing, atomic, readable one unit at a time. Numpy only.

A folder with `windows.safetensors` (the kept windows), `activations.safetensors` and `manifest.json`. The
manifest is written last and holds the key of what was harvested: a folder without it, or with another
key, is not a harvest.

    random.activations [unit, window, length] float16     random.row [window] top.activations    [unit,
slot, length]   float16     top.row    [unit, slot] (-1: none)     top.split [slot] moments
[unit, 6]              float64     mean, variance, third, fourth, minimum, maximum
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path, write_json_atomic
from neuron_lens.windows import TextWindows

__all__ = ["LayerHarvest", "UnitActivations"]

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class UnitActivations:
    """What was kept of one unit: rows of the windows, and activations `[window, length]`, float32.

    `random` windows are the layer's uniform sample; `top` are the unit's own, in falling order within a
    split.
    """

    random_rows: NDArray[np.int32]
    random: NDArray[np.float32]
    top_rows: NDArray[np.int32]
    top: NDArray[np.float32]
    moments: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerHarvest:
    """One harvested layer, opened from its folder."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any]) -> LayerHarvest | None:
        """The harvest in `folder`, or None when there is none, or one of something else."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise RequestError(
                f"{folder}/manifest.json cannot be read ({error}); delete {folder} and run again"
            ) from None
        return cls(folder, manifest) if manifest.get("key") == key else None

    @classmethod
    def write(
        cls,
        folder: Path,
        windows: TextWindows,
        tensors: dict[str, NDArray[Any]],
        key: dict[str, Any],
        facts: dict[str, Any],
    ) -> LayerHarvest:
        """Write a harvest, the manifest last."""
        from safetensors.numpy import save_file

        (folder / "manifest.json").unlink(missing_ok=True)
        windows.save(folder / "windows.safetensors")
        with atomic_path(folder / "activations.safetensors") as temporary:
            save_file(tensors, temporary)
        manifest = {"format_version": FORMAT_VERSION, "key": key, "facts": facts}
        write_json_atomic(folder / "manifest.json", manifest)
        return cls(folder, manifest)

    @cached_property
    def windows(self) -> TextWindows:
        """The kept windows."""
        return TextWindows.load(self.folder / "windows.safetensors")

    @property
    def facts(self) -> dict[str, Any]:
        """n_tokens, n_documents, n_unlexed_documents."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts

    @cached_property
    def _tensors(self) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / "activations.safetensors"
        try:
            return safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"{path} cannot be read ({error}); delete {self.folder} and run again"
            ) from None

    @cached_property
    def _random_rows(self) -> NDArray[np.int32]:
        return np.asarray(self._tensors.get_tensor("random.row"))

    def unit(self, index: int) -> UnitActivations:
        """What was kept of one unit; only its part of the file is read."""
        tensors = self._tensors
        rows = np.asarray(tensors.get_slice("top.row")[index])
        held = rows >= 0
        return UnitActivations(
            random_rows=self._random_rows,
            random=tensors.get_slice("random.activations")[index].astype(np.float32),
            top_rows=rows[held],
            top=tensors.get_slice("top.activations")[index].astype(np.float32)[held],
            moments=tensors.get_slice("moments")[index],
        )

    def __repr__(self) -> str:
        return f"LayerHarvest({str(self.folder)!r}, {self.facts['n_tokens']} tokens)"
