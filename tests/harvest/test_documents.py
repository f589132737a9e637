"""The same documents from every kind of place, and errors that say where a row goes wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.harvest.corpus import Corpus

ROWS = [{"text": "first = 1\n", "path": "a.py"}, {"text": "second\n", "path": "b.py"}, {"text": "Dritter: ü"}]


def _told(corpus: Corpus) -> list[tuple[str, str]]:
    return [(document.name.rpartition("/")[2], document.text) for document in corpus]


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_documents_and_can_be_read_again() -> None:
    corpus = Corpus.of_rows(ROWS, "mine")
    assert _told(corpus) == [("a.py", "first = 1\n"), ("b.py", "second\n"), ("mine:3", "Dritter: ü")]
    assert _told(corpus) == _told(corpus)
    renamed = [{"content": row["text"], "id": place} for place, row in enumerate(ROWS)]
    again = Corpus.of_rows(renamed, "mine", text_key="content", name_key="id")
    assert [name for name, _ in _told(again)] == ["0", "1", "2"]
    assert [text for _, text in _told(again)] == [text for _, text in _told(corpus)]


@pytest.mark.parametrize(
    ("rows", "options", "complaint"),
    [
        (iter(ROWS), {}, "only goes through once"),
        ([{"words": "x"}], {}, "row 1: expected an object with 'text'.*'words'.*text_key"),
        ([{"text": "x"}, {"text": None}], {}, "row 2"),
        ({"train": ROWS}, {}, "give one split"),
        (["plain strings"], {}, "got str"),
        ([{"text": "x"}], {"name_key": "id"}, "no 'id'"),
        ([{"text": " "}], {}, "is empty"),
    ],
)
def test_rows_without_a_text_are_refused(rows: Any, options: dict[str, str], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        Corpus.of_rows(rows, **options)


def test_lines_may_name_their_text_otherwise(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "rows.jsonl", [{"code": "x = 1", "name": "one"}])
    assert _told(Corpus.of_paths([path], text_key="code")) == [("one", "x = 1")]
    with pytest.raises(RequestError, match=r"line 1: expected an object with 'text'.*'code'"):
        Corpus.of_paths([path])


def test_parquet_files_are_read_a_row_a_document(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.Table.from_pylist([{"path": None, "other": 1, **row} for row in ROWS])
    parquet.write_table(table, tmp_path / "rows.parquet")
    corpus = Corpus.of_paths([tmp_path / "*.parquet"])
    assert _told(corpus) == [("a.py", "first = 1\n"), ("b.py", "second\n"), ("rows.parquet:3", "Dritter: ü")]
    assert _told(Corpus.of_paths([tmp_path])) == _told(corpus)
    with pytest.raises(RequestError, match=r"no column 'code'.*'text'"):
        Corpus.of_paths([tmp_path / "rows.parquet"], text_key="code")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(RequestError, match="as Parquet"):
        Corpus.of_paths([tmp_path / "bad.parquet"])


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(RequestError, match=r"pip install 'neuron-lens\[parquet\]'"):
        Corpus.of_paths([tmp_path / "rows.parquet"])


def test_a_data_set_object_is_a_corpus() -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"path": None, **row} for row in ROWS])
    assert _told(Corpus.of_rows(data, "mine")) == _told(Corpus.of_rows(ROWS, "mine"))
    assert Corpus.of_rows(data, "mine").fingerprint == Corpus.of_rows(ROWS, "mine").fingerprint
    with pytest.raises(RequestError, match="give one split"):
        Corpus.of_rows(datasets.DatasetDict(train=data))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    _jsonl(tmp_path / "served" / "rows.jsonl", ROWS)
    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


def test_remote_files_are_read_like_local_ones(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEURON_LENS_CACHE", str(tmp_path / "cache"))
    corpus = Corpus.of_paths([f"{server}/rows.jsonl"])
    assert _told(corpus) == _told(Corpus.of_paths([tmp_path / "served" / "rows.jsonl"]))
    with pytest.raises(CheckpointError):
        Corpus.of_paths([f"{server}/none.jsonl"])
