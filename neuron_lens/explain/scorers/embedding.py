"""Embedding: are texts the unit fires in nearer to the explanation than texts it is silent in?

Cheap and without a judge, and only as good as the embedder: it is always named, and there is no default.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import MissingExtraError, RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import text_of
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.explain.scorers.ranking import RankingScorer
from neuron_lens.llm import Backend

__all__ = ["BagOfWords", "Embedder", "Embedding", "SentenceTransformer"]

_QUERY = "Instruct: Retrieve sentences that contain something which fits the description.\nQuery: "


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


@dataclass(frozen=True, kw_only=True)
class Embedding(RankingScorer):
    """Cosine similarity of explanation and text; see `ranking_figures`. The backend is not used.

    `embedder`: a callable, or "bag_of_words", which compares spelling and not meaning: it is taken only when asked for
    by that name, for tests and trials. Raises RequestError without an embedder.
    """

    name: ClassVar[str] = "embedding"
    needs: ClassVar[tuple[str, ...]] = ()

    embedder: Embedder | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedder is None:
            raise RequestError(
                "the embedding scorer has no embedder, and none is honest as a default: give one, such as "
                "SentenceTransformer('BAAI/bge-small-en-v1.5'), or, to compare spelling alone, embedder='bag_of_words'"
            )
        if isinstance(self.embedder, str) and self.embedder != BagOfWords.name:
            raise RequestError(
                f"there is no embedder called {self.embedder!r}; by name there is only {BagOfWords.name!r}; give a "
                f"callable, such as SentenceTransformer({self.embedder!r})"
            )

    @property
    def used(self) -> Embedder:
        """The embedder itself."""
        if isinstance(self.embedder, Embedder):
            return self.embedder
        return BagOfWords()

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """Nothing is asked of a backend."""

    def method(self, backend: Backend | None) -> str:
        """The embedder's name."""
        return self.used.name

    def notes(self, outcome: Outcome, evidence: Evidence) -> tuple[str, ...]:
        """Says so where only spelling was compared."""
        spelled = isinstance(self.embedder, str)
        return (
            "bag_of_words compares spelling, not meaning: this is no measure of an explanation",
        ) * spelled

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """No calls: see `BaseScorer.ask`."""
        examples = draw_examples(evidence, self.part, firing=self.n_firing, silent=self.n_silent, seed=seed)

        def read(answers: Sequence[object]) -> Outcome:
            embedder = self.used
            query = _QUERY + explanation if embedder.instructed else explanation
            rows = np.asarray(embedder([query, *(text_of(one.window) for one in examples)]), dtype=np.float64)
            if rows.ndim != 2 or len(rows) != len(examples) + 1:
                raise RequestError(
                    f"the embedder {embedder.name!r} gave an array of shape {list(rows.shape)} for "
                    f"{len(examples) + 1} texts; expected [{len(examples) + 1}, dimension]"
                )
            return judgements_of(examples, [_cosine(rows[0], row) for row in rows[1:]])

        return Plan((), read)


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


def _cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float | None:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not np.isfinite(norm):
        return None
    return float(a @ b) / norm if norm > 0 else 0.0
