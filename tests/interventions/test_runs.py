"""A recorded run says whether it reproduces."""

from __future__ import annotations

import torch

from neuron_lens.interventions import RecordedRun, Scale, Zero, record, replay
from tests.interventions.models import prompts, tiny_model


def test_a_stored_run_replays_identically_and_notices_what_changed(tmp_path) -> None:
    model, tokens = tiny_model(), prompts()
    pad = torch.zeros(2, 7, dtype=torch.bool)
    pad[0, :2] = True
    run = record(
        model,
        tokens,
        [Zero(site="attn.v_out", heads=1), Scale(site="resid.torso.delta_mlp", factor=2)],
        pad=pad,
    )
    run.save(tmp_path / "run.json")
    loaded = RecordedRun.load(tmp_path / "run.json")
    assert loaded == run
    again = replay(loaded, model)
    assert again and again.identical and again.changed == ()
    other = replay(loaded, tiny_model(seed=1))
    assert not other and other.difference > 1e-4 and other.changed[0].startswith("weights: ")
    without = record(model, tokens, pad=pad, columns="all")
    assert not torch.equal(without.logits.tensor[:, -1:], run.logits.tensor)
