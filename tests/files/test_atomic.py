"""A file appears whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path, write_json_atomic, write_text_atomic


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_json_atomic(target, {"é": [1]})
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(target, float("nan"))
    assert json.loads(target.read_text()) == {"é": [1]}
    assert os.listdir(target.parent) == ["a.json"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text_atomic(target, "old")
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


def test_whoever_writes_it_the_folder_s_readers_can_read_it(tmp_path: Path) -> None:
    """safetensors makes files that only their owner reads."""
    write_text_atomic(tmp_path / "a.txt", "x")
    with atomic_path(tmp_path / "a.safetensors") as temporary:
        save_file({"a": np.zeros(2)}, temporary)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1 and modes.pop() & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot write in the folder"):
        write_text_atomic(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(RequestError, match="it is a folder"):
        write_text_atomic(tmp_path, "x")
