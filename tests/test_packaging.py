"""A wheel built from the repository and installed elsewhere carries everything it needs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECK = """
import neuron_lens, torch
from pathlib import Path
from neuron_lens.files.model_defs import model_defs_dir
from neuron_lens.loading import known_models
assert Path(neuron_lens.__file__).is_relative_to({target!r}), neuron_lens.__file__
assert Path(model_defs_dir()).is_relative_to({target!r}), model_defs_dir()
model = neuron_lens.Transformer.load("pico")
assert model(torch.tensor([model.tokenizer.encode("def f(x):")])).isfinite().all()
assert len(known_models()) > 20
from neuron_lens.cli import main
raise SystemExit(main(["explain", "--layer", "1", "--neuron", "3", "--quiet", "--out", {out!r}]))
"""


@pytest.mark.slow
def test_a_wheel_installed_elsewhere_explains_a_neuron(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    [wheel] = tmp_path.glob("neuron_lens-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "model_defs/gpt2.toml",
        "model_defs/pico/model.safetensors",
        "report/style.css",
        "py.typed",
    ):
        assert f"neuron_lens/{wanted}" in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]
    target, out = tmp_path / "elsewhere", tmp_path / "out"
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)], check=True)
    check = CHECK.format(target=str(target), out=str(out))
    # -P and a foreign working folder keep the checkout off the path; the target comes before an editable install
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (out / "index.html").is_file() and "layer1_neuron3" in done.stdout
