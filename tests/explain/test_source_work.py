"""Units are explained in groups, so that memory holds a group's windows; what comes out does not depend on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lens.explain import source_work
from neuron_lens.explain.explainers import LogitWeights
from neuron_lens.explain.pipeline import Pipeline

from . import planted
from .test_planted import SETTINGS, UNITS


@pytest.mark.parametrize("size", [2, 3])
def test_results_do_not_depend_on_the_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def run() -> dict[str, str]:
        pipeline = Pipeline(
            planted.model(), planted.corpus(12), tmp_path, settings=SETTINGS, progress=False, pages=False
        )
        pipeline.run(UNITS)
        return {unit.name: pipeline.explain(unit).model_dump_json() for unit in UNITS}

    whole = run()
    monkeypatch.setattr(source_work, "GROUP_UNITS", size)
    assert run() == whole


def test_a_unit_left_over_alone_has_a_control(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(source_work, "GROUP_UNITS", 3)
    pipeline = Pipeline(
        planted.model(), planted.corpus(12), tmp_path, settings=SETTINGS, progress=False, pages=False
    )
    pipeline.run(UNITS)
    for unit in UNITS:
        another = pipeline.explain(unit).controls[0]
        assert another.description != f"the explanation of {unit}"


def test_evidence_says_what_a_unit_reads(tmp_path: Path) -> None:
    model = planted.model()
    with torch.no_grad():
        weight = model.blocks[0].mlp.up.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 1e-3)
    pipeline = Pipeline(model, planted.corpus(12), tmp_path, settings=SETTINGS, progress=False, pages=False)
    pipeline.run(UNITS)
    for unit in UNITS:
        (work,) = pipeline._work.values()
        evidence = work.evidence(unit.index)
        values = [one.value for one in evidence.reads]
        assert len(values) == 10 and values == sorted(values, reverse=True) and values[0] > 0
        assert pipeline.explain(unit).reads == evidence.reads
        assert "reads" in LogitWeights().slots(evidence)
        assert evidence.reads[0].token.strip() in LogitWeights().slots(evidence)["reads"]
