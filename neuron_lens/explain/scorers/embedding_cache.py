"""Vectors that an embeddings endpoint was paid for, on disk: see `llm.answer_file`. What failed is never stored."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import BackendError
from neuron_lens.llm import AnswerFile, key_of

__all__ = ["EmbeddingCache"]

# Raise it when the same text would be sent or its vector read differently, so that older vectors do not count.
_KEY_VERSION = 1
_NUMBERS = np.dtype("<f8")  # what is written in JSON is read as float64: nothing is lost


class EmbeddingCache(AnswerFile):
    """Vectors by text and by who gives them, bit for bit; see `AnswerFile`. The first one stored stays.

    `embedder` is a text that differs whenever the same text might get another vector, see `llm.Backend.identity`.
    """

    called: ClassVar[str] = "embedding cache"
    table: ClassVar[str] = "vectors"
    columns: ClassVar[str] = (
        "(key TEXT PRIMARY KEY, embedder TEXT NOT NULL, vector BLOB NOT NULL, created REAL NOT NULL)"
    )
    format: ClassVar[int] = 1

    def get(self, embedder: str, texts: Iterable[str]) -> dict[str, NDArray[np.float64]]:
        """Those of the texts that have a vector, each `[dimension]`. Raises BackendError for one that is damaged."""
        found: dict[str, NDArray[np.float64]] = {}
        with self._connected() as connection:
            for text in texts:
                key = (key_of(_KEY_VERSION, embedder, text),)
                row = connection.execute("SELECT vector FROM vectors WHERE key = ?", key).fetchone()
                if row is not None:
                    found[text] = self._read(row[0])
        return found

    def put(
        self, embedder: str, vectors: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        """Store vectors, all or none, and return what is stored: the first ones, where another process was quicker.

        A vector that is empty or not finite is a failure: it is neither stored nor returned.
        """
        there = {text: row for text, row in vectors.items() if row.size and np.isfinite(row).all()}
        rows = [
            (key_of(_KEY_VERSION, embedder, text), embedder, row.astype(_NUMBERS).tobytes(), time.time())
            for text, row in there.items()
        ]
        with self._connected() as connection, connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?, ?, ?)", rows)
        return self.get(embedder, there)

    def _read(self, stored: bytes) -> NDArray[np.float64]:
        if not stored or len(stored) % _NUMBERS.itemsize:
            raise BackendError(f"{self.path} holds a vector that cannot be read: it has {len(stored)} bytes")
        return np.frombuffer(stored, dtype=_NUMBERS).astype(np.float64)
