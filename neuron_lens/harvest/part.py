"""A part of a harvest on disk: everything held after a range of documents, or after some of it.

    manifest.json         what was harvested (key), which documents, how far it is, and the name of
    part-<n>.safetensors  the keepers' state after n tokens, with the same manifest in its metadata

The tensors are whole under a name of their own before the manifest, renamed over the last one, speaks of them:
a pass killed at any moment leaves the last part or the new one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.files.tensor_file import write_tensor_file
from neuron_lens.harvest.keepers import State

__all__ = ["PART_VERSION", "HarvestPart", "Progress"]

PART_VERSION = 1


class Progress(BaseModel):
    """How far a pass is: the row it goes on with (document, start), and what it has read."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_document: int
    last_document: int  # exclusive
    next_document: int
    next_start: int
    n_tokens: int
    is_complete: bool


@dataclass(frozen=True)
class HarvestPart:
    """A part, opened from its folder; `key` says what it was harvested from and how."""

    folder: Path
    key: dict[str, Any]
    progress: Progress
    tensors: str

    @classmethod
    def open(cls, folder: Path) -> HarvestPart | None:
        """The part in a folder, None when there is none. Raises RequestError for one that is damaged."""
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            part = cls(folder, manifest["key"], Progress(**manifest["progress"]), str(manifest["tensors"]))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise RequestError(
                f"{folder}/manifest.json is not that of a part of a harvest ({error}); delete {folder} and run again"
            ) from None
        return part if manifest.get("version") == PART_VERSION else None

    def state(self, start: str = "") -> State:
        """The keepers' state, or the part of it whose names begin so, without that. Raises RequestError when the file is
        damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / self.tensors, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(start)]  # noqa: SIM118
                return {name.removeprefix(start): file.get_tensor(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise RequestError(
                f"{self.folder / self.tensors} cannot be read ({error}); delete {self.folder} and run again"
            ) from None

    @classmethod
    def write(cls, folder: Path, key: dict[str, Any], progress: Progress, state: State) -> HarvestPart:
        """Write a part over the last one of this folder; `state` is emptied as it is written."""
        name = f"part-{progress.n_tokens}.safetensors"
        manifest = {
            "version": PART_VERSION,
            "key": key,
            "progress": progress.model_dump(),
            "tensors": name,
        }
        tensors = {each: state.pop(each).cpu().numpy() for each in list(state)}
        write_tensor_file(folder / name, tensors, {"manifest": json.dumps(manifest)})
        write_json_atomic(folder / "manifest.json", manifest)
        for old in folder.glob("part-*"):
            if old.name != name:
                old.unlink()  # the one before, or what a killed pass left half written
        return cls(folder, key, progress, name)

    @staticmethod
    def clear(folder: Path) -> None:
        """Delete the part of a folder, and what killed passes left half written there: the harvest is made."""
        for pattern in ("manifest.json*", "part-*"):
            for old in folder.glob(pattern):
                old.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
