"""A remote file is copied once and whole, and an interrupted copy equals an uninterrupted one."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from neuron_lens.errors import CheckpointError
from neuron_lens.files import remote
from neuron_lens.files.hub import resolve_checkpoint
from neuron_lens.files.remote import RemoteStat, is_remote, local_copy

DATA = bytes(range(256)) * 5000


class Server:
    """A web server on this machine: files by path, a log of requests, and ways to misbehave."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.ranges = True
        self.cut_after: int | None = None
        self.tag = "one"
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                server.log.append((self.command, self.path, wanted))
                data = server.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and server.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                self.send_header("ETag", server.tag)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data[start : server.cut_after])

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._httpd.server_port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NEURON_LENS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


def test_copied_once(server: Server) -> None:
    server.files["/m/a.bin"] = DATA
    path = local_copy(server.url + "/m/a.bin")
    assert path.read_bytes() == DATA and path.name == "a.bin"
    asked = len(server.log)
    assert local_copy(server.url + "/m/a.bin") == path and len(server.log) == asked
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.bin", "a.bin.lock"]


@pytest.mark.parametrize("ranges", [True, False])
def test_interrupted_equals_uninterrupted(server: Server, ranges: bool) -> None:
    server.files["/m/a.bin"] = DATA
    server.cut_after, server.ranges = 300_000, ranges
    with pytest.raises(
        CheckpointError, match=f"of {len(DATA)} bytes; run it again to continue|cannot download"
    ):
        local_copy(server.url + "/m/a.bin")
    (partial,) = (p for p in Path(remote.cache_folder()).rglob("*.partial"))
    kept = partial.stat().st_size
    assert 0 < kept <= 300_000
    server.cut_after = None
    assert local_copy(server.url + "/m/a.bin").read_bytes() == DATA
    assert server.log[-1] == ("GET", "/m/a.bin", f"bytes={kept}-")
    assert not partial.exists()


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server: Server) -> None:
    server.files["/m/a.bin"] = DATA
    server.cut_after = 300_000
    with pytest.raises(CheckpointError):
        local_copy(server.url + "/m/a.bin")
    server.cut_after, server.tag = None, "two"
    server.files["/m/a.bin"] = DATA[::-1]
    assert local_copy(server.url + "/m/a.bin").read_bytes() == DATA[::-1]
    assert server.log[-1] == ("GET", "/m/a.bin", None)


def test_wrong_addresses_are_one_clear_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file http.*/m/b.bin"):
        local_copy(server.url + "/m/b.bin")
    with pytest.raises(
        CheckpointError, match=r"cannot download http://127.0.0.1:1/x/y: .*give a local folder"
    ):
        local_copy("http://127.0.0.1:1/x/y")
    with pytest.raises(CheckpointError, match="names no file"):
        local_copy("https://")
    assert local_copy(tmp_path / "as_it_is") == tmp_path / "as_it_is"
    assert is_remote("gs://b/x") and not is_remote("/b/x") and not is_remote(tmp_path)


class FakeBlobContext:
    """Stands for blobfile's context: one bucket whose content is a folder on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.offsets: list[int] = []

    def stat(self, url: str) -> RemoteStat:
        return RemoteStat(size=(self.folder / url.split("/")[-1]).stat().st_size, version="1")

    def BlobFile(self, url: str, mode: str, streaming: bool) -> BinaryIO:
        assert (mode, streaming) == ("rb", True)
        return (self.folder / url.split("/")[-1]).open("rb")


def test_buckets_go_through_blobfile(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import blobfile

    (tmp_path / "w.bin").write_bytes(DATA)
    monkeypatch.setattr(blobfile, "create_context", lambda **_: FakeBlobContext(tmp_path))
    for url in (
        "gs://bucket/m/w.bin",
        "az://account/c/w.bin",
        "https://account.blob.core.windows.net/c/w.bin",
    ):
        assert local_copy(url).read_bytes() == DATA
    with pytest.raises(CheckpointError, match=r"there is no file gs://bucket/m/none.bin"):
        local_copy("gs://bucket/m/none.bin")


def test_a_remote_folder_becomes_a_checkpoint_folder(server: Server) -> None:
    index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
    shards = {"/m/model-1.safetensors": b"1", "/m/model-2.safetensors": b"2"}
    server.files = {
        "/m/config.json": b"{}",
        "/m/tokenizer.json": b"{}",
        "/m/model.safetensors.index.json": index,
    }
    with pytest.raises(CheckpointError, match=r"there is no file .*model-1"):
        resolve_checkpoint(server.url + "/m")
    server.files |= shards
    folder = resolve_checkpoint(server.url + "/m/")
    assert {p.name for p in folder.iterdir() if p.suffix != ".lock"} == {
        f.split("/")[-1] for f in server.files
    }
    server.files = {"/n/config.json": b"{}"}
    with pytest.raises(CheckpointError, match=r"holds config.json but no weights"):
        resolve_checkpoint(server.url + "/n")
