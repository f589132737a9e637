"""Answers already paid for, on disk: one SQLite file, shared by threads and processes, safe under SIGKILL.

The write-ahead log with full synchronisation makes an answer durable before it is handed on, so that a killed
run asks nothing twice. Failures are never stored. https://www.sqlite.org/wal.html
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from neuron_lens.errors import BackendError
from neuron_lens.llm.backend import Backend, Capabilities, request_key
from neuron_lens.llm.request import Request, Response, Usage, problems_of

__all__ = ["CachedBackend", "RequestCache"]

_FORMAT = 1
_BUSY_SECONDS = 60.0
_TABLE = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL, response TEXT NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID
"""


class RequestCache:
    """Responses by key, in the file `path` (made when it is not there).

    May be used from any thread, and the file from any number of processes on one machine. The first answer stored
    under a key stays. Raises BackendError when the file cannot be used or is something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._open_in: int | None = None  # the process whose connection this is
        self._connection: sqlite3.Connection | None = None
        self._of_parents: list[sqlite3.Connection] = []
        with self._connected():
            pass

    def __len__(self) -> int:
        with self._connected() as connection:
            (count,) = connection.execute("SELECT count(*) FROM answers").fetchone()
            return int(count)

    def spent(self) -> tuple[int, Usage]:
        """How many answers are stored, and the tokens they took as their backends told them."""
        column = "coalesce(sum(json_extract(response, '$.usage.{}')), 0)"
        columns = ", ".join(["count(*)", *map(column.format, ("prompt_tokens", "completion_tokens"))])
        with self._connected() as connection:
            calls, prompt, completion = connection.execute(f"SELECT {columns} FROM answers").fetchone()
        return int(calls), Usage(prompt_tokens=prompt, completion_tokens=completion)

    def get(self, key: str) -> Response | None:
        """The response stored under `key`, or None."""
        with self._connected() as connection:
            row = connection.execute("SELECT response FROM answers WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        try:
            return Response.model_validate_json(row[0])
        except ValidationError as error:
            raise BackendError(
                f"{self.path} holds an answer that cannot be read: {problems_of(error)}"
            ) from error

    def has(self, key: str) -> bool:
        """Whether there is a response under `key`."""
        with self._connected() as connection:
            return connection.execute("SELECT 1 FROM answers WHERE key = ?", (key,)).fetchone() is not None

    def put(self, key: str, response: Response, *, kind: str, model: str, request: Request) -> Response:
        """Store a response and return what is stored: the first one, when another process was quicker."""
        row = (key, kind, model, request.canonical, response.model_dump_json(), time.time())
        with self._connected() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
        stored = self.get(key)
        assert stored is not None, "a row just stored is there"
        return stored

    def close(self) -> None:
        """Close the file. The cache opens it again when it is used."""
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
                    f"the request cache {self.path} cannot be used: {error}; it must be a file this library made, in "
                    "a folder that can be written to, on a disk of this machine (SQLite's log does not work over a "
                    "network)"
                ) from error

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # autocommit: every statement is its own transaction; `_lock` keeps threads apart
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version != _FORMAT and (version, tables) != (0, 0):
            raise BackendError(
                f"{self.path} is not a request cache this version reads: expected format {_FORMAT}, found {version} "
                f"with {tables} tables; give another file"
            )
        _switch_to_write_ahead_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_TABLE)
        connection.execute(f"PRAGMA user_version = {_FORMAT}")
        connection.execute("COMMIT")


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


class CachedBackend:
    """A backend whose answers are kept: a request is sent once, whoever asks, however often.

    `hits` and `misses` count since it was made. Equal requests in flight at once in one event loop are sent once. Refusals
    are answers and are kept; failures are not.
    """

    def __init__(self, inner: Backend, cache: RequestCache | str | os.PathLike[str]) -> None:
        self.inner = inner
        self.cache = cache if isinstance(cache, RequestCache) else RequestCache(cache)
        self.hits = 0
        self.misses = 0
        self._in_flight: dict[tuple[asyncio.AbstractEventLoop, str], _Turn] = {}

    def __repr__(self) -> str:
        return f"CachedBackend({self.inner!r}, {str(self.cache.path)!r})"

    @property
    def kind(self) -> str:
        """The inner backend's."""
        return self.inner.kind

    @property
    def model(self) -> str:
        """The inner backend's."""
        return self.inner.model

    @property
    def identity(self) -> str:
        """The inner backend's."""
        return self.inner.identity

    @property
    def capabilities(self) -> Capabilities:
        """The inner backend's."""
        return self.inner.capabilities

    @property
    def concurrency(self) -> int:
        """The inner backend's."""
        return self.inner.concurrency

    def has(self, request: Request) -> bool:
        """Whether the request is answered already. For `estimate(..., is_cached=backend.has)`."""
        return self.cache.has(request_key(self.inner, request))

    async def complete(self, request: Request) -> Response:
        """The stored answer, or the inner backend's, which is stored before it is returned."""
        key = request_key(self.inner, request)
        place = (asyncio.get_running_loop(), key)
        turn = self._in_flight.setdefault(place, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                stored = self.cache.get(key)
                if stored is not None:
                    self.hits += 1
                    return stored
                self.misses += 1
                response = await self.inner.complete(request)
                return self.cache.put(key, response, kind=self.kind, model=self.model, request=request)
        finally:
            turn.waiting -= 1
            if turn.waiting == 0:
                self._in_flight.pop(place, None)

    async def aclose(self) -> None:
        """Let go of the inner backend's connections. The cache, which others may share, stays open."""
        await self.inner.aclose()


class _Turn:
    """Who asks for one key: the first goes ahead, the others wait for its answer."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
