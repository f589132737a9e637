"""The whole job on the shipped model, with a judge behind HTTP that knows one rule: the word the sentence names."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from neuron_lens.cli import main
from neuron_lens.explain.result import UnitResult
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.files.model_defs import model_defs_dir
from tests.llm.server import JudgeServer

pytestmark = pytest.mark.slow


def answering(body: dict[str, Any], attempt: int) -> str:
    """Explain by the marked token seen most; hold texts and marks to the one a description names."""
    prompt = body["messages"][-1]["content"]
    described = re.search(r"^Description: .* the token (\".*\")$", prompt, re.MULTILINE)
    texts = [json.loads(text) for text in re.findall(r'^\d+: (".*")$', prompt, re.MULTILINE)]
    if "Description:" not in prompt:
        marked = Counter(
            piece for text in texts for piece in re.findall(r"(?s)(?:<<|\[\[)(.+?)(?:>>|\]\])", text)
        )
        return json.dumps(
            {"explanation": f"fires on the token {json.dumps(max(marked, key=marked.__getitem__))}"}
        )
    assert described is not None, prompt
    token = json.loads(described[1])
    if "The marks are" in prompt:
        return json.dumps({"answers": [f"<<{token}>>" in text for text in texts]})
    return json.dumps({"answers": [token in text for text in texts]})


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some of the text no shipped model was trained on."""
    path = tmp_path / "sample.jsonl"
    with gzip.open(
        model_defs_dir() / "pico" / "sample" / "held_out.jsonl.gz", "rt", encoding="utf-8"
    ) as file:
        path.write_text("".join(line for line, _ in zip(file, range(60), strict=False)), encoding="utf-8")
    return path


def test_neurons_a_latent_and_a_head_of_pico(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units, heads = tmp_path / "units", tmp_path / "heads"
    with JudgeServer(answering) as server:
        common = ["explain", "pico", "--corpus", str(texts), "--quiet", "--scorers", "detection,fuzzing"]
        common += ["--judge", f"openai:rule@{server.url}"]
        maximal = [*common, "--out", str(units), "--explainer", "max_activating"]
        assert main([*maximal, "--layer", "2", "--neurons", "17,23"]) == 0
        assert main([*maximal, "--sae", "pico", "--latent", "42"]) == 0
        pairs = [*common, "--out", str(heads), "--explainer", "attention_pairs"]
        assert main([*pairs, "--layer", "1", "--head", "0"]) == 0
        calls = server.calls
        assert main([*maximal, "--layer", "2", "--neurons", "17,23"]) == 0 and server.calls == calls
    results = [*RunFolder(units).results(), *RunFolder(heads).results()]
    assert sorted(one.unit.kind for one in results) == ["head", "latent", "neuron", "neuron"]
    for result in results:
        assert result.explanation.sentence.startswith("fires on the token ")
        assert [judged.scorer for judged in result.judged] == ["detection", "fuzzing"]
        for judged in result.judged:
            score = judged.score
            assert score.value is not None and score.coverage == 1 and not judged.missing
            assert score.low is not None and score.high is not None
            assert 0 <= score.low <= score.value <= score.high <= 1
            assert judged.controls
    # The rule is a true part of what these units do: over all of them it beats the controls, by little, as near misses
    # hold the same token.
    assert margin(results) > 0
    for folder, count in ((units, 3), (heads, 1)):
        assert (folder / "index.html").is_file() and len(list(folder.glob("units/*/index.html"))) == count
        capsys.readouterr()
        assert main(["verify", str(folder)]) == 0
        assert "DO NOT" not in capsys.readouterr().out


def margin(results: list[UnitResult]) -> float:
    """How far scores lie above those of their first control, on average."""
    differences = []
    for result in results:
        for judged in result.judged:
            control = judged.controls[0].scores[judged.headline].value
            assert judged.score.value is not None and control is not None
            differences.append(judged.score.value - control)
    return sum(differences) / len(differences)
