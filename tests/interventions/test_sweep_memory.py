"""A sweep stays within its memory budget, measured as the growth of a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# what Python, allocators and threads take beside the tensors that the budget counts
OVERHEAD = 16 << 20

MEASURE = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from neuron_lens.interventions import AttentionKnockout, CrossEntropy, LogitDifference, Scale, Zero, capture, grid, sweep
from neuron_lens.transformer import Transformer, TransformerConfig

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

config = TransformerConfig(n_layers=3, d_model=256, n_heads=8, d_mlp=1024, d_vocab=8000, n_ctx=64)
model = Transformer(config).requires_grad_(False)
tokens = (torch.arange(256) * 7919 % 8000).view(4, 64)
heads = {"layers": range(3), "heads": range(8)}
GRIDS = {
    "stream": lambda: grid("resid.torso.pre_attn", layers=range(3), positions=range(0, 64, 8),
                           patch_from=capture(model, tokens + 1, "resid.torso.pre_attn")),
    "pattern": lambda: grid("attn.qk_logits", AttentionKnockout, **heads, positions=[40], keys=[3]),
    "result": lambda: grid("attn.result", Scale, **heads, factor=2.0),
    "head inputs": lambda: grid("attn.q_in", Scale, **heads, factor=2.0),
}
METRICS = {"difference": LogitDifference(3, 4), "loss": CrossEntropy()}
warm = grid("attn.v_out", Zero, layers=[0], positions=[60])
measured = {}
for name, metric, budget in json.loads(sys.argv[1]):
    cells = GRIDS[name]()
    sweep(model, tokens, warm, METRICS[metric])
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    sweep(model, tokens, cells, METRICS[metric], memory_budget=budget)
    measured[f"{name}, {metric}, {budget}"] = status("VmHWM") - before
print(json.dumps(measured))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_the_peak_of_a_sweep_stays_within_its_budget() -> None:
    cases = [
        (name, metric, budget << 20)
        for name in ("stream", "pattern", "result", "head inputs")
        for metric, budget in (("difference", 48), ("difference", 96), ("loss", 80), ("loss", 160))
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    beyond = {
        name: f"{peak / 2**20:.1f} MiB"
        for name, peak in measured.items()
        if peak > int(name.rsplit(", ")[-1]) + OVERHEAD
    }
    assert not beyond, beyond
    # budgets are used, too: a sweep that kept to one cell at a time would pass the above
    assert measured[f"stream, loss, {160 << 20}"] > (160 << 20) // 3
