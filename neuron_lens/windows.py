"""Windows of documents as columns: what many units share about the text they were seen on.

Numpy only. A column holds one integer per token: its id, or a code of an annotation whose names are kept
beside it. Every window carries its left context, as far as the model had read it, and the token after it.
Columns are as narrow as their values allow; those of a file stay there and are read as they are looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.files.mapped import release_pages
from neuron_lens.files.tensor_file import map_tensor_file, write_tensor_file
from neuron_lens.records import TokenWindow

__all__ = ["ABSENT", "SPLITS", "Column", "IntArray", "TextWindows"]

IntArray = NDArray[np.int32]
Column = NDArray[np.signedinteger[Any]]

ABSENT = -1  # the code of "no token here": outside the document, or before the model's context

SPLITS = ("train", "validation", "test")

_STRIDE = np.int64(2**31)
_AT_ONCE = 2**14  # windows of a file that are looked at together

_PLACES = ("document", "start", "character_start", "context_position", "split")


@dataclass(frozen=True, kw_only=True, eq=False)
class TextWindows:
    """Windows of one length: arrays `[window]` that place them, and columns `[window, context + length + 1]`.

    In a column, the entries `context : context + length` are the window's own tokens, those before are the
    left context, and the last one is the token that follows. `split` indexes `SPLITS`.
    """

    length: int
    context: int
    documents: Mapping[int, str]  # names, by document index, of the documents that have windows here
    token_texts: tuple[str, ...]  # by id
    names: dict[str, tuple[str, ...]]  # names of the codes of each annotation column
    document: IntArray
    start: IntArray
    character_start: IntArray
    context_position: IntArray
    split: IntArray
    columns: dict[str, Column]

    def __len__(self) -> int:
        return len(self.document)

    @property
    def present(self) -> NDArray[np.bool_]:
        """Where a window has a token, `[window, length]` (the last window of a document can be short)."""
        ids = self.columns["token"]
        own = slice(self.context, self.context + self.length)
        present = np.empty((len(ids), self.length), dtype=np.bool_)
        for begin in range(0, len(ids), _AT_ONCE):
            here = slice(begin, begin + _AT_ONCE)
            np.not_equal(ids[here, own], ABSENT, out=present[here])
            release_pages(ids)
        return present

    def select(self, rows: NDArray[np.integer[Any]]) -> TextWindows:
        """Some of the windows, as windows of their own, in memory."""
        own = {name: getattr(self, name)[rows] for name in _PLACES}
        columns = {name: np.asarray(column[rows], dtype=np.int32) for name, column in self.columns.items()}
        return replace(self, **own, columns=columns)

    def rows_of(self, document: Sequence[int] | IntArray, start: Sequence[int] | IntArray) -> IntArray:
        """The row of each window, by its identity. Raises RequestError for one that is not here."""
        rising, order = self._places
        wanted = np.asarray(document, dtype=np.int64) * _STRIDE + np.asarray(start, dtype=np.int64)
        found = np.minimum(np.searchsorted(rising, wanted), len(rising) - 1)
        if not np.array_equal(rising[found], wanted):
            raise RequestError("a window was asked for that was not kept; harvest the corpus again")
        return np.asarray(order[found], dtype=np.int32)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The windows' places as numbers, rising, and the row of each."""
        own = self.document.astype(np.int64) * _STRIDE + self.start
        order = np.argsort(own, kind="stable")
        return own[order], order

    def record(
        self,
        row: int,
        activations: NDArray[np.floating[Any]],
        preceding: int = 12,
        annotations: Sequence[str] = ("lexical_class",),
        partners: NDArray[np.integer[Any]] | None = None,
    ) -> TokenWindow:
        """The window of `row` as a record, with one unit's activations `[length]`.

        `partners` `[length]`: of a head, how many tokens back the token lies that contributes most.
        """
        here = slice(self.context, self.context + self.length)
        ids = self.columns["token"][row]
        own = ids[here][ids[here] != ABSENT]
        before = ids[self.context - min(preceding, self.context) : self.context]
        said = {
            name: tuple(self.names[name][code] for code in self.columns[name][row, here][: len(own)])
            for name in annotations
        }
        return TokenWindow(
            document=self.documents[self.document[row]],
            document_index=int(self.document[row]),
            start=int(self.start[row]),
            character_start=int(self.character_start[row]),
            context_position=int(self.context_position[row]),
            tokens=tuple(self.token_texts[token] for token in own),
            ids=tuple(int(token) for token in own),
            activations=tuple(round(float(value), 4) for value in activations[: len(own)]),
            preceding=tuple(self.token_texts[token] for token in before if token != ABSENT),
            annotations=said,
            sources=None
            if partners is None
            else tuple(max(place - int(back), -1) for place, back in enumerate(partners[: len(own)])),
        )

    def save(self, path: Path) -> None:
        """Write to one safetensors file, atomically; names travel in its metadata, those of documents as JSON."""
        tensors: dict[str, NDArray[Any]] = {f"place.{name}": getattr(self, name) for name in _PLACES}
        tensors |= {f"column.{name}": column for name, column in self.columns.items()}
        names = json.dumps(list(self.documents.items())).encode()
        tensors["documents"] = np.frombuffer(names, dtype=np.uint8)
        facts = {
            "length": self.length,
            "context": self.context,
            "token_texts": self.token_texts,
            "names": self.names,
        }
        write_tensor_file(path, tensors, {"facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> TextWindows:
        """Open what `save` wrote; columns stay in the file. Raises RequestError when the file is not that."""
        try:
            metadata, tensors = map_tensor_file(path)
            facts = json.loads(metadata["facts"])
            return cls(
                length=facts["length"],
                context=facts["context"],
                documents=dict(json.loads(tensors["documents"].tobytes())),
                token_texts=tuple(facts["token_texts"]),
                names={name: tuple(names) for name, names in facts["names"].items()},
                columns={name[7:]: held for name, held in tensors.items() if name.startswith("column.")},
                **{name: tensors[f"place.{name}"] for name in _PLACES},
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise RequestError(
                f"{path} does not hold harvested windows ({error}); delete it and run again"
            ) from None
