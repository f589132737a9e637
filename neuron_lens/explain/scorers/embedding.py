"""Embedding: are texts the unit fires in nearer to the explanation than texts it is silent in?

Cheap and without a judge, and only as good as the embedder: it is always named, and there is no default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import text_of
from neuron_lens.explain.scorers.embedders import BagOfWords, Embedder, EmbeddingEndpoint, Unasked
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.explain.scorers.ranking import RankingScorer
from neuron_lens.llm import Backend

__all__ = ["Embedding"]

_QUERY = "Instruct: Retrieve sentences that contain something which fits the description.\nQuery: "


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

    def rehearsed(self) -> Self:
        """With an embedder that is not asked."""
        return replace(self, embedder=Unasked(self.used.name))

    def kept_in(self, embeddings: Path) -> Self:
        """With an endpoint that keeps its vectors there; any other embedder is called as it is."""
        if not isinstance(self.embedder, EmbeddingEndpoint):
            return self
        return replace(self, embedder=self.embedder.kept_in(embeddings))

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """Nothing is asked of a backend."""

    def prompt(self, backend: Backend | None) -> str:
        """No prompt."""
        return ""

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


def _cosine(a: NDArray[np.floating[Any]], b: NDArray[np.floating[Any]]) -> float | None:
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if not np.isfinite(norm):
        return None
    return float(a @ b) / norm if norm > 0 else 0.0
