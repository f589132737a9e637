"""The benchmark harness: it runs an area, checks outputs before it times, and gives ratios of interleaved rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks import harness  # noqa: E402
from benchmarks.area import Case, Peer, area_names, open_area  # noqa: E402


def run_bench(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "bench.py"),
        "--tiny",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("name", area_names())
def test_areas_say_what_they_compare(name: str) -> None:
    area = open_area(name)
    assert area.__doc__ and area.TARGETS
    for tiny in (True, False):
        names = [case.name for case in area.cases(tiny)]
        assert names and len(set(names)) == len(names)
        for case in area.cases(tiny):
            assert case.measured(area.peers())[0].environment is None, "ours comes first"


def test_a_case_names_who_is_measured_on_it() -> None:
    peers = [Peer(name, lambda case, folder: print) for name in "abc"]
    assert Case("all").measured(peers) == peers
    assert Case("some", peers=("c", "a")).measured(peers) == [peers[2], peers[0]]
    with pytest.raises(KeyError, match="d"):
        Case("unknown", peers=("d",)).measured(peers)


def test_an_area_runs_and_saves_its_ratios(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "hooks", "--rounds", "3", "--seconds", "0.01")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "hooks.json").read_text())
    (case,) = result["cases"]
    assert set(case["ratios"]) == {peer.name for peer in open_area("hooks").peers()[1:]}
    for spread in [*case["ratios"].values(), *case["seconds"].values()]:
        assert 0 < spread["min"] <= spread["q1"] <= spread["median"] <= spread["q3"] <= spread["max"]
    assert all(deviation < 1e-4 for deviation in case["deviations"].values())
    assert "hook calls deleted" in done.stdout


def test_an_unknown_area_is_refused_with_those_there_are(tmp_path: Path) -> None:
    done = run_bench(tmp_path, "nonsense")
    assert done.returncode != 0 and "hooks" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_environment_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="scripts/peer_env transformers"):
        harness.python_of("transformers")


def test_outputs_that_differ_are_found(tmp_path: Path) -> None:
    rows = numpy.arange(12.0).reshape(3, 4)
    for name, output in {"a": rows, "b": rows + 1e-3, "c": rows[:2]}.items():
        numpy.savez(tmp_path / f"{name}.npz", logits=output)
    paths = {name: str(tmp_path / f"{name}.npz") for name in "abc"}
    assert harness._deviation(paths["a"], paths["a"]) == 0
    assert harness._deviation(paths["a"], paths["b"]) == pytest.approx(1e-3 / rows.std())
    assert harness._deviation(paths["a"], paths["c"]) == float("inf")


def test_nothing_is_timed_when_outputs_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Scripted:
        """A worker that answers from a script."""

        def __init__(self, peer: Peer, *_: object) -> None:
            self.name = peer.name

        def ask(self, do: str, **_: object) -> dict[str, object]:
            asked.append(do)
            return {"output": self.name}

        def close(self) -> None:
            asked.append("close")

    class Area:
        """An area without weights."""

        @staticmethod
        def cases(tiny: bool) -> list[Case]:
            return [Case("one", tolerance=1e-4)]

        @staticmethod
        def peers() -> list[Peer]:
            return [Peer(name, lambda case, folder: print) for name in ("ours", "theirs")]

    monkeypatch.setattr(harness, "Worker", Scripted)
    monkeypatch.setattr(harness, "open_area", lambda name: Area)
    monkeypatch.setattr(harness, "_deviation", lambda ours, theirs: 0.5)
    with pytest.raises(SystemExit, match=r"theirs differs from ours by 0\.5"):
        harness.run_area("one", rounds=3, threads=1, tiny=True, seconds=0.1)
    assert asked == ["build", "build", "close", "close"]


@pytest.mark.slow
@pytest.mark.peer
@pytest.mark.parametrize("area", ["forward", "generate", "load", "harvest"])
def test_areas_with_peers_run(area: str, tmp_path: Path) -> None:
    peers = open_area(area).peers()
    environments = sorted({peer.environment for peer in peers if peer.environment})
    subprocess.run([str(ROOT / "scripts" / "peer_env"), *environments], check=True)
    done = run_bench(tmp_path, area, "--rounds", "2", "--seconds", "0.01")
    assert done.returncode == 0, done.stderr
    found = {
        result["case"]: result for result in json.loads((tmp_path / f"{area}.json").read_text())["cases"]
    }
    for case in open_area(area).cases(tiny=True):
        others = case.measured(peers)[1:]
        assert set(found[case.name]["ratios"]) == {peer.name for peer in others}
        assert set(found[case.name]["deviations"]) == {peer.name for peer in others if peer.checked}
