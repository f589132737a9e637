"""Programs written for TransformerLens run on this library in its place, and find what they find on the original.

Three of them: SAELens' HookedSAETransformer and training runner, circuit-tracer's replacement model and attribution
graphs, and analyses of the kind courses teach.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
PEERS = ROOT / ".peers"

pytestmark = pytest.mark.peer
sys.path.insert(0, str(HERE))


def python_of(peer: str) -> Path:
    python = PEERS / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"no peer environment: scripts/peer_env {peer}")
    return python


def run(script: str, which: str, python: Path, folder: Path, *paths: Path) -> dict[str, Tensor]:
    out = folder / f"{which}.safetensors"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    command = [str(python), str(HERE / script), which, str(folder), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


def unlike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names whose tensors differ by more than rounding."""
    assert theirs.keys() <= ours.keys()
    wrong = []
    for name, other in theirs.items():
        mine, other = ours[name].double().nan_to_num(0, 0, 0), other.double().nan_to_num(0, 0, 0)
        if mine.shape != other.shape:
            wrong.append(f"{name}: {list(mine.shape)} instead of {list(other.shape)}")
        elif other.numel() and float((mine - other).abs().max()) > 2e-5 * float(other.abs().max()) + 2e-6:
            wrong.append(f"{name}: off by {float((mine - other).abs().max()):.2g}")
    return wrong


def test_saelens(tmp_path: Path) -> None:
    python = python_of("sae-lens")
    theirs = run("saelens_peer.py", "theirs", python, tmp_path)
    ours = run("saelens_peer.py", "ours", python, tmp_path, ROOT)
    assert len(theirs) > 300 and not unlike(ours, theirs)
    assert (tmp_path / "trained" / "sae_weights.safetensors").exists()
    assert ours["trained/model_performance_preservation/ce_loss_without_sae"] > 0


def test_circuit_tracer(tmp_path: Path) -> None:
    python, original = python_of("circuit-tracer"), python_of("transformer-lens")
    # the original runs beside transformer_lens, which needs another transformers than circuit-tracer's own
    package = next((PEERS / "circuit-tracer" / "lib").glob("python*/site-packages/circuit_tracer"))
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "circuit_tracer").symlink_to(package)
    theirs = run("circuit_tracer_peer.py", "theirs", original, tmp_path, tmp_path / "packages")
    ours = run("circuit_tracer_peer.py", "ours", python, tmp_path, ROOT)
    assert len(theirs) == 42 and not unlike(ours, theirs)


def test_course_code(tmp_path: Path) -> None:
    import families

    original = python_of("transformer-lens")
    families.make("gpt2").save_pretrained(tmp_path)
    theirs = run("course_peer.py", "theirs", original, tmp_path)
    ours = run("course_peer.py", "ours", Path(sys.executable), tmp_path, ROOT)
    assert ours.keys() == theirs.keys() and not unlike(ours, theirs)
