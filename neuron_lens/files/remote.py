"""Local copies of remote files: downloaded once, resumable, and whole before they get their name.

Paths are whatever blobfile opens (`gs://`, `az://`, `https://<account>.blob.core.windows.net/…`) and plain
`http(s)://` addresses, which blobfile does not open and the standard library does. An interrupted download
leaves `NAME.partial`, continued by a range read when the remote file is still the same one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import urlsplit

from tqdm import tqdm

from neuron_lens.errors import CheckpointError
from neuron_lens.files.atomic import write_json_atomic

__all__ = ["RemoteStat", "cache_folder", "is_remote", "join_remote", "local_copy", "remote_exists"]

_SCHEMES = ("https://", "http://", "gs://", "az://")
_CHUNK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 30


@dataclass(frozen=True, kw_only=True)
class RemoteStat:
    """What identifies one state of a remote file."""

    size: int | None  # bytes; None when the server does not say
    version: str | None  # an entity tag or generation number; None when the server does not say


class _Store(Protocol):
    """One way to read remote files."""

    def stat(self, url: str) -> RemoteStat: ...

    def open(self, url: str, offset: int) -> tuple[BinaryIO, int]:
        """A reader, and the offset it truly starts at (0 when the store cannot start elsewhere)."""
        ...


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an address to download from rather than a local path."""
    return str(path).startswith(_SCHEMES)


def cache_folder() -> Path:
    """Where downloads are kept: $NEURON_LENS_CACHE, or `~/.cache/neuron_lens`."""
    return Path(os.environ.get("NEURON_LENS_CACHE") or "~/.cache/neuron_lens").expanduser()


def join_remote(url: str, name: str) -> str:
    """The address of the file `name` in the remote folder `url`; a query string stays at the end."""
    address, mark, query = url.partition("?")
    return f"{address.rstrip('/')}/{name}{mark}{query}"


def remote_exists(url: str) -> bool:
    """Whether there is a remote file at `url`. Raises CheckpointError when the store cannot be reached."""
    with _errors_as_checkpoint_error(url):
        try:
            _store_for(url).stat(url)
        except FileNotFoundError:
            return False
    return True


def local_copy(path_or_url: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """A local path with the file's content: a local path as it is, a remote file from the cache.

    A file already in the cache is used without asking the store again; remove it there to fetch it anew.
    Raises CheckpointError when the file does not exist, cannot be reached, or ends early (what came is kept,
    and the next call continues it).
    """
    if not is_remote(path_or_url):
        return Path(path_or_url)
    url = str(path_or_url)
    folder = Path(cache_dir) if cache_dir is not None else cache_folder()
    target = _cached_path(url, folder)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write in the download cache {folder}: {error.strerror or error}; "
            "set NEURON_LENS_CACHE to a folder that can be written to"
        ) from error
    with _lock(target), _errors_as_checkpoint_error(url):
        if not target.is_file():  # another process may have finished it while this one waited
            _download(_store_for(url), url, target)
    return target


def _cached_path(url: str, folder: Path) -> Path:
    """One folder per remote folder, so that the files of a checkpoint lie side by side."""
    address, _, query = url.partition("?")
    parent, _, name = address.rpartition("/")
    parts = urlsplit(address)
    if not name or not parts.netloc:
        raise CheckpointError(
            f"{url} names no file: expected something like https://host/folder/model.safetensors"
        )
    digest = hashlib.sha256(f"{parent}?{query}".encode()).hexdigest()[:12]
    return folder / "remote" / f"{parts.netloc.replace(':', '_')}-{digest}" / name


def _download(store: _Store, url: str, target: Path) -> None:
    partial = target.with_name(target.name + ".partial")
    record = target.with_name(target.name + ".partial.json")
    stat = store.stat(url)
    have = partial.stat().st_size if partial.is_file() else 0
    same = record.is_file() and json.loads(record.read_text()) == {"url": url, **asdict(stat)}
    # Without a version nothing tells whether the rest belongs to what came before.
    offset = have if same and stat.version is not None and (stat.size is None or have <= stat.size) else 0
    write_json_atomic(record, {"url": url, **asdict(stat)})
    if stat.size is None or offset < stat.size or offset == 0:
        reader, start = store.open(url, offset)
        with (
            reader,
            partial.open("r+b" if start else "wb") as file,
            tqdm(
                desc=target.name, total=stat.size, initial=start, unit="B", unit_scale=True, leave=False
            ) as bar,
        ):
            file.seek(start)
            while chunk := reader.read(_CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
            file.truncate()
    size = partial.stat().st_size
    if stat.size is not None and size != stat.size:
        raise CheckpointError(
            f"the download of {url} ended after {size} of {stat.size} bytes; run it again to continue"
        )
    os.replace(partial, target)
    record.unlink(missing_ok=True)


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Let one process at a time write the partial file of `target`."""
    if sys.platform == "win32":  # no flock there: two processes must not fetch one file at once
        yield
        return
    import fcntl

    with target.with_name(target.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _errors_as_checkpoint_error(url: str) -> Iterator[None]:
    import blobfile

    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {url}; check the address") from error
    except (blobfile.Error, OSError, urllib.error.URLError) as error:
        reason = (
            getattr(error, "reason", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        )
        raise CheckpointError(
            f"cannot download {url}: {reason}; check the address, the network and your credentials, "
            "or give a local folder instead"
        ) from error


def _store_for(url: str) -> _Store:
    parts = urlsplit(url)
    # blobfile takes Azure's own addresses, but not signed ones (they carry a query string).
    if parts.scheme in {"gs", "az"} or (
        (parts.hostname or "").endswith(".blob.core.windows.net") and not parts.query
    ):
        return _BlobStore()
    return _HttpStore()


class _BlobStore:
    """Google and Azure storage through blobfile, which by itself would retry without end."""

    def __init__(self) -> None:
        import blobfile

        self._context: Any = blobfile.create_context(
            retry_limit=3, connect_timeout=10, read_timeout=_TIMEOUT_SECONDS
        )

    def stat(self, url: str) -> RemoteStat:
        found = self._context.stat(url)
        return RemoteStat(size=found.size, version=found.version)

    def open(self, url: str, offset: int) -> tuple[BinaryIO, int]:
        reader: BinaryIO = self._context.BlobFile(url, "rb", streaming=True)
        reader.seek(offset)
        return reader, offset


class _HttpStore:
    """Plain web servers, with range requests where they offer them."""

    def stat(self, url: str) -> RemoteStat:
        with self._request(url, method="HEAD") as response:
            length = response.headers.get("Content-Length")
            version = response.headers.get("ETag") or response.headers.get("Last-Modified")
            return RemoteStat(size=int(length) if length else None, version=version)

    def open(self, url: str, offset: int) -> tuple[BinaryIO, int]:
        response = self._request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
        return response, offset if response.status == 206 else 0

    def _request(self, url: str, method: str = "GET", headers: dict[str, str] | None = None) -> Any:
        request = urllib.request.Request(
            url, method=method, headers={"Accept-Encoding": "identity", **(headers or {})}
        )
        try:
            return urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in {404, 410}:
                raise FileNotFoundError(url) from error
            raise
