"""Every `get_act_patch_*` equals transformer-lens 3.9.0 on the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuron_lens.interventions import patching
from neuron_lens.transformer import Transformer
from tests.interventions.models import everything
from tests.interventions.transformer_lens_peer import CLEAN, CORRUPTED, NAMES, ROWS, average_setter, metric

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".peers" / "transformer-lens" / "bin" / "python"
FACE = HERE.parent / "faces" / "hooked_transformer"

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(not PYTHON.exists(), reason="no peer environment: scripts/peer_env transformer-lens"),
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_tables_of_patches_are_those_of_transformer_lens(family: str, tmp_path: Path) -> None:
    sys.path.insert(0, str(FACE))
    import families

    families.make(family).save_pretrained(tmp_path)
    out = tmp_path / "found.safetensors"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    script = [str(PYTHON), str(HERE / "transformer_lens_peer.py"), family, str(tmp_path), str(out)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    from safetensors.torch import load_file

    theirs = load_file(out)
    pandas = pytest.importorskip("pandas")
    model = Transformer.load(str(tmp_path))
    clean, corrupted = everything(model, torch.tensor(CLEAN)), torch.tensor(CORRUPTED)
    index = pandas.DataFrame(ROWS, columns=["layer", "pos", "head"])
    arguments = (model, corrupted, clean, metric, average_setter, "z")
    rows = patching.generic_activation_patch(*arguments, index_df=index)
    torch.testing.assert_close(rows, theirs.pop("rows"), atol=2e-4, rtol=1e-4)
    setter, frame = patching.generic_activation_patch(
        *arguments, index_axis_names=["layer", "pos", "head_index"], return_index_df=True
    )
    torch.testing.assert_close(setter, theirs.pop("setter"), atol=2e-4, rtol=1e-4)
    assert torch.equal(torch.tensor(frame.to_numpy()), theirs.pop("frame"))
    assert set(theirs) == {n for n in NAMES if family == "gpt2" or not (n.endswith("_every") and "head" in n)}
    for name, table in theirs.items():
        ours = getattr(patching, f"get_act_patch_{name}")(model, corrupted, clean, metric)
        assert ours.shape == table.shape, name
        torch.testing.assert_close(ours, table, atol=2e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
