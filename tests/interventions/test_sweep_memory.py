"""A sweep stays within its memory budget, measured as the growth of a process of its own."""

from __future__ import annotations

import pytest

from tests.memory import measured, needs_proc

MEASURE = """
from neuron_lens.interventions import AttentionKnockout, CrossEntropy, LogitDifference, Scale, Zero, capture, grid, sweep
from neuron_lens.transformer import Transformer, TransformerConfig

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
for name, metric, budget in given:
    cells = GRIDS[name]()
    sweep(model, tokens, warm, METRICS[metric])
    measured[f"{name}, {metric}, {budget}"] = growth(
        lambda: sweep(model, tokens, cells, METRICS[metric], memory_budget=budget)
    )
print(json.dumps(measured))
"""


@pytest.mark.slow
@needs_proc
def test_the_peak_of_a_sweep_stays_within_its_budget() -> None:
    cases = [
        (name, metric, budget << 20)
        for name in ("stream", "pattern", "result", "head inputs")
        for metric, budget in (("difference", 48), ("difference", 96), ("loss", 80), ("loss", 160))
    ]
    peaks = measured(MEASURE, cases)
    beyond = {name: peak for name, peak in peaks.items() if peak > int(name.rsplit(", ")[-1])}
    assert not beyond, beyond
    # budgets are used, too: a sweep that kept to one cell at a time would pass the above
    for name in ("stream", "pattern", "result", "head inputs"):
        assert peaks[f"{name}, loss, {160 << 20}"] > 1.3 * peaks[f"{name}, loss, {80 << 20}"]
