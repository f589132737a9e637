"""A judge by command: rehearsed, kept to a budget, killed and resumed, failing; nothing is asked twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from explain import planted, word_judge

from neuron_lens.cli import main
from neuron_lens.explain.result import RunResult, UnitResult
from neuron_lens.explain.run_folder import RunFolder
from tests.llm.server import JudgeServer, Reply

TESTS = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def planted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from neuron_lens.transformer import Transformer

    monkeypatch.setattr(Transformer, "load", classmethod(lambda cls, name: planted.model()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, document in enumerate(planted.corpus(10)):
        (folder / f"{number:02}.txt").write_text(document.text)
    return folder


@pytest.fixture(scope="module")
def harvested(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that was harvested, to start from."""
    out = tmp_path_factory.mktemp("harvested") / "run"
    with pytest.MonkeyPatch.context() as patch:
        from neuron_lens.transformer import Transformer

        patch.setattr(Transformer, "load", classmethod(lambda cls, name: planted.model()))
        assert main(["harvest", "planted", "--corpus", str(texts), "--out", str(out), "--quiet"]) == 0
    return out


def copied(harvested: Path, out: Path) -> Path:
    import shutil

    shutil.copytree(harvested, out)
    return out


def command(texts: Path, out: Path, url: str, *more: str, neurons: str = "0:2") -> list[str]:
    return [
        "explain", "planted", "--neurons", neurons, "--corpus", str(texts), "--out", str(out), "--quiet",
        "--no-pages", "--explainer", "max_activating", "--scorers", "detection,fuzzing",
        "--judge", f"openai:words@{url}", *more,
    ]  # fmt: skip


def answering(body: dict[str, Any], attempt: int) -> str:
    return word_judge.served(body)


def results(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(out.glob("units/*/result.json"))}


def test_a_rehearsal_counts_the_calls_and_a_second_run_makes_none(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(harvested, tmp_path / "run")
    with JudgeServer(answering) as server:
        asked = command(texts, out, server.url)
        assert main([*asked, "--dry-run", "--price", "1,2"]) == 0
        printed = capsys.readouterr().out
        found = re.search(r"(\d+) calls", printed)
        assert found is not None and server.calls == 0 and "currency" in printed
        assert main(asked) == 0
        assert server.calls == int(found[1]) > 20
        printed = capsys.readouterr().out
        assert "the word 'self'" in printed and "detection" in printed and "fuzzing" in printed
        before = results(out)
        assert main(asked) == 0 and main([*asked, "--dry-run"]) == 0
        assert server.calls == int(found[1]) and results(out) == before
        assert "0 calls" in capsys.readouterr().out
    run = RunResult.read(out / "run.json")
    for row in run:
        assert [one.scorer for one in row.judged] == ["detection", "fuzzing"]
        assert all(one.control is not None for one in row.judged)
    manifest = RunFolder(out).require_manifest()
    assert manifest.explainer is not None and manifest.explainer.judge == "openai words"
    assert set(manifest.prompts) == {"max_activating", "detection", "fuzzing"}
    assert all(len(value) == 64 for value in manifest.prompts.values())


def test_the_budget_stops_before_it_is_exceeded_and_the_command_goes_on(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = copied(harvested, tmp_path / "run"), copied(harvested, tmp_path / "whole")
    with JudgeServer(answering) as server:
        assert main(command(texts, whole, server.url)) == 0
        full = server.calls
    with JudgeServer(answering) as server:
        asked = command(texts, out, server.url)
        capsys.readouterr()
        assert main([*asked, "--max-calls", "9"]) == 3
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "nothing is lost" in error and "same command" in error
        assert server.calls == 9 and (out / "run.json").is_file()
        assert main(asked) == 0
        assert server.calls == full and max(server.answered.values()) == 1
    assert results(out) == results(whole)
    assert main([*asked, "--budget", "1"]) == 2
    assert "--price" in capsys.readouterr().err


_CHILD = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from explain import planted
from neuron_lens.transformer import Transformer
Transformer.load = classmethod(lambda cls, name: planted.model())
from neuron_lens.cli import main
sys.exit(main({command!r}))
"""


def test_killed_at_any_moment_nothing_is_asked_twice_and_the_result_is_the_same(
    texts: Path, harvested: Path, tmp_path: Path
) -> None:
    out, whole = copied(harvested, tmp_path / "run"), copied(harvested, tmp_path / "whole")

    def slowly(body: dict[str, Any], attempt: int) -> Reply:
        from tests.llm.server import chat_reply

        return Reply(chat_reply(word_judge.served(body)), seconds=0.02)

    with JudgeServer(slowly) as server:
        asked = command(texts, out, server.url, "--concurrency", "2")
        code = _CHILD.format(tests=str(TESTS), root=str(TESTS.parent), command=asked)
        killed = 0
        for calls in (2, 11, 23):
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 120
            while server.calls < calls and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.005)
            child.send_signal(signal.SIGKILL)
            killed += child.wait() == -signal.SIGKILL
        assert killed == 3
        time.sleep(0.2)  # what was in flight is answered to nobody
        assert main(asked) == 0
        repeated = sum(count - 1 for count in server.answered.values())
        assert repeated <= 2 * killed  # only calls in flight when it was killed, whose answer nobody had
    with JudgeServer(answering) as server:
        assert main(command(texts, whole, server.url, "--concurrency", "2")) == 0
    assert results(out) == results(whole)


def test_failures_lower_the_coverage_and_nothing_else(texts: Path, harvested: Path, tmp_path: Path) -> None:
    from explain.judge import guess

    def failing(body: dict[str, Any], attempt: int) -> str:
        fails = guess(json.dumps(body["messages"])) < 0.3 and "Description" in body["messages"][-1]["content"]
        return "I would rather not say." if fails else word_judge.served(body)

    out = copied(harvested, tmp_path / "run")
    with JudgeServer(failing) as server:
        assert main(command(texts, out, server.url, neurons="0:1")) == 0
    result = UnitResult.read(out / "units" / "layer0_neuron0" / "result.json")
    for judged in result.judged:
        assert judged.missing and 0 < judged.score.coverage < 1
        assert (judged.score.value is None) == (judged.score.coverage < 0.5)
        assert judged.score.value is None or judged.score.value > 0.9


def test_each_command_runs_alone_on_the_folder(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(harvested, tmp_path / "run")
    judge = ["--judge", "scripted:explain.word_judge:scripted"]
    common = ["--corpus", str(texts), "--out", str(out), "--quiet"]
    assert main(["score", str(out), "--scorers", "detection", *judge, "--quiet"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["explain", "planted", "--neurons", "0:2", *common]) == 0
    plain = {name: json.loads(text) for name, text in results(out).items()}
    capsys.readouterr()
    assert main(["score", str(out), "--scorers", "detection", *judge, "--quiet"]) == 0
    assert "detection balanced_accuracy" in capsys.readouterr().out
    for name, text in results(out).items():
        scored = json.loads(text)
        assert scored.pop("judged") and not plain[name].pop("judged")
        assert scored == plain[name]
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert main(["score", str(out), "--scorers", "detection", *judge, "--quiet"]) == 0
    assert main(["explain", "planted", "--neurons", "0:2", *common]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    capsys.readouterr()
    for kind, made in (
        ("html", "index.html"),
        ("csv", "units.csv"),
        ("jsonl", "units.jsonl"),
        ("openai", "openai/neuron/explanations/0/1.jsonl"),
        ("neuronpedia", "neuronpedia/planted/0-neuron/batch-0.json"),
    ):
        assert main(["report", str(out), "--format", kind]) == 0
        assert (out / made).is_file(), kind
    assert len((out / "units.jsonl").read_text().splitlines()) == 2


def test_a_folder_of_something_else_is_refused_by_name(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(harvested, tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("".join(document.text for document in planted.corpus(10, seed=1)))
    common = ["--out", str(out), "--quiet", "--no-pages", "--neuron", "0"]
    before = (out / "manifest.json").read_bytes()
    for arguments, complaint in (
        (["explain", "planted", "--corpus", str(other), *common], "another corpus"),
        (["explain", "planted", "--corpus", str(texts), "--seed", "1", *common], "another harvest settings"),
        (["harvest", "planted", "--corpus", str(other), *common[:3], "--neuron", "0"], "another corpus"),
        (["report", str(other)], "is no run folder"),
        (["score", str(other), "--scorers", "detection"], "is no run folder"),
        (["explain", "planted", "--scorers", "detection", "--corpus", str(texts), *common], "asks a judge"),
        (["explain", "planted", "--scorers", "detecting", "--corpus", str(texts), *common], "did you mean"),
        (["explain", "planted", "--judge", "somebody", "--corpus", str(texts), *common], "expected openai"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1, error
    assert (out / "manifest.json").read_bytes() == before
    assert main(["explain", "planted", "--corpus", str(texts), *common]) == 0
    scripted = ["--explainer", "max_activating", "--judge", "scripted:explain.word_judge:scripted"]
    assert main(["explain", "planted", "--corpus", str(texts), *common, *scripted]) == 2
    assert "another explainer" in capsys.readouterr().err


def test_verify_tells_what_reproduces_from_what_was_changed(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import load_file, save_file

    out = copied(harvested, tmp_path / "run")
    common = ["--corpus", str(texts), "--out", str(out), "--quiet"]
    assert main(["harvest", "planted", "--heads", "0:2", *common]) == 0
    capsys.readouterr()
    assert main(["verify", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "layer0: " in printed and "layer0_head: " in printed and "DO NOT" not in printed
    path = out / "harvest" / "layer0" / "activations.safetensors"
    tensors = load_file(path)
    tensors["random.activations"] = tensors["random.activations"] + tensors["random.activations"].dtype.type(
        0.1
    )
    save_file(tensors, path)
    assert main(["verify", str(out)]) == 1
    assert "DO NOT REPRODUCE" in capsys.readouterr().out


def embedded(body: dict[str, Any], attempt: int) -> Reply:
    """Whether each text holds the word self."""
    data = [
        {"object": "embedding", "index": place, "embedding": [float("self" in text), 0.5]}
        for place, text in enumerate(body["input"])
    ]
    return Reply({"object": "list", "model": "words", "data": data})


def test_an_embedder_by_command_scores_without_a_judge_and_is_not_asked_in_a_rehearsal(
    texts: Path, harvested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(harvested, tmp_path / "run")
    with JudgeServer(embedded) as server:
        options = [
            "explain", "planted", "--neurons", "0:1", "--corpus", str(texts), "--out", str(out), "--quiet",
            "--no-pages", "--scorers", "embedding", "--embedder", f"openai:words@{server.url}",
        ]  # fmt: skip
        assert main([*options, "--dry-run"]) == 0 and server.calls == 0
        assert main(options) == 0 and server.calls > 0
        (found,) = [UnitResult.read(path) for path in out.glob("units/*/result.json")]
        assert found.judged[0].scorer == "embedding" and found.judged[0].method == "endpoint words"
        assert (found.judged[0].score.value or 0.0) > 0.95
        made = server.calls
        assert main([*options, "--max-calls", "3"]) == 2 and server.calls == made
    capsys.readouterr()
    assert main([*options[:-2]]) == 2
    assert "needs an embedder" in capsys.readouterr().err
    assert main([*options[:-3], "detection", *options[-2:]]) == 2
    assert "--embedder goes with" in capsys.readouterr().err
