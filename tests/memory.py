"""Peak memory of scripts that run in processes of their own, measured so that it repeats."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One thread, one arena, and what is freed goes back to the system at once: by itself malloc keeps what it likes, and the
# same harvest peaks anywhere from 65 to 118 MB.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}

_GROWTH = """
import ctypes, gc, json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
given = json.loads(sys.argv[1])

def _resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

def growth(work):  # how far the process grows while working, in bytes
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before
"""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc"
)


def measured(script: str, given: Any) -> Any:
    """What a script prints as JSON that has `given` and a function growth(work), which says how many bytes work() takes."""
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH + script, json.dumps(given)],
        capture_output=True, text=True, check=False, env={**os.environ, **_ENVIRONMENT},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
