"""Where a checkpoint is looked for, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from neuron_lens.errors import CheckpointError
from neuron_lens.files import hub, model_defs
from neuron_lens.files.hub import cached_snapshot, resolve_checkpoint
from neuron_lens.files.model_defs import model_defs_dir

COMMIT = "0123456789abcdef"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def put_in_cache(cache: Path, name: str, *files: str) -> Path:
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_the_cache_is_found_without_the_hubs_library(cache: Path) -> None:
    snapshot = put_in_cache(cache, "some/model", "config.json", "model.safetensors")
    assert resolve_checkpoint("some/model") == snapshot
    assert resolve_checkpoint("some/model", revision=COMMIT) == snapshot
    put_in_cache(cache, "half/there", "config.json")
    assert cached_snapshot("half/there") is None
    assert cached_snapshot("not/there") is None


def test_a_local_folder_comes_first(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_in_cache(cache, "gpt2", "config.json", "model.safetensors")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    with pytest.raises(CheckpointError, match="is empty"):
        resolve_checkpoint("gpt2")
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert resolve_checkpoint("gpt2") == Path("gpt2")


def test_shipped_checkpoints_go_by_name(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "defs" / "tiny").mkdir(parents=True)
    (tmp_path / "defs" / "tiny" / "config.json").write_text("{}")
    for module in (model_defs, hub):
        monkeypatch.setattr(module, "model_defs_dir", lambda: tmp_path / "defs")
    assert resolve_checkpoint("tiny") == tmp_path / "defs" / "tiny"


@pytest.mark.parametrize("name", ["/no/such/folder", "./here", "", "a b c", Path("relative")])
def test_paths_that_do_not_exist_ask_no_network(name: str | Path, cache: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(hub, "_download_from_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=r"local folder with config.json"):
        resolve_checkpoint(name)


def test_no_network_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("name or service not known\nand a long traceback")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached .*local folder") as caught:
        resolve_checkpoint("some/model")
    assert "\n" not in str(caught.value)


def test_without_the_hubs_library_the_extra_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        CheckpointError, match=r"pip install 'neuron-lens\[hf\]', or give the path of a local"
    ):
        resolve_checkpoint("some/model")


@pytest.mark.parametrize(
    ("files", "wanted", "left"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model*.safetensors", "pytorch_model*.bin"),
        (["pytorch_model.bin", "onnx/model.safetensors"], "pytorch_model*.bin", "model*.safetensors"),
    ],
)
def test_pickles_are_fetched_only_without_safetensors(
    files: list[str], wanted: str, left: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    siblings = [SimpleNamespace(rfilename=file) for file in files]
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    info = SimpleNamespace(siblings=siblings, sha=COMMIT)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_checkpoint("some/model") == tmp_path
    assert asked["name"] == "some/model" and asked["revision"] == COMMIT
    assert wanted in asked["allow_patterns"] and left not in asked["allow_patterns"]


def test_model_defs_are_found_in_a_checkout_and_in_a_wheel(tmp_path: Path) -> None:
    """The resolver run from a copy of the package, laid out as each installation has it."""
    package = Path(model_defs.__file__).resolve().parent.parent
    for layout in ("checkout", "wheel", "neither"):
        root = tmp_path / layout
        (root / "neuron_lens" / "files").mkdir(parents=True)
        for file in ("__init__.py", "errors.py", "files/__init__.py", "files/model_defs.py"):
            (root / "neuron_lens" / file).write_text((package / file).read_text())
        (root / "model_defs").mkdir()  # beside a wheel's package this belongs to somebody else
        if layout == "checkout":
            (root / "setup.py").write_text("")
        if layout == "wheel":
            (root / "neuron_lens" / "model_defs").mkdir()
        code = "from neuron_lens.files.model_defs import model_defs_dir; print(model_defs_dir())"
        command = [sys.executable, "-S", "-c", code]  # -S: no editable install on the path
        environment = {**os.environ, "PYTHONPATH": str(root)}
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False
        )
        if layout == "neither":
            assert "lacks its data folder" in ran.stderr
        else:
            expected = root / "model_defs" if layout == "checkout" else root / "neuron_lens" / "model_defs"
            assert ran.stdout.strip() == str(expected), ran.stderr
    assert model_defs_dir().is_dir()


def test_no_torch_at_import() -> None:
    modules = "atomic, hub, model_defs, remote, safetensors"
    code = f"import sys; from neuron_lens.files import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
