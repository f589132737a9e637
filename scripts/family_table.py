"""Write the table of families into the README: for each, the worst deviation from transformers over its test shapes.

python scripts/family_table.py            print the table, and write it between the markers of README.md
python scripts/family_table.py --print    print it only
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from loading.families import CASES, quiet  # noqa: E402  (the shapes are those of the tests)

from neuron_lens.files.atomic import write_text_atomic  # noqa: E402
from neuron_lens.loading import Verification, verify  # noqa: E402
from neuron_lens.loading.registry import definitions  # noqa: E402

START, END = "<!-- families -->", "<!-- /families -->"


def deviations() -> dict[str, list[Verification]]:
    """What `verify` finds for each shape, by family."""
    found: dict[str, list[Verification]] = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder, quiet():
            result = verify(case.save(Path(folder)))
        found.setdefault(case.family, []).append(result)
        print(f"{case}: {result.worst:.1e}", file=sys.stderr)
        if not result.passed:
            raise SystemExit(f"{case} is not equal:\n{result}")
    return found


def table(found: dict[str, list[Verification]]) -> str:
    """Markdown, one row for each family."""
    lines = [
        "| family | shapes | logits | hidden states | gradient | padded rows | for example |",
        "|---|---|---|---|---|---|---|",
    ]
    for definition in definitions():
        results = found[definition.name]
        worst = [
            max(result.logits for result in results),
            max(result.hidden for result in results),
            max(result.gradient for result in results),
            max(max(result.left_padded, result.right_padded) for result in results),
        ]
        numbers = " | ".join(f"{number:.0e}" for number in worst)
        lines.append(f"| {definition.title} | {len(results)} | {numbers} | `{definition.examples[0]}` |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write unless told otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="only_print", help="leave README.md as it is")
    only_print = parser.parse_args().only_print
    made = table(deviations())
    print(made)
    if only_print:
        return
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{readme} lacks the markers {START} and {END}")
    write_text_atomic(readme, f"{before}{START}\n{made}\n{END}{after}")


if __name__ == "__main__":
    main()
