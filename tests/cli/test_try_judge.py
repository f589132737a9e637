"""`neuron-lens judge`, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from explain.judge import RuleJudge

from neuron_lens.cli import main
from neuron_lens.explain.judge_check import JudgeCheck
from neuron_lens.llm import Request, Response

KNOWS = "scripted:cli.test_try_judge:knows_the_rules"


def knows_the_rules(request: Request) -> str | Response:
    return RuleJudge()(request)


def test_a_judge_is_tried_and_its_answers_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["judge", KNOWS, "--puzzles", "3", "--out", str(tmp_path), "--quiet"]
    assert main([*command, "--dry-run"]) == 0
    assert "3 planted units: 240 calls" in capsys.readouterr().out
    assert main([*command, "--max-calls", "100"]) == 3
    assert "nothing is lost" in capsys.readouterr().err
    assert main([*command, "--max-calls", "140"]) == 0  # the rest of 240
    table = capsys.readouterr().out
    assert table.count("3 of 3") == 2 and "100%" in table
    (file,) = tmp_path.glob("*.json")
    checks = [JudgeCheck.model_validate(one) for one in json.loads(file.read_text())]
    assert [check.scorer for check in checks] == ["detection", "fuzzing"]
    assert all(check.n_first == 3 and str(file) in table for check in checks)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--puzzles", "0"], "give a number from 1"),
        (["--scorers", "detektion"], "did you mean 'detection'"),
        (["--scorers", ","], "at least one of each"),
        (["--batch", "0"], "batch=0"),
        (["--capabilities", "chat"], "goes with --judge openai"),
    ],
)
def test_bad_input_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", KNOWS, "--out", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


def test_what_an_endpoint_can_do_is_what_it_is_said_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is listening at this address: nothing is asked."""
    command = ["judge", "openai:words@http://127.0.0.1:9/v1", "--puzzles", "1", "--dry-run", "--quiet"]
    command += ["--out", str(tmp_path), "--scorers", "surprisal"]
    assert main(command) == 2
    assert "needs completion, prompt_logprobs" in capsys.readouterr().err
    assert main([*command, "--capabilities", "completion, prompt_logprobs"]) == 0
    assert "1 planted units: " in capsys.readouterr().out
    assert main([*command, "--capabilities", "completion,promptlogprobs"]) == 2
    assert "did you mean 'prompt_logprobs'" in capsys.readouterr().err


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "neuron_lens", "judge", "nobody"], capture_output=True, text=True
    )
    assert run.returncode == 2 and "expected openai:MODEL" in run.stderr
