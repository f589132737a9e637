"""Runs an area: every peer in its own process, outputs checked, rounds interleaved A B C A B C, ratios of each round."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer, open_area

__all__ = ["run_area"]

ROOT = Path(__file__).resolve().parents[2]


class Worker:
    """A process that measures peers of one environment."""

    def __init__(self, peer: Peer, area: str, tiny: bool, folder: Path, threads: int) -> None:
        self.name = peer.process_name
        command = [python_of(peer.environment), str(Path(__file__).with_name("worker.py"))]
        self.process = subprocess.Popen(
            [*command, area, "tiny" if tiny else "full", str(folder), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": str(threads),
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises RuntimeError with what went wrong there."""
        assert self.process.stdin is not None and self.process.stdout is not None, "both are pipes"
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.name}: the process ended before {command}") from None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"the process ended at {command}"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None, "stdin is a pipe"
        self.process.stdin.close()
        self.process.wait(timeout=60)
        if self.process.stdout is not None:
            self.process.stdout.close()


def python_of(environment: str | None) -> str:
    """The interpreter of a peer's environment. Raises SystemExit when it was not made."""
    if environment is None:
        return sys.executable
    path = ROOT / ".peers" / environment / "bin" / "python"
    if not path.exists():
        raise SystemExit(f"the environment of {environment} is missing: run scripts/peer_env {environment}")
    return str(path)


def run_area(
    name: str, *, rounds: int, threads: int, tiny: bool, seconds: float, only: list[str] | None = None
) -> dict[str, Any]:
    """Measure every case of an area and print it.

    Args:
        rounds: interleaved rounds; one more is run first and not counted.
        threads: of torch, in every process.
        tiny: the small shapes, for tests.
        seconds: about how long a peer runs in each round; every peer makes equally many calls.
        only: names of the cases to run; None for all.

    Returns:
        What was measured, ready for JSON.
    """
    area = open_area(name)
    peers: list[Peer] = area.peers()
    cases = [case for case in area.cases(tiny) if only is None or case.name in only]
    if not cases:
        raise SystemExit(f"{name} has no case {only}; known: {[case.name for case in area.cases(tiny)]}")
    results = []
    for case in cases:
        measured = case.measured(peers)
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            results.append(
                _run_case(area, name, case, measured, Path(folder), rounds, threads, tiny, seconds)
            )
            _print_case(results[-1], measured)
    machine = {"python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count()}
    targets = getattr(area, "TARGETS", {})
    made = time.strftime("%Y-%m-%dT%H:%M:%S")
    return {
        "area": name,
        "threads": threads,
        "machine": machine,
        "made": made,
        "targets": targets,
        "cases": results,
    }


def _run_case(
    area: Any,
    name: str,
    case: Case,
    peers: list[Peer],
    folder: Path,
    rounds: int,
    threads: int,
    tiny: bool,
    seconds: float,
) -> dict[str, Any]:
    workers: dict[str, Worker] = {}
    try:
        for peer in peers:
            if peer.process_name not in workers:
                workers[peer.process_name] = Worker(peer, name, tiny, folder, threads)
        if hasattr(area, "prepare"):
            workers[peers[0].process_name].ask(do="prepare", case=case.name)
        outputs = {
            p.name: workers[p.process_name].ask(do="build", peer=p.name, case=case.name)["output"]
            for p in peers
        }
        deviations = {
            p.name: _deviation(outputs[peers[0].name], outputs[p.name]) for p in peers[1:] if p.checked
        }
        for peer, deviation in deviations.items():
            if not deviation <= case.tolerance:
                raise SystemExit(
                    f"{name} {case.name}: {peer} differs from {peers[0].name} by {deviation:.2g} σ: nothing is timed"
                )

        def measure(calls: int) -> dict[str, dict[str, float]]:
            return {p.name: workers[p.process_name].ask(do="time", peer=p.name, calls=calls) for p in peers}

        slowest = max(t["seconds"] for t in measure(1).values())
        calls = max(1, round(seconds / slowest))
        times = [measure(calls) for _ in range(rounds)]
        peaks = {}
        if getattr(area, "MEASURES_MEMORY", False):
            peaks = {p.name: workers[p.process_name].ask(do="peak", peer=p.name)["bytes"] for p in peers}
    finally:
        for worker in workers.values():
            worker.close()
    return {
        "case": case.name,
        "calls": calls,
        "rounds": rounds,
        "seconds": {p.name: _spread([t[p.name]["seconds"] for t in times]) for p in peers},
        "ratios": _ratios(peers, times, "seconds"),
        "cpu_ratios": _ratios(peers, times, "cpu"),
        "deviations": deviations,
        "peak_bytes": peaks,
    }


def _ratios(peers: list[Peer], times: list[dict[str, dict[str, float]]], clock: str) -> dict[str, Any]:
    """The first peer's time over each other's, round by round."""
    ours = peers[0].name
    return {p.name: _spread([t[ours][clock] / t[p.name][clock] for t in times]) for p in peers[1:]}


def _deviation(ours: str, theirs: str) -> float:
    """Largest difference of two written outputs, in standard deviations of ours (of a single number, in its size);
    infinite where shapes differ.
    """
    import numpy

    with numpy.load(ours) as mine, numpy.load(theirs) as others:
        if mine.files != others.files or any(mine[n].shape != others[n].shape for n in mine.files):
            return float("inf")
        worst = 0.0
        for name in mine.files:
            a, b = mine[name].astype("float64"), others[name].astype("float64")
            if a.size:
                unit = a.std() or abs(a).max() or 1.0
                worst = max(worst, float(abs(a - b).max() / unit))
        return worst


def _spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return dict(
        zip(("min", "q1", "median", "q3", "max"), (min(values), *quartiles, max(values)), strict=True)
    )


def _print_case(result: dict[str, Any], peers: list[Peer]) -> None:
    print(f"\n{result['case']}  ({result['rounds']} rounds of {result['calls']} calls)")
    width = max(len(peer.name) for peer in peers)
    for peer in peers:
        line = f"  {peer.name:{width}}  {result['seconds'][peer.name]['median'] * 1e3:10.3f} ms"
        if peer.name in result["ratios"]:
            r = result["ratios"][peer.name]
            line += f"   ours / this {r['median']:.3f}  [{r['min']:.3f} | {r['q1']:.3f} – {r['q3']:.3f} | {r['max']:.3f}]"
            line += f"   processor time {result['cpu_ratios'][peer.name]['median']:.3f}"
        if peer.name in result["peak_bytes"]:
            line += f"   peak {result['peak_bytes'][peer.name] / 2**20:.1f} MiB"
        print(line, flush=True)
