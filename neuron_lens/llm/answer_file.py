"""A file of answers already paid for: one table in SQLite, shared by threads and processes, safe under SIGKILL.

The write-ahead log with full synchronisation makes an answer durable before it is handed on, so that a killed
run asks nothing twice. What is asked and answered is known to the caches built on this (`cache`, and the embedding
scorer's), not here. https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from neuron_lens.errors import BackendError

__all__ = ["AnswerFile", "key_of"]

_BUSY_SECONDS = 60.0
_TABLES = "SELECT name FROM sqlite_master WHERE name NOT LIKE 'sqlite~_%' ESCAPE '~'"  # without SQLite's own indices


def key_of(*parts: object) -> str:
    """What an answer is stored under: SHA-256 over the JSON of all that decides it. [hex, 64 characters]"""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


class AnswerFile:
    """Base of the caches of answers by key, in the file `path` (made when it is not there).

    `path` None: a nameless one that SQLite keeps in memory, and on disk where it grows large, for this object and this
    process only. Else it may be used from any thread, and the file from any number of processes on one machine.

    A subclass says how errors call it (`called`), which `table` it keeps with which `columns` (SQL, in brackets; `key
    TEXT PRIMARY KEY` is among them), and the number of that `format`, raised when the columns mean something else.

    Raises BackendError when the file cannot be used or is something else.
    """

    called: ClassVar[str]
    table: ClassVar[str]
    columns: ClassVar[str]
    format: ClassVar[int]

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._lock = threading.Lock()
        self._open_in: int | None = None  # the process whose connection this is
        self._connection: sqlite3.Connection | None = None
        self._of_parents: list[sqlite3.Connection] = []
        with self._connected():
            pass

    def __len__(self) -> int:
        with self._connected() as connection:
            (count,) = connection.execute(f"SELECT count(*) FROM {self.table}").fetchone()
            return int(count)

    def has(self, key: str) -> bool:
        """Whether there is an answer under `key`."""
        with self._connected() as connection:
            found = connection.execute(f"SELECT 1 FROM {self.table} WHERE key = ?", (key,))
            return found.fetchone() is not None

    def close(self) -> None:
        """Close the file. The cache opens it again when it is used; a nameless one is then empty."""
        with self._lock:
            if self._connection is not None and self._open_in == os.getpid():
                self._connection.close()
                self._connection = None

    def __del__(self) -> None:
        if getattr(self, "_lock", None) is not None:  # __init__ may not have come so far
            self.close()

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        """The connection of this process, for one thread at a time, with SQLite's errors as ours."""
        with self._lock:
            try:
                if self._connection is not None and self._open_in != os.getpid():
                    # After a fork the parent's connection may be neither used nor closed: it is put aside.
                    self._of_parents.append(self._connection)
                    self._connection = None
                if self._connection is None:
                    self._connection, self._open_in = self._open(), os.getpid()
                yield self._connection
            except (sqlite3.Error, OSError) as error:
                raise BackendError(
                    f"the {self.called} {self.path or 'without a file'} cannot be used: {error}; it must be a file this "
                    "library made, in a folder that can be written to, on a disk of this machine (SQLite's log does not "
                    "work over a network)"
                ) from error

    def _open(self) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        # autocommit: every statement is its own transaction unless one is begun; `_lock` keeps threads apart.
        # SQLite takes an empty name as a temporary database: https://www.sqlite.org/inmemorydb.html
        connection = sqlite3.connect(
            self.path or "", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        with connection:  # both are read at one moment: another process may be making the file
            connection.execute("BEGIN")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            tables = [name for (name,) in connection.execute(_TABLES)]
        ours = version == self.format and self.table in tables
        if not ours and (version or tables):
            raise BackendError(
                f"{self.path} is not {_a(self.called)} this version reads: expected format {self.format} with the table "
                f"{self.table!r}, found {version} with {len(tables)} tables{_listed(tables)}; give another file"
            )
        _switch_to_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        if not ours:
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(f"CREATE TABLE IF NOT EXISTS {self.table} {self.columns}")
                connection.execute(f"PRAGMA user_version = {self.format}")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _listed(tables: list[str]) -> str:
    return f" ({', '.join(tables)})" if tables else ""


def _switch_to_write_ahead_log(connection: sqlite3.Connection) -> None:
    """Set the journal mode, waiting for other processes: SQLite's own busy timeout does not cover this step."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
