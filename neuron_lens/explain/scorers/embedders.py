"""Embedders: texts to vectors. A local model, an endpoint, or, for tests and trials, the spelling of the words.

None is a default: a score is only as good as its embedder, which is always named.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import BackendError, MissingExtraError, RequestError
from neuron_lens.explain.scorers.embedding_cache import EmbeddingCache

__all__ = ["BagOfWords", "Embedder", "EmbeddingEndpoint", "SentenceTransformer", "Unasked", "embedder_named"]

_AT_ONCE = 64  # texts a request
_TEXT_REFUSED = (400, 413, 422)  # the text is at fault, most often too long


@runtime_checkable
class Embedder(Protocol):
    """Texts to vectors. `name` says which embedder, for results; `instructed` whether queries get an instruction."""

    @property
    def name(self) -> str: ...
    @property
    def instructed(self) -> bool: ...

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """`[text, dimension]`; a row that is not finite counts as missing."""
        ...


class BagOfWords:
    """Hashed counts of the words and three-letter pieces of a text. It knows spelling, not meaning."""

    name: ClassVar[str] = "bag_of_words"
    instructed: ClassVar[bool] = False

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """`[text, 512]`."""
        rows = np.zeros((len(texts), 512))
        for row, text in zip(rows, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                for piece in {word, *(word[at : at + 3] for at in range(len(word) - 2))}:
                    digest = hashlib.blake2b(piece.encode("utf-8", "surrogatepass"), digest_size=8).digest()
                    row[int.from_bytes(digest) % 512] += 1 if digest[0] % 2 else -1
        return rows


class SentenceTransformer:
    """A local model of the `sentence_transformers` package, loaded when it is first used.

    Raises MissingExtraError when the package is not installed.
    """

    def __init__(self, model: str, *, instructed: bool = False, device: str | None = None) -> None:
        self.name = f"sentence_transformers {model}"
        self.instructed = instructed
        self._model, self._device = model, device
        self._loaded: Any = None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """`[text, dimension]`."""
        if self._loaded is None:
            try:
                import sentence_transformers
            except ImportError:
                raise MissingExtraError("sentence_transformers", "embed", "the local embedder") from None
            self._loaded = sentence_transformers.SentenceTransformer(self._model, device=self._device)
        return np.asarray(self._loaded.encode(list(texts), show_progress_bar=False))


class EmbeddingEndpoint:
    """A model behind an endpoint that speaks OpenAI's protocol (POST /embeddings), through the official client.

    Texts that are refused, for being too long for example, are missing. What it costs is in no budget. A text is asked
    for once: its vector is kept before it is handed on. What failed is asked for again.

    Args:
        model: the model's name at the endpoint.
        base_url: "http://localhost:8000/v1", for example; None for `OPENAI_BASE_URL`, else OpenAI itself.
        api_key: None for `OPENAI_API_KEY`; endpoints other than OpenAI's need none. Never stored or shown.
        instructed: whether the model wants an instruction before a query.
        timeout: seconds one request may take.
        cache: the file that vectors are kept in; None: they are kept for as long as the endpoint is. A run keeps them in
            its folder, see `kept_in`.

    `identity` is a text that differs whenever the same text might get another vector.

    Raises MissingExtraError without the `openai` package; BackendError without a key that OpenAI needs, and, when it is
    called, where no request is answered, after the client's own retries, or not in the protocol.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        instructed: bool = False,
        timeout: float = 120.0,
        cache: EmbeddingCache | str | os.PathLike[str] | None = None,
    ) -> None:
        # The judge's rules for addresses and keys.
        from neuron_lens.llm import OpenAIBackend

        endpoint = OpenAIBackend(model, base_url=base_url, api_key=api_key)
        self.name = f"endpoint {model}"
        self.instructed = instructed
        self._model, self._timeout = model, timeout
        self._base_url, self._api_key = endpoint.base_url, api_key
        self.identity = endpoint.identity
        self.cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)

    def kept_in(self, path: str | os.PathLike[str]) -> EmbeddingEndpoint:
        """The endpoint with its vectors kept in that file; the same where it has a file already."""
        if self.cache.path is not None:
            return self
        kept = copy.copy(self)
        kept.cache = EmbeddingCache(path)
        return kept

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """`[text, dimension]`; NaN where a text could not be embedded."""
        distinct = list(dict.fromkeys(texts))
        known = self.cache.get(self.identity, distinct)
        wanted = [text for text in distinct if text not in known]
        for begin in range(0, len(wanted), _AT_ONCE):
            known |= self._asked(wanted[begin : begin + _AT_ONCE])
        widths = sorted({len(row) for row in known.values()})
        if len(widths) > 1:
            raise BackendError(
                f"{self._who} gives vectors of {' and of '.join(map(str, widths))} numbers: it is not the model it was when "
                "the first of them were kept; give another folder"
            )
        missing = np.full(widths[0] if widths else 1, np.nan)
        return np.stack([known.get(text, missing) for text in texts])

    @property
    def _who(self) -> str:
        return f"the embedder {self._model!r} at {self._base_url}"

    def _asked(self, texts: list[str]) -> dict[str, NDArray[np.float64]]:
        """The vectors of texts that were embedded, asked for in one request and kept."""
        import openai

        key = self._api_key or os.environ.get("OPENAI_API_KEY") or "none"
        client = openai.OpenAI(api_key=key, base_url=self._base_url, timeout=self._timeout)
        try:
            with client:
                reply = client.embeddings.create(model=self._model, input=texts, encoding_format="float")
            vectors = _by_text(reply, texts)
        except openai.APIConnectionError as error:
            raise BackendError(
                f"the connection to the embedder at {self._base_url} failed: {error}"
            ) from error
        except openai.APIStatusError as error:
            if error.status_code not in _TEXT_REFUSED:
                raise BackendError(f"{self._who} refuses: {error}") from error
            # One text may be what it stumbles over: the others are asked for by themselves.
            if len(texts) == 1:
                return {}
            return {text: row for one in texts for text, row in self._asked([one]).items()}
        except (openai.OpenAIError, TypeError, ValueError) as error:
            raise BackendError(f"{self._who} gave no embeddings of {len(texts)} texts: {error}") from error
        return self.cache.put(self.identity, vectors)


def _by_text(reply: Any, texts: list[str]) -> dict[str, NDArray[np.float64]]:
    """The vector of each text, in whatever order they come: what is kept must not be another's.

    Raises TypeError or ValueError for a reply that is not in the protocol.
    """
    data = getattr(reply, "data", None) or []
    if len(data) != len(texts):
        raise ValueError(f"it holds {len(data)} vectors for {len(texts)} texts")
    places = [one.index for one in data]
    if sorted(places) != list(range(len(texts))):
        raise ValueError(f"its vectors are numbered {places}, expected each of 0 to {len(texts) - 1} once")
    vectors = {texts[one.index]: np.asarray(one.embedding, dtype=np.float64) for one in data}
    if any(row.ndim > 1 for row in vectors.values()):
        raise ValueError("one of them is a table of numbers, expected a list")
    return vectors


class Unasked:
    """In the place of an embedder whose name it bears: every text is missing."""

    instructed: ClassVar[bool] = False

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """`[text, 1]`, NaN."""
        return np.full((len(texts), 1), np.nan)


def embedder_named(text: str) -> Embedder:
    """The embedder that "local:FOLDER", "openai:MODEL", "openai:MODEL@URL" or "bag_of_words" names.

    Raises RequestError for another text or a folder that is not there, and MissingExtraError without the package it
    takes: before it is used.
    """
    kind, _, who = text.partition(":")
    if text == BagOfWords.name:
        return BagOfWords()
    if kind == "openai" and who:
        name, _, url = who.partition("@")
        return EmbeddingEndpoint(name, base_url=url or None)
    if kind == "local" and who:
        if not Path(who).is_dir():
            raise RequestError(
                f"the embedder {text}: {who} is no folder; expected that of a sentence-transformers model"
            )
        if importlib.util.find_spec("sentence_transformers") is None:
            raise MissingExtraError("sentence_transformers", "embed", f"the embedder {text}")
        return SentenceTransformer(who)
    raise RequestError(
        f"the embedder {text!r}: expected local:FOLDER (a sentence-transformers model), openai:MODEL, openai:MODEL@URL (an "
        f"embeddings endpoint) or {BagOfWords.name} (spelling alone, for trials)"
    )
