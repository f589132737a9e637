"""No embeddings endpoint is asked twice for a text it gave a vector of: killed, interrupted, or by another process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.explain.result import RunResult
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.explain.scorers import Embedding, EmbeddingCache, EmbeddingEndpoint
from neuron_lens.llm import RequestCache
from tests.llm.server import JudgeServer, Reply, error_reply

from .judge import guess
from .test_planted import UNITS, pipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


class Embeddings:
    """Gives each text numbers that depend on it and on the model, and counts the texts that were given some.

    `fault(number, texts)` is what the request of that number, from 1, is answered with instead; None: nothing instead.
    """

    def __init__(self, fault: Callable[[int, list[str]], Reply | None] = lambda number, texts: None) -> None:
        self.fault = fault
        self.requests = 0
        self.given: Counter[str] = Counter()

    def __call__(self, body: dict[str, Any], attempt: int) -> Reply:
        self.requests += 1
        texts = body["input"]
        fault = self.fault(self.requests, texts)
        if fault is not None:
            return fault
        self.given.update(texts)
        data = [
            {"index": place, "embedding": [guess(body["model"], text, axis) - 0.5 for axis in range(4)]}
            for place, text in enumerate(texts)
        ]
        return Reply({"object": "list", "model": body["model"], "data": data})


def scored(folder: Path, url: str) -> RunResult:
    """A run whose scores are an endpoint's."""
    return pipeline(folder, scorers=(Embedding(embedder=EmbeddingEndpoint("words", base_url=url)),)).run(
        UNITS
    )


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvested") / "run"
    pipeline(folder).harvest(UNITS)
    return folder


@pytest.fixture(scope="module")
def whole(harvested: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Embeddings]:
    """A run that nothing interrupts, and what it asks."""
    folder, service = tmp_path_factory.mktemp("whole") / "run", Embeddings()
    with pytest.MonkeyPatch.context() as patch, JudgeServer(service) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(name, raising=False)
        return scored(shutil.copytree(harvested, folder), server.url), service


def test_a_run_that_is_stopped_again_and_again_asks_for_no_text_twice(
    harvested: Path, whole: tuple[RunResult, Embeddings], tmp_path: Path
) -> None:
    out = shutil.copytree(harvested, tmp_path / "run")
    result, service = None, Embeddings(lambda number, texts: error_reply(401) if number % 2 == 0 else None)
    with JudgeServer(service) as server:
        for _ in range(30):
            with contextlib.suppress(BackendError):
                result = scored(out, server.url)
                break
    assert service.requests // 2 >= len(UNITS) and set(service.given.values()) == {1}
    assert result == whole[0] and service.given == whole[1].given
    assert len(EmbeddingCache(RunFolder(out).embeddings)) == len(service.given) > 50


_RUN = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from tests.explain.test_embedding_cache import scored
scored(Path({folder!r}), {url!r})
"""


def test_a_run_killed_outright_asks_for_no_text_twice(
    harvested: Path, whole: tuple[RunResult, Embeddings], tmp_path: Path
) -> None:
    out = shutil.copytree(harvested, tmp_path / "run")
    child: subprocess.Popen[bytes] | None = None

    def kill(number: int, texts: list[str]) -> Reply | None:
        if number != 4:
            return None
        assert child is not None
        child.send_signal(signal.SIGKILL)
        return error_reply(500)  # to nobody

    service = Embeddings(kill)
    with JudgeServer(service) as server:
        code = _RUN.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(out), url=server.url)
        child = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE
        )
        _, said = child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL, said.decode()
        assert 0 < len(service.given) < len(whole[1].given)
        assert scored(out, server.url) == whole[0]
    assert set(service.given.values()) == {1} and service.given == whole[1].given


def test_an_estimate_asks_for_nothing_and_a_foreign_file_is_refused_before_anything_is(
    harvested: Path, tmp_path: Path
) -> None:
    service, foreign = Embeddings(), RunFolder(shutil.copytree(harvested, tmp_path / "foreign"))
    foreign.embeddings.write_text("notes of somebody, and no database, " * 50)
    with JudgeServer(service) as server:
        scorers = (Embedding(embedder=EmbeddingEndpoint("words", base_url=server.url)),)
        pipeline(shutil.copytree(harvested, tmp_path / "run"), scorers=scorers).estimate(UNITS)
        with pytest.raises(
            BackendError, match=r"embedding cache .*embeddings\.sqlite cannot be used"
        ) as error:
            scored(foreign.path, server.url)
    assert service.requests == 0 and "\n" not in str(error.value)
    assert foreign.embeddings.read_text().startswith("notes of somebody")


def test_a_batch_that_is_refused_and_stopped_halfway_keeps_what_was_paid_for(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(9)]

    def fault(number: int, asked: list[str]) -> Reply | None:
        if len(asked) > 1:
            return error_reply(400)
        return error_reply(401) if number == 6 else None

    service = Embeddings(fault)
    with JudgeServer(service) as server:
        with pytest.raises(BackendError, match="refuses"):
            EmbeddingEndpoint("m", base_url=server.url, cache=tmp_path / "c")(texts)
        assert len(service.given) == 4
        rows = EmbeddingEndpoint("m", base_url=server.url, cache=tmp_path / "c")(texts)
    assert np.isfinite(rows).all() and service.given == Counter(texts)


def test_what_failed_is_asked_for_again(tmp_path: Path) -> None:
    def script(body: dict[str, Any], attempt: int) -> Reply:
        service.given.update(body["input"])
        data = [
            {
                "index": place,
                "embedding": None if "null" in text else [float("nan")] if "nan" in text else [1.0],
            }
            for place, text in enumerate(body["input"])
        ]
        return Reply({"data": data})

    service = Embeddings()
    texts = ["a null", "b nan", "c", "d refused"]
    with JudgeServer(script) as failing:
        embedder = EmbeddingEndpoint("m", base_url=failing.url, cache=tmp_path / "c")
        rows = embedder(texts)
        assert np.isfinite(rows[:, 0]).tolist() == [False, False, True, True] and len(embedder.cache) == 2
        assert service.given == Counter(texts)
        embedder(texts)
        assert service.given - Counter(texts) == Counter(texts[:2])


def test_another_model_or_address_is_another_vector_and_credentials_are_not(tmp_path: Path) -> None:
    path, service, other = tmp_path / "c", Embeddings(), Embeddings()
    with JudgeServer(service) as server, JudgeServer(other) as elsewhere:
        one, two = (EmbeddingEndpoint(model, base_url=server.url, cache=path)(["x"]) for model in ("a", "b"))
        assert not np.array_equal(one, two) and service.given == {"x": 2}
        EmbeddingEndpoint("a", base_url=elsewhere.url, cache=path)(["x"])
        assert other.given == {"x": 1} and len(EmbeddingCache(path)) == 3
        secret = server.url.replace("127.0.0.1", "me:secret@127.0.0.1")
        again = EmbeddingEndpoint("a", base_url=secret, api_key="hidden", cache=path)(["x"])
        assert np.array_equal(again, one) and service.given == {"x": 2}
    for file in tmp_path.iterdir():
        assert b"secret" not in file.read_bytes() and b"hidden" not in file.read_bytes()


def test_another_width_under_the_same_name_is_refused(tmp_path: Path) -> None:
    with JudgeServer(Embeddings()) as server:
        embedder = EmbeddingEndpoint("m", base_url=server.url, cache=tmp_path / "c")
        embedder.cache.put(embedder.identity, {"before": np.ones(3)})
        with pytest.raises(BackendError, match="vectors of 3 and of 4 numbers"):
            embedder(["before", "after"])


def test_a_run_keeps_vectors_in_its_folder_unless_the_endpoint_has_a_file(tmp_path: Path) -> None:
    bare = EmbeddingEndpoint("m", base_url="http://127.0.0.1:9/v1")
    kept = bare.kept_in(tmp_path / "run")
    assert (bare.cache.path, kept.cache.path) == (None, tmp_path / "run")
    assert (kept.name, kept.identity) == (bare.name, bare.identity)
    assert kept.kept_in(tmp_path / "another") is kept
    for scorer in (Embedding(embedder="bag_of_words"), Embedding(embedder=kept)):
        assert scorer.kept_in(tmp_path / "another") == scorer
    assert not (tmp_path / "another").exists()


vectors = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=8).map(np.array)


@given(st.dictionaries(st.text(st.characters()), vectors, max_size=5), st.booleans())
def test_vectors_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, np.ndarray], on_disk: bool
) -> None:
    path = tmp_path_factory.mktemp("kept") / "c" if on_disk else None
    cache = EmbeddingCache(path)
    later = {text: row + 1 for text, row in rows.items()}
    for found in (cache.put("m", rows), cache.put("m", later), cache.get("m", [*rows, "another text"])):
        assert {text: row.tobytes() for text, row in found.items()} == {
            text: row.tobytes() for text, row in rows.items()
        }
    if path is not None:
        cache.close()
        reopened = EmbeddingCache(path).get("m", rows)
        assert {text: row.tobytes() for text, row in reopened.items()} == {
            text: row.tobytes() for text, row in rows.items()
        }
    assert cache.get("n", rows) == {}


def test_files_of_something_else_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, and no database at all, " * 50)
    RequestCache(tmp_path / "requests").close()
    EmbeddingCache(tmp_path / "embeddings").close()
    for make, path, complaint in (
        (EmbeddingCache, text, r"the embedding cache .*notes\.txt cannot be used"),
        (EmbeddingCache, tmp_path, "the embedding cache .* cannot be used"),
        (EmbeddingCache, tmp_path / "requests", r"not an embedding cache .*table 'vectors', .*\(answers\)"),
        (RequestCache, tmp_path / "embeddings", r"not a request cache .*table 'answers', .*\(vectors\)"),
    ):
        before = None if path.is_dir() else path.read_bytes()
        with pytest.raises(BackendError, match=complaint) as error:
            make(path)
        assert "\n" not in str(error.value) and (before is None or path.read_bytes() == before)


def test_a_damaged_vector_is_refused(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path / "c")
    cache.put("m", {"x": np.ones(3)})
    with sqlite3.connect(tmp_path / "c") as connection:
        connection.execute("UPDATE vectors SET vector = substr(vector, 1, 9)")
    connection.close()
    with pytest.raises(BackendError, match="it has 9 bytes"):
        cache.get("m", ["x"])


_WRITE = textwrap.dedent("""
    import sys
    import numpy as np
    from neuron_lens.explain.scorers.embedding_cache import EmbeddingCache

    texts = [f"text {i}" for i in range(40)]
    for begin in range(0, 40, 4):
        rows = {text: np.full(5, float(sys.argv[2])) for text in texts[begin : begin + 4]}
        stored = EmbeddingCache(sys.argv[1]).put("m", rows)
        assert set(stored) == set(rows)
        print(*(row.tolist() for row in stored.values()))
""")


def test_processes_share_one_file(tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITE, str(tmp_path / "c"), str(writer)],
            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for writer in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert len({out for out, _ in said}) == 1  # whoever was first, both hold the same
    assert len(EmbeddingCache(tmp_path / "c")) == 40
