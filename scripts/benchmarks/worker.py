"""The process a peer is measured in: reads one JSON command a line, answers with one JSON line.

    {"do": "build", "peer": …, "case": …}   builds, runs once, writes the output, answers with its path
    {"do": "time", "peer": …, "calls": n}   answers with seconds a call, by the clock and of processor time
    {"do": "peak", "peer": …}               answers with the bytes that one call adds to the process at most

Started by `harness` with the arguments AREA TINY FOLDER THREADS, in the environment of the peer.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.area import open_area


def main() -> None:
    """Answer commands until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print: what they say goes to stderr
    os.dup2(2, 1)
    area_name, tiny, folder, threads = sys.argv[1:]
    import torch

    torch.set_num_threads(int(threads))
    area = open_area(area_name)
    peers = {peer.name: peer for peer in area.peers()}
    cases = {case.name: case for case in area.cases(tiny == "tiny")}
    measured: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer: dict[str, Any] = {}
            if command["do"] == "prepare":
                area.prepare(cases[command["case"]], Path(folder))
            elif command["do"] == "build":
                measured[command["peer"]] = peers[command["peer"]].build(cases[command["case"]], Path(folder))
                output = _flat(measured[command["peer"]]())
                answer["output"] = _written(output, Path(folder), command["peer"])
            elif command["do"] == "time":
                answer = _times(measured[command["peer"]], command["calls"])
            elif command["do"] == "peak":
                answer["bytes"] = _peak(measured[command["peer"]])
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


def _times(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Mean times of a call, garbage collected beforehand and not during it."""
    gc.collect()
    gc.disable()
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        run()
    elapsed, elapsed_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    gc.enable()
    return {"seconds": elapsed / calls, "cpu": elapsed_cpu / calls}


def _peak(run: Callable[[], Any]) -> int:
    """How much the memory of this process grows at most during a call, mapped files included. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed must not hide what this one takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _flat(output: Any) -> dict[str, Any]:
    """Output as named tensors."""
    if output is None:
        return {}
    if isinstance(output, dict):
        return output
    return {
        str(i): tensor for i, tensor in enumerate(output if isinstance(output, list | tuple) else [output])
    }


def _written(output: dict[str, Any], folder: Path, peer: str) -> str:
    import numpy

    path = folder / f"output of {peer.replace('/', ' ')}.npz"
    numpy.savez(path, **{name: tensor.detach().cpu().numpy() for name, tensor in output.items()})
    return str(path)


if __name__ == "__main__":
    main()
