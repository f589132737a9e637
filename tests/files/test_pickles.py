"""What torch.save wrote is read; what could run is refused before it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from neuron_lens.errors import CheckpointError
from neuron_lens.files.pickles import read_pickle


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_and_plain_values_come_back(zipped: bool, tmp_path: Path) -> None:
    held = {"w": torch.arange(6.0).reshape(2, 3), "k": 32, "activation": "TopK", "more": {"x": [1.5, None]}}
    torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_pickle(tmp_path / "a.pt")
    assert torch.equal(read.pop("w"), held.pop("w"))
    assert read == held


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    torch.save({"w": Runs(tmp_path / "ran")}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"refused.*could run code"):
        read_pickle(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_damage_and_other_contents_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PK nothing"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"a\.pt is (truncated|refused)"):
            read_pickle(path)
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError, match="holds a list"):
        read_pickle(path)
    with pytest.raises(CheckpointError, match="No such file"):
        read_pickle(tmp_path / "none.pt")
