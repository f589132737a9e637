"""Embedders by name: what they answer becomes a score, what they refuse is missing, and a rehearsal asks none."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_lens.errors import BackendError, MissingExtraError, RequestError
from neuron_lens.explain.puzzles import puzzle_named
from neuron_lens.explain.scorers import (
    BagOfWords,
    Embedding,
    EmbeddingEndpoint,
    SentenceTransformer,
    embedder_named,
)
from tests.llm.server import JudgeServer, Reply, error_reply

from .judge import RuleEmbedder

ANIMALS = puzzle_named("animals")
EVIDENCE = ANIMALS.evidence()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def served(body: dict[str, Any], attempt: int) -> Reply:
    """The directions of the puzzles' rules, in an order of its own."""
    rows = RuleEmbedder()(body["input"])
    data = [
        {"object": "embedding", "index": place, "embedding": [float(v) for v in row]}
        for place, row in enumerate(rows)
    ]
    return Reply({"object": "list", "model": body["model"], "data": data[::-1]})


def test_an_endpoint_gives_the_score_of_its_vectors_and_is_asked_for_no_text_twice() -> None:
    with JudgeServer(served) as server:
        embedder = EmbeddingEndpoint("rules", base_url=server.url)
        result = Embedding(embedder=embedder).score(EVIDENCE, ANIMALS.explanation, None, seed=0)
        again = Embedding(embedder=embedder).score(EVIDENCE, ANIMALS.explanation, None, seed=0)
        asked = [text for body in server.bodies for text in body["input"]]
    wanted = Embedding(embedder=RuleEmbedder()).score(EVIDENCE, ANIMALS.explanation, None, seed=0)
    assert result == again and result.scores == wanted.scores and result.score.value == 1.0
    assert result.method == "endpoint rules" and not result.absent
    assert len(asked) == len(set(asked)) == 52  # two sentences and fifty texts


def test_a_text_that_is_refused_is_missing_and_the_others_are_not() -> None:
    def script(body: dict[str, Any], attempt: int) -> Reply:
        return error_reply(400) if any("dog" in text for text in body["input"]) else served(body, attempt)

    texts = ["a cat", "a dog", "an owl"]
    with JudgeServer(script) as server:
        rows = EmbeddingEndpoint("rules", base_url=server.url)(texts)
        result = Embedding(embedder=EmbeddingEndpoint("rules", base_url=server.url), controls=False).score(
            EVIDENCE, ANIMALS.explanation, None, seed=0
        )
    assert np.isnan(rows[1]).all() and np.isfinite(rows[[0, 2]]).all()
    assert 0.5 < result.score.coverage < 1.0 and result.score.value == 1.0


def test_an_endpoint_that_answers_nothing_stops_the_run() -> None:
    with (
        JudgeServer(lambda body, attempt: error_reply(401)) as server,
        pytest.raises(BackendError, match="refuses"),
    ):
        EmbeddingEndpoint("rules", base_url=server.url)(["x"])
    with pytest.raises(BackendError, match="connection to the embedder"):
        EmbeddingEndpoint("rules", base_url="http://127.0.0.1:9/v1")(["x"])
    with pytest.raises(BackendError, match="needs a key"):
        EmbeddingEndpoint("rules")


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ({"object": "list", "model": "x", "data": []}, "0 vectors for 1 texts"),
        ({"error": {"message": "busy"}}, "0 vectors for 1 texts"),
        (["x"], "0 vectors for 1 texts"),
        ({"data": [{"index": 1, "embedding": [0.5]}]}, r"numbered \[1\], expected each of 0 to 0 once"),
        ({"data": [{"embedding": [0.5]}]}, "numbered"),
        ({"data": [{"index": 0, "embedding": "AAAA"}]}, "could not convert"),
        ({"data": [{"index": 0, "embedding": [[0.5], [0.5]]}]}, "a table of numbers"),
        (b'{"object": "list", "da', "gave no embeddings of 1 texts"),
    ],
)
def test_a_reply_that_is_not_in_the_protocol_stops_the_run_and_nothing_is_kept(
    reply: Any, complaint: str
) -> None:
    with JudgeServer(lambda body, attempt: Reply(reply)) as server:
        embedder = EmbeddingEndpoint("rules", base_url=server.url)
        with pytest.raises(BackendError, match=complaint) as error:
            embedder(["x"])
    assert len(embedder.cache) == 0 and "\n" not in str(error.value)


def test_embedders_are_named_and_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(embedder_named("bag_of_words"), BagOfWords)
    endpoint = embedder_named("openai:bge@http://localhost:1/v1")
    assert isinstance(endpoint, EmbeddingEndpoint) and endpoint.name == "endpoint bge"
    with pytest.raises(RequestError, match="expected local:FOLDER"):
        embedder_named("bge")
    with pytest.raises(RequestError, match="is no folder"):
        embedder_named(f"local:{tmp_path / 'nowhere'}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="sentence_transformers"):
        embedder_named(f"local:{tmp_path}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert isinstance(embedder_named(f"local:{tmp_path}"), SentenceTransformer)


def test_a_rehearsal_asks_no_embedder() -> None:
    class Forbidden:
        name, instructed = "forbidden", True

        def __call__(self, texts: list[str]) -> np.ndarray:
            raise AssertionError("asked")

    result = Embedding(embedder=Forbidden()).rehearsed().score(EVIDENCE, "x", None, seed=0)
    assert result.method == "forbidden" and result.score.value is None and result.score.coverage == 0.0
