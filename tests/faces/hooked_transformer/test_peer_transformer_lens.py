"""The same calls on the same weights give what transformer-lens 3.9.0 gives: names, shapes and values."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
PYTHON = HERE.parents[2] / ".peers" / "transformer-lens" / "bin" / "python"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env transformer-lens"),
]
sys.path.insert(0, str(HERE))

# What we do otherwise on purpose, as globs over family/kind/name.
OURS: dict[str, str] = {
    "*/raw/method/logit_attrs": "the original leaves out the final norm's weight unless it was folded",
    "*/gradient/blocks.*.ln1.*": "the original runs ln1 for queries, keys and values, and keeps one gradient; ours is the sum",
    "gemma2/*/unembed.hook_out*": "ours stands behind the soft cap of the logits",
    "gemma2/*/method/heads*": "the original gives heads as they are before the norm behind attention",
    "gemma2/*/method/neuron*": "the original gives neurons as they are before the norm behind the MLP",
}


@pytest.fixture(scope="module", params=["gpt2", "neox", "llama", "mixtral", "gemma2"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    import families
    from compared import everything

    from neuron_lens.faces.hooked_transformer import HookedTransformer
    from neuron_lens.files.safetensors import open_tensors

    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    families.make(family).save_pretrained(folder)
    out = folder / "found.safetensors"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [str(PYTHON), str(HERE / "transformer_lens_peer.py"), family, str(folder), str(out)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    source = open_tensors(out)
    theirs = {name: source.get(name).clone() for name in source.names()}
    ours: dict[str, Tensor] = {}
    for kind in ("raw", "processed"):
        load = (
            HookedTransformer.from_pretrained
            if kind == "processed"
            else HookedTransformer.from_pretrained_no_processing
        )
        model = load(str(folder)).eval()
        ours |= {
            f"{kind}/{name}": value
            for name, value in everything(model, torch.tensor(families.TOKENS)).items()
        }
    return family, ours, theirs


def on_purpose(family: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(f"{family}/{name}", pattern) for pattern in OURS)


def test_the_same_names(both: tuple[str, dict[str, Tensor], dict[str, Tensor]]) -> None:
    _, ours, theirs = both
    assert ours.keys() == theirs.keys()


def test_the_same_values(both: tuple[str, dict[str, Tensor], dict[str, Tensor]]) -> None:
    family, ours, theirs = both
    wrong = []
    for name in sorted(ours.keys() & theirs.keys()):
        if on_purpose(family, name):
            continue
        mine, other = ours[name], theirs[name]
        if mine.shape != other.shape:
            wrong.append(f"{name}: {list(mine.shape)} instead of {list(other.shape)}")
            continue
        if not torch.equal(mine.isfinite(), other.isfinite()):
            wrong.append(f"{name}: infinite elsewhere")
            continue
        mine, other = mine.nan_to_num(0, 0, 0).double(), other.nan_to_num(0, 0, 0).double()
        scale = float(other.abs().max()) if other.numel() else 0.0
        worst = float((mine - other).abs().max()) if other.numel() else 0.0
        if worst > 2e-5 * scale + 1e-7:
            wrong.append(f"{name}: off by {worst:.2g} of {scale:.2g}")
    assert not wrong, "\n".join(wrong)


def test_what_we_do_otherwise_differs(both: tuple[str, dict[str, Tensor], dict[str, Tensor]]) -> None:
    family, ours, theirs = both
    if family != "gemma2":
        assert not torch.allclose(ours["raw/method/logit_attrs"], theirs["raw/method/logit_attrs"])
    # folded, the original is right too, up to the mean that centring the unembedding takes from each logit
    name = "processed/method/logit_attrs"
    assert torch.allclose(ours[name], theirs[name], atol=1e-4)
