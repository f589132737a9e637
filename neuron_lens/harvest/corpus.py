"""Documents to annotated windows: where the text comes from, how it is cut, and what Python says about it.

A document is cut into rows of at most `row_length` tokens, the most the model reads at once. Rows
overlap: the first `context` tokens of every row but a document's first are there to be read only, so that
every token is kept exactly once and none but a document's first lacks left context. The kept part of a
row is cut into windows of one length. Rows, not windows, are dealt out to train, validation and test, by
a hash of the place: parts never share a token, and neighbouring windows stay together.

Knows no model: tokens and text only.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neuron_lens.errors import RequestError
from neuron_lens.harvest.documents import Document, documents_of_file, documents_of_rows, files_of
from neuron_lens.windows import SPLITS, IntArray, TextWindows

__all__ = [
    "Corpus",
    "Document",
    "Row",
    "TextTokenizer",
    "WindowShape",
    "cut",
    "split_of",
    "split_sizes",
]

# Of every ten rows: six train, two validation, two test.
_SPLIT_BY_TENTH = (0, 0, 0, 0, 0, 0, 1, 1, 2, 2)


class TextTokenizer(Protocol):
    """What is needed of a tokenizer (`neuron_lens.tokenizers` has it)."""

    def encode(self, text: str, *, bos: bool | None = None) -> Sequence[int]:
        """Text to token ids."""

    def offsets(
        self, text: str, *, bos: bool | None = None
    ) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        """Text to token ids, and the characters each covers."""


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """How documents are cut: lengths in tokens."""

    length: int = 64
    row_length: int = 256
    context: int = 64

    def __post_init__(self) -> None:
        room = self.row_length - self.context
        if not (self.length > 0 and self.context >= 0 and room > 0 and room % self.length == 0):
            raise RequestError(
                f"rows of {self.row_length} tokens with {self.context} of context cannot be cut into windows "
                f"of {self.length}: row_length - context must be a positive multiple of length"
            )
        if self.context % self.length:
            raise RequestError(
                f"context ({self.context}) must be a multiple of the window length ({self.length})"
            )

    @classmethod
    def fitting(cls, n_ctx: int) -> WindowShape:
        """The default shape, smaller where the model reads less than that at once."""
        if n_ctx >= cls.row_length:
            return cls()
        length = max(1, min(cls.length, n_ctx // 4))
        return cls(length=length, context=length, row_length=n_ctx // length * length)


@dataclass(frozen=True, eq=False)
class Row:
    """What the model reads at once: `ids` of one document from token `start`; from `keep_from` on they
    are kept."""

    document: int
    start: int
    keep_from: int
    ids: IntArray
    split: int


class Corpus:
    """Documents that can be read as often as needed: `name`, `fingerprint`, and iteration.

    `paths`, `base` and `text_key` are those by which `of_paths` alone opens the same text, from everywhere; `paths` is
    None where there are none.
    """

    paths: tuple[str, ...] | None = None
    base: str | None = None
    text_key: str = "text"

    def __init__(self, name: str, read: Callable[[], Iterator[Document]]) -> None:
        """`read` begins anew at every call. Raises RequestError when there is no text at all."""
        self.name = name
        self._read = read
        digest = hashlib.blake2b(digest_size=16)
        self.n_documents = 0
        for document in self:
            self.n_documents += 1
            for part in (document.name, document.text):
                digest.update(len(part).to_bytes(8, "little") + part.encode("utf-8", "surrogatepass"))
        if self.n_documents == 0:
            raise RequestError(
                f"the corpus {name} is empty: no document with any text in it; give other files"
            )
        self.fingerprint = digest.hexdigest()

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self._read() if document.text.strip())

    @classmethod
    def of_documents(cls, documents: Iterable[Document], name: str = "documents") -> Corpus:
        """A corpus of documents held in memory."""
        held = tuple(documents)
        return cls(name, lambda: iter(held))

    @classmethod
    def of_paths(
        cls,
        paths: Sequence[str | Path],
        name: str | None = None,
        *,
        text_key: str = "text",
        base: str | None = None,
    ) -> Corpus:
        """Files, folders (searched for text files), globs, and addresses of remote files that blobfile opens.

        Of `.jsonl` and `.jsonl.gz` every line is a document, of `.parquet` (extra `parquet`) every row: an
        object with `text_key` and, if it likes, "path" or "name". Relative paths begin at `base` (default: the working
        folder), which is no part of documents' names.

        Raises RequestError for a path that matches nothing, a named file that is not UTF-8, a bad line, a column
        that is not there, or no text at all; CheckpointError for a remote file that cannot be fetched.
        """
        given = [str(path) for path in paths]
        own = "" if base is None else os.path.join(base, "")
        places = [
            path if "://" in path else own + path if not os.path.isabs(path) else path for path in given
        ]
        files = [
            (file, "" if place == path else own)
            for path, place in zip(given, places, strict=True)
            for file in files_of(place)
        ]
        name = name or ", ".join(str(path) for path in paths)
        corpus = cls(
            name,
            lambda: (
                Document(document.name.removeprefix(prefix), document.text)
                for file, prefix in files
                for document in documents_of_file(file, text_key)
            ),
        )
        corpus.paths, corpus.base, corpus.text_key = tuple(given), base or os.getcwd(), text_key
        return corpus

    @classmethod
    def of_rows(
        cls,
        rows: Iterable[Mapping[str, Any]],
        name: str = "rows",
        *,
        text_key: str = "text",
        name_key: str | None = None,
    ) -> Corpus:
        """A Hugging Face `datasets.Dataset` (one split), or any iterable of mappings that can be read again.

        Raises RequestError for an iterator that is used up by reading it once, rows without `text_key`, or no
        text at all.
        """
        if isinstance(rows, Iterator):
            raise RequestError(
                "a corpus is read more than once, and this iterator only goes through once; give a list, a "
                "data set, or an object whose __iter__ begins anew"
            )
        return cls(name, lambda: documents_of_rows(rows, name, text_key, name_key))

    def rows(
        self,
        tokenizer: TextTokenizer,
        shape: WindowShape,
        seed: int = 0,
        documents: range | None = None,
        begin: tuple[int, int] = (0, 0),
    ) -> Iterator[Row]:
        """The rows of all documents, or of a range of them, in order, from row `begin` on (document, start).

        Documents before that are read, not tokenised.
        """
        for index, document in enumerate(self):
            if documents is not None and index >= documents.stop:
                return
            if index < begin[0] or (documents is not None and index not in documents):
                continue
            ids = np.asarray(tokenizer.encode(document.text, bos=False), dtype=np.int32)
            for row in cut(index, ids, shape, seed):
                if (index, row.start) >= begin:
                    yield row


def cut(document: int, ids: IntArray, shape: WindowShape, seed: int = 0) -> Iterator[Row]:
    """The rows of one document."""
    stride = shape.row_length - shape.context
    start = 0
    while start == 0 or start + shape.context < len(ids):
        keep_from = shape.context if start else 0
        row = ids[start : start + shape.row_length]
        if len(row):
            yield Row(document, start, keep_from, row, split_of(document, start, seed))
        start += stride


def split_of(document: int, row_start: int, seed: int = 0) -> int:
    """Which of SPLITS a row belongs to: a hash of its place, the same in every run."""
    digest = hashlib.blake2b(f"{seed}:{document}:{row_start}".encode(), digest_size=8).digest()
    return _SPLIT_BY_TENTH[int.from_bytes(digest, "little") % 10]


def split_sizes(windows: TextWindows) -> dict[str, int]:
    """How many windows each part holds."""
    return {name: int((windows.split == code).sum()) for code, name in enumerate(SPLITS)}
