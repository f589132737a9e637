"""Judges are imported without what they may need later."""

from __future__ import annotations

import json
import subprocess
import sys

import neuron_lens.llm as llm


def test_import_loads_nothing_heavy() -> None:
    code = "import json, sys, neuron_lens.llm; print(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(run.stdout)}
    assert not loaded & {"torch", "openai", "numpy", "transformers", "tokenizers", "tiktoken"}


def test_the_public_names_are_there() -> None:
    assert all(hasattr(llm, name) for name in llm.__all__)
