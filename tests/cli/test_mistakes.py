"""What a stranger does wrong: one line that says what was given, what was expected and what to do, and exit code 2."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from explain import word_judge

from neuron_lens.cli import main
from neuron_lens.cli.arguments import not_negative, whole_number
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.explain.source_work import SourceWork
from tests.llm.server import JudgeServer, Reply


def told(capsys: pytest.CaptureFixture[str], complaint: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("neuron-lens: error: ") and error.count("\n") == 1, error
    assert complaint in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "required: command; see neuron-lens --help"),
        (["explian"], "invalid choice: 'explian'"),
        (["explain", "--nueron", "3"], "unrecognized arguments: --nueron"),
        (["explain", "--layer", "x"], "invalid int value: 'x'; see neuron-lens explain --help"),
        (["explain", "--neuron"], "expected one argument"),
        (["explain", "--neuron", "1", "--head", "1"], "not allowed with"),
        (["harvest", "--seed", "-1"], "a whole number from 0, got '-1'"),
        (["harvest", "--format", "x"], "invalid choice: 'x'"),
        (["score"], "required: folder"),
        (["report"], "required: folder"),
        (["verify"], "required: PATH"),
        (["verify", "pico", "--new-tokens", "0"], "a whole number from 1, got '0'"),
        (["verify", "pico", "--tolerance", "nan"], "a number from 0, got 'nan'"),
        (["sae"], "required: action; see neuron-lens sae --help"),
        (["sae", "train", "pico"], "required: --width; see neuron-lens sae train --help"),
        (["sae", "train", "pico", "--width", "0"], "a whole number from 1, got '0'"),
        (["sae", "evaluate", "pico", "--tokens", "none"], "a whole number from 1, got 'none'"),
    ],
)
def test_options_that_cannot_be_are_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    told(capsys, complaint)


def test_numbers_are_read_from_their_least_up() -> None:
    assert whole_number(0)("0") == 0 and whole_number(1)("17") == 17
    assert not_negative("0") == 0.0 and not_negative("1e-3") == 0.001


@pytest.mark.parametrize("command", [["report"], ["score", "--scorers", "detection"], ["verify"]])
def test_a_folder_of_another_kind(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, complaint in (("hello", "Invalid JSON"), ("{}", "method_version: Field required")):
        (tmp_path / "manifest.json").write_text(content)
        assert main([*command[:1], str(tmp_path), *command[1:]]) == 2
        told(capsys, complaint)
    (tmp_path / "manifest.json").unlink()
    if command != ["verify"]:  # which takes other folders for checkpoints
        for folder in (tmp_path, tmp_path / "missing"):
            assert main([*command[:1], str(folder), *command[1:]]) == 2
            told(capsys, "is no run folder (it has no manifest.json); make one with neuron-lens harvest")


@pytest.mark.usefixtures("planted_model")
@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": oops}\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected an object with 'text', got list"),
        ("a.jsonl", b'{"text": 5}\n', "it has 'text', and 'text' is int; say which"),
        ("a.jsonl.gz", b"plain", "cannot read"),
        ("a.txt", b"\xff\xfe\x00", "as UTF-8 text"),
        ("a.txt", b" \n", "is empty"),
        ("a.bin.d", None, "no file, folder or pattern"),
    ],
)
def test_text_that_cannot_be_read(
    name: str, content: bytes | None, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    for command in ("explain", "harvest"):
        assert (
            main([command, "planted", "--corpus", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        )
        told(capsys, complaint)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("planted_model")
def test_an_interrupted_run_says_so_and_goes_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(out: str) -> list[str]:
        folder = ["--corpus", str(texts), "--out", str(tmp_path / out), "--quiet"]
        return ["explain", "planted", "--neurons", "0:3", *folder]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_manifest", interrupted)
        assert main(asked("run")) == 130
    assert capsys.readouterr().err == "neuron-lens: interrupted; the same command goes on from here\n"
    assert main(["report", run]) == 2
    told(capsys, "its harvest was stopped: give the same command again")
    with monkeypatch.context() as patch:
        result = SourceWork.result
        patch.setattr(
            SourceWork, "result", lambda work, i, *facts: (interrupted if i else result)(work, i, *facts)
        )
        assert main(asked("run")) == 130
    assert len(list(tmp_path.glob("run/units/*/result.json"))) == 1
    for command in (["report", run], ["score", run, "--scorers", "detection"]):
        capsys.readouterr()
        assert main(command) == 2
        told(capsys, "holds no explanations yet (run.json does not exist): run neuron-lens explain into it")
    assert main(asked("run")) == 0 and main(asked("whole")) == 0
    written = [
        {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).glob("units/*/*")}
        for out in ("run", "whole")
    ]
    assert written[0] == written[1] and len(written[0]) == 6
    capsys.readouterr()
    assert main(["explain", run]) == 2
    told(capsys, "is a run folder, not a model")


@pytest.mark.usefixtures("planted_model")
def test_a_judge_that_never_answers_is_not_passed_over_in_silence(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "explain",
        "planted",
        "--neurons",
        "0:2",
        "--corpus",
        str(texts),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
    ]
    assert main([*asked, "--scorers", "detection"]) == 2
    told(capsys, "--judge")
    with JudgeServer(lambda body, attempt: Reply("no", status=400)) as server:
        judge = ["--scorers", "detection", "--judge", f"openai:words@{server.url}"]
        assert main([*asked, *judge]) == 0
    error = capsys.readouterr().err
    assert "detection: no answer came for 2 of 2 units" in error and error.count("\n") == 1
    assert "failed); see that the judge answers, and give the same command again" in error
    with JudgeServer(lambda body, attempt: word_judge.served(body)) as server:
        judge[-1] = f"openai:words@{server.url}"
        assert main([*asked, *judge]) == 0 and server.calls > 0
        calls = server.calls
        assert main([*asked, *judge]) == 0 and server.calls == calls
    assert capsys.readouterr().err == ""
    assert all(one.score.coverage == 1 for row in RunFolder(tmp_path / "out").run() for one in row.judged)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from neuron_lens.cli import models

    def full(_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")

    monkeypatch.setattr(models, "run", full)
    assert main(["models"]) == 2
    told(capsys, "make room")

    def broken(_: object) -> int:
        raise OSError(errno.EIO, "a fault that is nobody's mistake")

    monkeypatch.setattr(models, "run", broken)
    with pytest.raises(OSError, match="nobody's mistake"):
        main(["models"])


def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    code = "import sys; from neuron_lens.cli import main; sys.exit(main(['models']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-u", "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
