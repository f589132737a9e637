"""What is written a tensor at a time is what safetensors reads; what is held on disk is what is held in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from neuron_lens.files import tensor_file
from neuron_lens.files.mapped import release_pages
from neuron_lens.files.tensor_file import map_tensor_file, write_tensor_file
from neuron_lens.harvest.keepers import UniformSample, WindowBatch
from neuron_lens.harvest.scratch import ScratchFile


def _arrays() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "bytes": draw.integers(0, 9, 3).astype(np.int8),
        "wide": draw.normal(size=(2, 3)),
        "half": draw.normal(size=(5, 2)).astype(np.float16),
        "turned": draw.normal(size=(4, 6)).astype(np.float32).T,
        "none": np.zeros((0, 7), dtype=np.int16),
        "one": np.array(7, dtype=np.int64),
        "flags": draw.random(5) < 0.5,
    }


def test_a_written_file_is_read_back_by_safetensors(tmp_path: Path) -> None:
    given, expected = _arrays(), _arrays()
    write_tensor_file(tmp_path / "file.safetensors", given, {"said": "this"})
    assert not given
    for read in (
        load_file(tmp_path / "file.safetensors"),
        {name: tensor.numpy() for name, tensor in load_torch(tmp_path / "file.safetensors").items()},
    ):
        assert read.keys() == expected.keys()
        for name, array in expected.items():
            assert read[name].dtype == array.dtype and np.array_equal(read[name], array), name
    with safe_open(tmp_path / "file.safetensors", framework="np") as file:
        assert file.metadata() == {"said": "this"}
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_a_file_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_BYTES_AT_ONCE", 16)  # written a row at a time
    path, expected = tmp_path / "file.safetensors", _arrays()
    write_tensor_file(path, _arrays(), {"said": "this"})
    metadata, tensors = map_tensor_file(path)
    assert metadata == {"said": "this"} and tensors.keys() == expected.keys()
    for name, array in expected.items():
        assert tensors[name].dtype == array.dtype and np.array_equal(tensors[name], array), name
        release_pages(tensors[name])
        assert np.array_equal(tensors[name], array), name
    for damaged in (path.read_bytes()[:-1], path.read_bytes()[:40], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut off|it ends at"):
            map_tensor_file(path)


def test_what_is_written_to_a_scratch_array_stays_when_its_pages_go(tmp_path: Path) -> None:
    file = ScratchFile(tmp_path)
    arrays = [file.array((300, 7), dtype) for dtype in (np.float16, np.int32, np.int8)]
    for number, array in enumerate(arrays):
        assert not array.any()
        array[:] = number + np.arange(7)
        release_pages(array[3:, 2])
    assert all((array == number + np.arange(7)).all() for number, array in enumerate(arrays))
    assert file.array((0, 5), np.float16).shape == (0, 5) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_partners", [False, True])
def test_a_sample_on_disk_is_the_sample_in_memory(tmp_path: Path, has_partners: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    cpu = torch.device("cpu")
    file = ScratchFile(tmp_path)
    samples = [UniformSample(5, 3, 4, cpu, has_partners, scratch) for scratch in (None, file, file)]
    for number in range(6):
        x = torch.randn(4, 4, 3, generator=generator)
        batch = WindowBatch(
            x,
            torch.ones(4, 4, dtype=torch.bool),
            torch.arange(4) + 4 * number,
            torch.randint(0, 2**60, (4,), generator=generator),
            x.mul(9).to(torch.int16),
        )
        for sample in samples[:2]:
            sample.update(batch)
    samples[2].load(samples[1].state())
    whole = samples[0].sorted()
    for sample in samples[1:]:
        for own, expected in zip(sample.sorted(), whole, strict=True):
            assert (own is None and expected is None) or torch.equal(own, expected)
    assert not list(tmp_path.iterdir()), "the file has no name"
