"""What `torch.save` wrote, read so that no code in it can run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from neuron_lens.errors import CheckpointError

__all__ = ["read_pickle"]


def read_pickle(path: Path) -> dict[str, Any]:
    """Names with tensors, numbers, strings and collections of these, mapped into memory where the file allows it.

    Raises CheckpointError for a file that is truncated or corrupt, holds anything else (which is refused, never run), or
    holds no names.
    """
    import torch

    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # files of torch before 1.6 are no archives and cannot be mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: its pickle holds more than tensors and plain values, or it is damaged. Loading it "
            f"could run code. Convert it to safetensors where you trust it. ({_first_line(error)})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated or corrupt: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not named tensors")
    return {str(name): value for name, value in loaded.items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
