"""Files that appear whole or not at all: written beside their place, then renamed over it.

`os.replace` is atomic on one file system, and the temporary name is a sibling, so a reader sees the old
file or the new one, and a killed writer leaves only a `.tmp` file behind.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuron_lens.errors import RequestError

__all__ = ["atomic_path", "write_bytes_atomic", "write_json_atomic", "write_text_atomic"]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; renamed to `path` on success, removed on failure.

    The file can be read by whom the folder's files can, whoever writes it (safetensors shuts all but the owner out).

    Missing parent folders are made. Raises RequestError when the folder cannot be written to or `path`
    is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise RequestError(f"cannot write the file {target}: it is a folder; give a file name inside it")
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
    except OSError as error:
        raise RequestError(
            f"cannot write in the folder {target.parent}: {error.strerror or error}; "
            "choose another folder or change its permissions"
        ) from error
    try:
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically. Raises RequestError when the folder cannot be written to."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8 and with its line ends as they are."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | os.PathLike[str], value: Any, *, indent: int | None = 2) -> None:
    """Write `value` to `path` atomically as JSON with a final newline.

    NaN and infinities are refused (ValueError): they are not JSON, and other readers reject them.
    """
    write_text_atomic(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")
