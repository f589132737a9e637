"""The file that an interrupted training run goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.files.atomic import atomic_path
from neuron_lens.files.pickles import read_pickle

__all__ = ["read_checkpoint", "write_checkpoint"]

_VERSION = 1


def write_checkpoint(path: Path, held: dict[str, Any]) -> None:
    """Write whole or not at all."""
    with atomic_path(path) as temporary:
        torch.save({**held, "version": _VERSION}, temporary)


def read_checkpoint(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """What was written, or None when there is nothing.

    Raises:
        CheckpointError: the file is not a checkpoint, or cut off.
        RequestError: it belongs to a run of other settings, another model or another corpus; says which.
    """
    if not path.exists():
        return None
    try:
        saved = read_pickle(path)
        known, version = json.loads(saved["key"]), saved["version"]
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole training checkpoint ({error}); delete it to begin anew"
        ) from None
    if version != _VERSION:
        raise CheckpointError(
            f"{path} is of version {version}, this release writes {_VERSION}; delete it to begin anew"
        )
    wanted = json.loads(json.dumps(key))
    if known != wanted:
        raise RequestError(
            f"{path} belongs to another run ({_difference(known, wanted)}); give the same settings, or another folder"
        )
    return saved


def _difference(known: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two runs, in words."""
    said = [
        f"{name} was {known['settings'].get(name)!r}, now {value!r}"
        for name, value in wanted["settings"].items()
        if known["settings"].get(name) != value
    ]
    parts = {"model": "model", "corpus": "corpus", "stored": "way to its activations, stored or not"}
    return "; ".join(
        [
            *said,
            *(f"another {words}" for part, words in parts.items() if known.get(part) != wanted.get(part)),
        ]
    )
