#!/usr/bin/env python
"""Measure neuron_lens against other libraries: `scripts/bench.py forward generate`.

Every peer runs in a process and an environment of its own (scripts/peer_env), outputs are compared before anything is
timed, and rounds are interleaved, so that a ratio compares moments that lie side by side. Printed are medians of
each round's ratio (ours / theirs: below 1 is faster) with their spread [min | quartiles | max]. Areas are the files
of scripts/benchmarks/areas.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmarks.area import area_names, open_area
from benchmarks.harness import ROOT, run_area


def main(arguments: list[str] | None = None) -> None:
    """Run the areas named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(area_names())}; all when none is named")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (15)")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch in every process (2)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="about how long a peer runs in a round (0.5)"
    )
    parser.add_argument("--case", action="append", help="only this case; may be given several times")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: says whether it runs, not how fast")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench_results", help="folder for the JSON (bench_results)"
    )
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads start at 1")
    for name in given.areas or area_names():
        area = open_area(name)
        print(f"\n{name}: {(area.__doc__ or '').splitlines()[0]}")
        for what, target in area.TARGETS.items():
            print(f"  target: {what}: {target}")
        options = {
            "rounds": given.rounds,
            "threads": given.threads,
            "tiny": given.tiny,
            "seconds": given.seconds,
        }
        result = run_area(name, **options, only=given.case)
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
