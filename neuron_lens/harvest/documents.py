"""Where text comes from: files of several kinds, here or remote, and rows of data sets, one document after the
other.

Everything streams: a file is read line by line or a batch of rows at a time, and can be read again.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from neuron_lens.errors import RequestError
from neuron_lens.files.remote import is_remote, local_copy

__all__ = ["Document", "documents_of_file", "documents_of_rows", "files_of"]

# What a folder is searched for; a file named outright is read whatever its name.
_TEXT_SUFFIXES = frozenset((
    ".c", ".cfg", ".cpp", ".css", ".go", ".h", ".html", ".ini", ".java", ".js", ".json", ".jsonl",
    ".md", ".parquet", ".py", ".pyi", ".rs", ".rst", ".toml", ".ts", ".txt", ".yaml", ".yml",
))  # fmt: skip

_NAME_KEYS = ("path", "name")  # of a row, where it says what it is called


@dataclass(frozen=True)
class Document:
    """A text and the name it goes by."""

    name: str
    text: str


def files_of(path: str) -> list[str]:
    """The files a path stands for, sorted: a file, a folder searched for text files, a glob, or the address of
    one remote file. Raises RequestError for a path that matches nothing."""
    if is_remote(path):
        return [path]
    here = Path(path)
    if here.is_file():
        return [str(here)]
    if here.is_dir():
        found = [file for file in here.rglob("*") if file.is_file() and _is_text_name(file.relative_to(here))]
    else:
        found = [Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file()]
    if not found:
        what = (
            "a folder without text files"
            if here.is_dir()
            else "no file, folder or pattern that matches a file"
        )
        raise RequestError(
            f"corpus path {path!r}: {what}; give text, .jsonl or .parquet files, folders, globs or the "
            "address of a remote file"
        )
    return [str(file) for file in sorted(found)]


def _is_text_name(path: Path) -> bool:
    hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts)
    return not hidden and (path.suffix in _TEXT_SUFFIXES or path.name.endswith(".jsonl.gz"))


def documents_of_file(file: str, text_key: str = "text") -> Iterator[Document]:
    """The documents of one file: of `.jsonl(.gz)` one a line, of `.parquet` one a row, else the whole file.

    Raises RequestError for a file that cannot be read as what its name says, or a row without a text.
    """
    path = local_copy(file)
    plain = file.partition("?")[0] if is_remote(file) else file
    if plain.endswith(".parquet"):
        yield from documents_of_rows(_parquet_rows(path, file, text_key), file, text_key)
    elif plain.removesuffix(".gz").endswith(".jsonl"):
        yield from documents_of_rows(_lines(path, file), file, text_key)
    else:
        try:
            with _opened(path) as stream:
                text = stream.read().decode("utf-8-sig")
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise _unreadable(file, error) from None
        yield Document(file, text)


def documents_of_rows(
    rows: Iterable[Any], origin: str, text_key: str = "text", name_key: str | None = None
) -> Iterator[Document]:
    """Rows that are mappings as documents, named by `name_key` ("path" or "name" where they have one), else by
    origin and number from 1. Raises RequestError for a row that is no mapping or has no text."""
    keys = _NAME_KEYS if name_key is None else (name_key,)
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue  # an empty line
        place = f"{origin}, line {number}" if "jsonl" in origin else f"{origin}, row {number}"
        if not isinstance(row, Mapping):
            raise RequestError(
                f"{place}: expected an object with {text_key!r}, got {type(row).__name__}; of a data set with "
                "several splits, give one split"
            )
        text = row.get(text_key)
        if not isinstance(text, str):
            has = ", ".join(repr(key) for key in list(row)[:8]) or "nothing"
            has += f", and {text_key!r} is {type(text).__name__}" if text_key in row else ""
            raise RequestError(
                f"{place}: expected an object with {text_key!r} that is a string; it has {has}; say which holds the "
                "text with text_key=… (by command: --text-key)"
            )
        name = next((row[key] for key in keys if row.get(key) is not None), None)
        if name is None and name_key is not None:
            raise RequestError(f"{place}: has no {name_key!r} to be named by")
        yield Document(f"{origin}:{number}" if name is None else str(name), text)


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _lines(path: Path, file: str) -> Iterator[Any]:
    """What each line of a JSONL file says; None for an empty one."""
    number = 0
    try:
        with _opened(path) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as lines:
            for line in lines:
                number += 1
                yield json.loads(line) if line.strip() else None
    except json.JSONDecodeError as error:
        raise RequestError(f"{file}, line {number}: not JSON ({error}); expected an object a line") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from None


def _parquet_rows(path: Path, file: str, text_key: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, only the columns that are used."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise RequestError(f"{file} needs pyarrow to be read: pip install 'neuron-lens[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as opened:
            names = opened.schema_arrow.names
            wanted = [name for name in (text_key, *_NAME_KEYS) if name in names]
            if text_key not in names:
                raise RequestError(
                    f"{file} has no column {text_key!r}: it has {', '.join(map(repr, names))}; say which holds the "
                    "text with text_key=… (by command: --text-key)"
                )
            for batch in opened.iter_batches(batch_size=1024, columns=wanted):
                yield from batch.to_pylist()
    except (OSError, arrow.ArrowException) as error:
        raise RequestError(f"cannot read {file} as Parquet: {error}; leave it out or write it anew") from None


def _unreadable(file: str, error: Exception) -> RequestError:
    return RequestError(f"cannot read {file} as UTF-8 text: {error}; leave it out or convert it")
