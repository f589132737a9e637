"""What `torch.save` wrote, read so that no code in it can run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from neuron_lens.errors import CheckpointError

__all__ = ["read_pickle", "unpickled"]


def read_pickle(path: Path) -> dict[str, Any]:
    """Names with tensors, numbers, strings and collections of these; see `unpickled`.

    Raises CheckpointError as `unpickled` does, or for a file that holds no names.
    """
    loaded = unpickled(path)
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return {str(name): value for name, value in loaded.items()}


def unpickled(path: Path) -> Any:
    """Tensors, numbers, strings and collections of these, mapped into memory where the file allows it.

    Raises CheckpointError for a file that is truncated or corrupt, or holds anything else (refused, never run).
    """
    import torch

    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # files of torch before 1.6 are no archives and cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: its pickle holds more than tensors and plain values, or it is damaged. Loading it "
            "could run code. Convert it to safetensors where you trust it."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
