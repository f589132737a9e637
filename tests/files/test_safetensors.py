"""What was saved is read back, by memory map; wrong files are named with what is wrong."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neuron_lens.errors import CheckpointError
from neuron_lens.files.safetensors import open_tensors

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(6, dtype=torch.int64),
    "c": torch.ones(2, 3, dtype=torch.bfloat16),
    "d": torch.zeros(0, 5, dtype=torch.float16),
    "e": torch.tensor([True, False]),
    "f": torch.tensor(3.5, dtype=torch.float64),
}


def save(folder: Path, form: str, tensors: dict[str, torch.Tensor] = TENSORS) -> Path:
    """A checkpoint folder in one of the four forms they have."""
    kind, shards = form.split("-")
    stem, ending = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
    names = sorted(tensors)
    if shards == "one":
        parts = {f"{stem}.{ending}": names}
    else:
        parts = {f"{stem}-00001-of-00002.{ending}": names[:2], f"{stem}-00002-of-00002.{ending}": names[2:]}
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, part in parts.items():
        writer: Any = save_file if kind == "safetensors" else torch.save
        writer({name: tensors[name] for name in part}, folder / file)
    return folder


@pytest.mark.parametrize("form", ["safetensors-one", "safetensors-two", "bin-one", "bin-two"])
def test_round_trip(form: str, tmp_path: Path) -> None:
    source = open_tensors(save(tmp_path, form))
    assert source.names() == sorted(TENSORS) and len(source) == len(TENSORS) and "b" in source
    for name, tensor in TENSORS.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == source.get(name).dtype == tensor.dtype
        assert torch.equal(source.get(name), tensor)
        assert source.path_of(name).parent == tmp_path
    with pytest.raises(CheckpointError, match=r"holds no tensor 'a.weigth': did you mean 'a.weight'"):
        source.get("a.weigth")


def resident_anonymous_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@pytest.mark.parametrize("form", ["safetensors-one", "bin-one"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
def test_tensors_view_the_map_and_copy_nothing(form: str, tmp_path: Path) -> None:
    big = torch.full((4 << 20,), 2.0)  # 16 MiB
    folder = save(tmp_path, form, {"big": big})
    open_tensors(folder).get("big").sum()  # whatever the first use of the libraries allocates
    before = resident_anonymous_kib()
    source = open_tensors(folder)
    tensor = source.get("big")
    assert tensor.sum() == big.sum()
    assert resident_anonymous_kib() - before < 4 << 10
    assert source.get("big").data_ptr() == tensor.data_ptr()
    tensor[:8] = 9.0  # private to this process
    assert open_tensors(folder).get("big")[0] == 2.0


def truncate(path: Path, size: int) -> None:
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda path: truncate(path, path.stat().st_size - 3), "declares .* bytes of tensors, but"),
        (lambda path: truncate(path, 40), "header should be .* bytes long, but 32 bytes follow"),
        (lambda path: truncate(path, 5), "it is 5 bytes long"),
        (lambda path: truncate(path, 0), "it is 0 bytes long"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "declares .* bytes of tensors, but"),
        (lambda path: path.write_bytes((9).to_bytes(8, "little") + b"not json!"), "not JSON"),
        (lambda path: path.write_bytes((2).to_bytes(8, "little") + b"[]"), "not an object"),
        (lambda path: path.write_text("<html>404 not found</html>"), "header should be"),
    ],
)
def test_a_broken_safetensors_file_is_named(spoil: Any, what: str, tmp_path: Path) -> None:
    path = save(tmp_path, "safetensors-one") / "model.safetensors"
    spoil(path)
    with pytest.raises(CheckpointError, match=rf"model.safetensors is truncated or corrupt: .*{what}"):
        open_tensors(tmp_path)


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("was_here",)


def test_pickles_with_code_are_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": RunsCode()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is refused"):
        open_tensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(RunsCode(), protocol=2))
    with pytest.raises(CheckpointError, match="is refused"):
        open_tensors(tmp_path)
    assert not (tmp_path / "was_here").exists()


def test_other_wrong_pickles(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"state": {"a": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match="is no state dict"):
        open_tensors(tmp_path)
    torch.save(TENSORS, path)
    truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is truncated or corrupt"):
        open_tensors(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is truncated or corrupt"):
        open_tensors(tmp_path)


def test_old_pickles_that_cannot_be_mapped_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save(OrderedDict(a=torch.ones(2)), path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_tensors(path).get("a"), torch.ones(2))


def test_shards_and_their_index_must_agree(tmp_path: Path) -> None:
    save(tmp_path, "safetensors-two")
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(
        json.dumps({"weight_map": {**whole["weight_map"], "ghost": "model-00001-of-00002.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="disagree on 1 tensors, first 'ghost'"):
        open_tensors(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        open_tensors(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="cannot read the shard index"):
        open_tensors(tmp_path)
    index.write_text(json.dumps(whole))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its shards: model-00002-of-00002.safetensors"):
        open_tensors(tmp_path)


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint folder"):
        open_tensors(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds no weights: .* it holds config.json"):
        open_tensors(tmp_path)
    for name in ("x", "y"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 safetensors files and no"):
        open_tensors(tmp_path)
