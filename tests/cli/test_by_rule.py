"""What a rule keeps of a unit's effect, by command: no judge, no network; on the page and in the table."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from neuron_lens.cli import main
from neuron_lens.explain.result import UnitResult
from neuron_lens.files.model_defs import model_defs_dir

SCORED = ["--scorers", "ablate_to_simulation", "--quiet"]


def results(out: Path) -> list[UnitResult]:
    return [UnitResult.read(path) for path in sorted(out.glob("units/*/result.json"))]


@pytest.mark.usefixtures("planted_model")
def test_explained_and_scored_in_one_command_or_in_two(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explain = ["explain", "planted", "--neurons", "0:2", "--corpus", str(texts), "--quiet", "--out"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*explain, str(one), "--dry-run", *SCORED]) == 0
    assert "2 units: 0 calls" in capsys.readouterr().out
    assert main([*explain, str(one), *SCORED]) == 0
    table = capsys.readouterr().out
    assert "ablate_to_simulation ablation_score 0.9" in table or "ablation_score 1.0" in table
    assert main([*explain, str(two)]) == 0 and main(["score", str(two), *SCORED]) == 0
    assert capsys.readouterr().out.count("ablate_to_simulation ablation_score") == 2
    assert results(one) == results(two)
    before = [path.read_bytes() for path in sorted(two.rglob("result.json"))]
    assert main(["score", str(two), *SCORED]) == 0
    assert [path.read_bytes() for path in sorted(two.rglob("result.json"))] == before
    page = (two / "units" / "layer0_neuron0" / "index.html").read_text()
    assert "Effect kept by the simulation" in page and "No judge was asked" in page
    assert "ablate_to_simulation" in (two / "index.html").read_text()


@pytest.mark.usefixtures("planted_model")
def test_what_has_no_rule_is_one_line(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    common = ["explain", "planted", "--corpus", str(texts), "--out", str(out), "--quiet", "--no-pages"]
    for arguments, complaint in (
        (["--neuron", "0", "--scorers", "simulation"], "their correlation"),
        (["--neuron", "0", "--scorers", "detection,ablate_to_simulation"], "'detection' asks a judge"),
        (["--neuron", "0", "--explainer", "max_activating", *SCORED[:2]], "'max_activating' asks a judge"),
    ):
        assert main([*common, *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error
    assert not out.exists()
    assert main([*common, "--heads", "0:1", *SCORED]) == 0
    assert "does not apply: ablate_to_simulation" in capsys.readouterr().out


@pytest.mark.slow
def test_neurons_and_a_latent_of_pico(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rules keep more of the effect of what they are about than another unit's rule does."""
    corpus, out = tmp_path / "sample.jsonl", tmp_path / "out"
    sample = model_defs_dir() / "pico" / "sample" / "held_out.jsonl.gz"
    with gzip.open(sample, "rt", encoding="utf-8") as file:
        corpus.write_text("".join(line for line, _ in zip(file, range(60), strict=False)), encoding="utf-8")
    common = ["explain", "pico", "--corpus", str(corpus), "--out", str(out), "--no-pages", *SCORED]
    assert main([*common, "--layer", "2", "--neurons", "16:20"]) == 0
    assert main([*common, "--sae", "pico", "--latent", "42"]) == 0
    assert "L2 neuron 17" in capsys.readouterr().out
    found = results(out)
    assert len(found) == 5
    differences = []
    for result in found:
        (judged,) = result.judged
        score, control = judged.score, judged.controls[0].scores["ablation_score"]
        assert score.value is not None and control.value is not None and score.coverage == 1
        differences.append(score.value - control.value)
    assert sum(difference > 0 for difference in differences) >= 4
