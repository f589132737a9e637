"""A harvested source on disk: self-describing, atomic, readable one unit at a time. Numpy only.

A folder with `windows.safetensors` (the kept windows), `activations.safetensors`, `near.safetensors` (near misses) and
`manifest.json`. The manifest is written last and holds the key of what was harvested: a folder without it, or with another
key, is not a harvest. "unit" counts the kept units, "row" the kept windows.

    unit.index [unit]                                  which units of the source they are
    random.row [window]                                the uniform sample, shared by all units
    random.activations [unit, window, length] float16  (random.partners: the same, int16), or where they are sparse
    random.begin [unit + 1], random.window, .position, .value [entry]: unit u has entries begin[u] to begin[u+1]
    top.row [unit, slot] (-1: none), top.activations [unit, slot, length] float16, top.split [slot],
        top.token [unit, slot]: the token of the largest activation; fired.*: the same, sparse units only
    moments [unit, 6] float64                          mean, variance, third, fourth, minimum, maximum
    histogram [unit, edge + 1] int64, histogram.edge   tokens below, between and above the edges
    nearest.unit [unit, n], .pearson, .jaccard, .cosine
    near.row, near.activations, near.split, near.reason    as top.*; the reason of each slot (of NEAR_REASONS)
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
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.files.tensor_file import write_tensor_file
from neuron_lens.windows import TextWindows

__all__ = ["FORMAT_VERSION", "LayerHarvest", "NearestUnits", "UnitActivations"]

FORMAT_VERSION = 3


@dataclass(frozen=True, eq=False)
class NearestUnits:
    """The most co-active units, most first: their indices in the source, Pearson's correlation and the Jaccard
    index on the sample, and the cosine of their output directions where they have one."""

    index: NDArray[np.int32]
    pearson: NDArray[np.float32]
    jaccard: NDArray[np.float32]
    cosine: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class UnitActivations:
    """What was kept of one unit: rows of the windows, and activations `[window, length]`, float32.

    `random` windows are the source's uniform sample; `top` are the unit's own, in falling order within a
    split; `fired` a uniform sample of those it fires in (none where it was not kept). `near` are windows in
    which it is silent though it might have fired, `near_reasons` (of NEAR_REASONS) why. `partners` of the joined
    lists (random, top, fired, near) say for heads how many tokens back the source token lies. `histogram`
    counts all tokens of the corpus: below the first edge, between the edges, from the last on.
    """

    random_rows: NDArray[np.int32]
    random: NDArray[np.float32]
    top_rows: NDArray[np.int32]
    top: NDArray[np.float32]
    moments: NDArray[np.float64]
    fired_rows: NDArray[np.int32]
    fired: NDArray[np.float32]
    near_rows: NDArray[np.int32]
    near: NDArray[np.float32]
    near_reasons: NDArray[np.int32]
    nearest: NearestUnits | None
    histogram: NDArray[np.int64]
    histogram_edges: NDArray[np.float64]
    partners: NDArray[np.int16] | None


@dataclass(frozen=True, eq=False)
class LayerHarvest:
    """One harvested source, opened from its folder."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, key: dict[str, Any] | None = None) -> LayerHarvest | None:
        """The harvest in `folder`, or None when there is none, or one of something else (no key: of anything)."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise RequestError(
                f"{folder}/manifest.json cannot be read ({error}); delete {folder} and run again"
            ) from None
        if manifest.get("format_version") != FORMAT_VERSION:
            return None
        return cls(folder, manifest) if key is None or manifest.get("key") == key else None

    @classmethod
    def write(cls, folder: Path, windows: TextWindows, tensors: dict[str, NDArray[Any]]) -> None:
        """Begin a harvest, over what is there; `tensors` is emptied as it is written. `write_near` and `complete`
        come next."""
        (folder / "manifest.json").unlink(missing_ok=True)
        windows.save(folder / "windows.safetensors")
        write_tensor_file(folder / "activations.safetensors", tensors)

    @classmethod
    def write_near(cls, folder: Path, tensors: dict[str, NDArray[Any]]) -> None:
        """Write its near misses; `tensors` is emptied."""
        write_tensor_file(folder / "near.safetensors", tensors)

    @classmethod
    def complete(cls, folder: Path, key: dict[str, Any], facts: dict[str, Any]) -> LayerHarvest:
        """Write the manifest."""
        manifest = {"format_version": FORMAT_VERSION, "key": key, "facts": facts}
        write_json_atomic(folder / "manifest.json", manifest)
        return cls(folder, manifest)

    @cached_property
    def windows(self) -> TextWindows:
        """The kept windows."""
        return TextWindows.load(self.folder / "windows.safetensors")

    @property
    def facts(self) -> dict[str, Any]:
        """n_tokens, n_documents, n_unlexed_documents, kind, is_sparse."""
        facts: dict[str, Any] = self.manifest["facts"]
        return facts

    @cached_property
    def _tensors(self) -> Any:
        return self._opened("activations.safetensors")

    @cached_property
    def _near(self) -> Any:
        return self._opened("near.safetensors")

    def _opened(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        try:
            return safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"{path} cannot be read ({error}); delete {self.folder} and run again"
            ) from None

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset([*self._tensors.keys(), *self._near.keys()])

    @cached_property
    def _random_rows(self) -> NDArray[np.int32]:
        return np.asarray(self._tensors.get_tensor("random.row"))

    @cached_property
    def indices(self) -> NDArray[np.int32]:
        """The units of the source that were kept, rising."""
        return np.asarray(self._tensors.get_tensor("unit.index"))

    @cached_property
    def maxima(self) -> NDArray[np.float64]:
        """The largest activation of every kept unit over the corpus."""
        return np.asarray(self._tensors.get_tensor("moments")[:, 5])

    def unit(self, index: int) -> UnitActivations:
        """What was kept of one unit, by its index in the source; only its part of the file is read.

        Raises RequestError for a unit that was not harvested.
        """
        column = int(np.searchsorted(self.indices, index))
        if column == len(self.indices) or self.indices[column] != index:
            raise RequestError(f"unit {index} was not harvested into {self.folder}; harvest it")
        tensors = self._tensors
        top_rows, top, top_partners = self._listed("top", column)
        fired_rows, fired, fired_partners = self._listed("fired", column)
        near_rows, near, near_partners = self._listed("near", column)
        reasons = np.asarray(self._near.get_tensor("near.reason"))
        partners = None
        if top_partners is not None:
            random_partners = tensors.get_slice("random.partners")[column]
            lists = [random_partners, top_partners, fired_partners, near_partners]
            partners = np.concatenate([own for own in lists if own is not None])
        return UnitActivations(
            random_rows=self._random_rows,
            random=self._random(column),
            top_rows=top_rows,
            top=top,
            moments=tensors.get_slice("moments")[column],
            fired_rows=fired_rows,
            fired=fired,
            near_rows=near_rows,
            near=near,
            near_reasons=reasons[np.asarray(self._near.get_slice("near.row")[column]) >= 0],
            nearest=self._nearest(column),
            histogram=tensors.get_slice("histogram")[column],
            histogram_edges=np.asarray(tensors.get_tensor("histogram.edge")),
            partners=partners,
        )

    def _listed(
        self, name: str, column: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.int16] | None]:
        """Rows, activations and partners of a unit's list; empty where it was not kept."""
        if f"{name}.row" not in self._names:
            length = self._tensors.get_slice("top.activations").get_shape()[2]
            return np.zeros(0, dtype=np.int32), np.zeros((0, length), dtype=np.float32), None
        tensors = self._near if name == "near" else self._tensors
        rows = np.asarray(tensors.get_slice(f"{name}.row")[column])
        held = rows >= 0
        activations = tensors.get_slice(f"{name}.activations")[column].astype(np.float32)[held]
        if f"{name}.partners" not in self._names:
            return rows[held], activations, None
        return rows[held], activations, tensors.get_slice(f"{name}.partners")[column][held]

    def _random(self, column: int) -> NDArray[np.float32]:
        """The uniform sample of a unit `[window, length]`."""
        tensors = self._tensors
        if "random.begin" not in self._names:
            return np.asarray(tensors.get_slice("random.activations")[column].astype(np.float32))
        begin, end = (int(place) for place in tensors.get_slice("random.begin")[column : column + 2])
        length = tensors.get_slice("top.activations").get_shape()[2]
        dense = np.zeros((len(self._random_rows), length), dtype=np.float32)
        if end > begin:
            window, position, value = (
                tensors.get_slice(f"random.{name}")[begin:end] for name in ("window", "position", "value")
            )
            dense[window, position] = value
        return dense

    def _nearest(self, column: int) -> NearestUnits | None:
        if "nearest.unit" not in self._names:
            return None
        own = {
            name: np.asarray(self._tensors.get_slice(f"nearest.{name}")[column])
            for name in ("unit", "pearson", "jaccard", "cosine")
            if f"nearest.{name}" in self._names
        }
        return NearestUnits(self.indices[own["unit"]], own["pearson"], own["jaccard"], own.get("cosine"))

    def __repr__(self) -> str:
        return f"LayerHarvest({str(self.folder)!r}, {self.facts['n_tokens']} tokens)"
