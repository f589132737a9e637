"""Judges' answers already paid for, on disk: see `answer_file`. Failures are never stored."""

from __future__ import annotations

import asyncio
import os
import time
from typing import ClassVar

from pydantic import ValidationError

from neuron_lens.errors import BackendError
from neuron_lens.llm.answer_file import AnswerFile
from neuron_lens.llm.backend import Backend, Capabilities, request_key
from neuron_lens.llm.request import Request, Response, Usage, problems_of

__all__ = ["CachedBackend", "RequestCache"]


class RequestCache(AnswerFile):
    """Responses by key, in a file; see `AnswerFile`. The first answer stored under a key stays."""

    called: ClassVar[str] = "request cache"
    table: ClassVar[str] = "answers"
    columns: ClassVar[str] = """(
        key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, request TEXT NOT NULL, response TEXT NOT NULL,
        created REAL NOT NULL
    ) WITHOUT ROWID"""
    format: ClassVar[int] = 1

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

    def put(self, key: str, response: Response, *, kind: str, model: str, request: Request) -> Response:
        """Store a response and return what is stored: the first one, when another process was quicker."""
        row = (key, kind, model, request.canonical, response.model_dump_json(), time.time())
        with self._connected() as connection:
            connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?)", row)
        stored = self.get(key)
        assert stored is not None, "a row just stored is there"
        return stored


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
