"""The public surface, import cost, the floors, and the documents that are run."""

from __future__ import annotations

import ast
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest

import neuron_lens

PACKAGE = Path(neuron_lens.__file__).parent
HEAVY = ["torch", "transformers", "pandas", "matplotlib", "jinja2", "ray", "fastapi", "openai", "tokenizers"]

# A folder (or module) of the package -> the floor it stands on. Imports at module level go down, or stay in the folder.
FLOORS = {
    "errors": 0,
    "shapes": 0,
    "windows": 1.5,
    "hooks": 1,
    "records": 1,
    "positions": 1,
    "files": 1,
    "llm": 1,
    "transformer": 2,
    "tokenizers": 2,
    "autoencoders": 2,
    "explain": 2,
    "weights": 3,
    "loading": 3,
    "report": 3,
    "cache": 4,
    "harvest": 5,
    "analysis": 5,
    "interventions": 5,
    "autoencoder_training": 6,
    "faces": 6,
    "compat": 7,
    "cli": 8,
    "__main__": 9,
}


def test_every_public_name_loads_and_the_list_is_sorted() -> None:
    assert neuron_lens.__all__ == sorted(neuron_lens.__all__)
    for name in neuron_lens.__all__:
        assert getattr(neuron_lens, name) is not None
    with pytest.raises(AttributeError, match="it offers"):
        _ = neuron_lens.nonsense


@pytest.mark.parametrize("code", ["import neuron_lens", "from neuron_lens.cli import main; main(['--help'])"])
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    script = f"""
import sys, json, contextlib, io
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    {code}
print(json.dumps(sorted(set({HEAVY}) & set(sys.modules))))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def imports_at_module_level(path: Path) -> set[str]:
    """First part below neuron_lens of every module imported when the file is loaded."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for node in ast.walk(branch)
    }
    inside_functions = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only or id(node) in inside_functions:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [
                f"{node.module}.{alias.name}" if node.module == "neuron_lens" else node.module
                for alias in node.names
            ]
        found |= {name.split(".")[1] for name in names if name.startswith("neuron_lens.")}
    return found


def test_floors_import_downwards_only() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in FLOORS, f"{part} stands on no floor: add it to FLOORS"
        for imported in imports_at_module_level(path) - {part, "__version__"}:
            if FLOORS[imported] >= FLOORS[part]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {imported}")
    assert not wrong


def test_explain_and_report_run_without_torch() -> None:
    code = "import neuron_lens.explain, neuron_lens.report, neuron_lens.llm, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("document", ["neuron_lens/hooks/README.md", "README.md"])
def test_examples_in_documents_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = PACKAGE.parent / document
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(str(path), module_relative=False, optionflags=flags)
    assert result.failed == 0
