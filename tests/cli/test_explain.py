"""The command as a user meets it: a table and pages, or one clear line and exit code 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from neuron_lens.cli import main
from neuron_lens.explain.result import RunResult
from neuron_lens.files.model_defs import model_defs_dir


@pytest.mark.usefixtures("planted_model")
def test_a_run_prints_the_table_and_the_page(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        main(["explain", "planted", "--neurons", "0:2", "--corpus", str(texts), "--out", str(out), "--quiet"])
        == 0
    )
    printed = capsys.readouterr().out
    assert "Fires strongly on the token ' self'" in printed and "another" in printed and "shuffled" in printed
    page = out / "units" / "layer0_neuron0" / "index.html"
    assert str(page) in printed and page.is_file() and (out / "index.html").is_file()
    assert len(RunResult.read(out / "run.json").units) == 2


@pytest.mark.usefixtures("planted_model")
def test_all_and_lists_and_defaults(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--corpus", str(texts), "--out", str(tmp_path / "out"), "--quiet", "--no-pages"]
    for choice, count in (
        (["--neuron", "3"], 1),
        (["--neurons", "1,3,1"], 2),
        ([], 4),
        (["--all", "--layer", "0"], 4),
    ):
        assert main(["explain", "planted", *choice, *common]) == 0
        assert len(RunResult.read(tmp_path / "out" / "run.json").units) >= count
    assert not list((tmp_path / "out").rglob("*.html"))


@pytest.mark.usefixtures("planted_model")
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--layer", "9"], "layer 9 does not exist"),
        (["--layer", "-1"], "--layer is counted from 0"),
        (["--neuron", "400"], "neuron 400 does not exist"),
        (["--neuron", "-2"], "counted from 0"),
        (["--neurons", "3:1"], "names no neuron"),
        (["--neurons", "many"], "expected a range"),
        (["--corpus", "no/such/file.py"], "no file, folder or pattern"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    out = tmp_path / "deep" / "out"
    corpus = [] if "--corpus" in arguments else ["--corpus", str(texts)]
    assert main(["explain", "planted", *arguments, *corpus, "--out", str(out), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1 and error.startswith("neuron-lens: error: ")
    assert not (tmp_path / "deep").exists()


@pytest.mark.usefixtures("planted_model")
def test_an_empty_corpus_and_an_unwritable_folder(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "blank.txt").write_text("\n")
    assert (
        main(["explain", "planted", "--corpus", str(tmp_path / "empty"), "--out", str(tmp_path / "out")]) == 2
    )
    assert "is empty" in capsys.readouterr().err
    (tmp_path / "file").write_text("in the way")
    assert main(["explain", "planted", "--corpus", str(texts), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way" and not (tmp_path / "out").exists()


def test_an_unknown_model(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    missing = str(tmp_path / "no-such-model")
    assert main(["explain", missing, "--corpus", str(texts), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "no-such-model" in error and error.count("\n") == 1
    assert not out.exists()


def _truncated(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:-1000])


def _without_a_tensor(weights: Path) -> None:
    tensors = load_file(weights)
    tensors.pop(next(name for name in tensors if "mlp.c_fc.weight" in name))
    save_file(tensors, weights)


def _of_a_wrong_shape(weights: Path) -> None:
    tensors = load_file(weights)
    name = next(name for name in tensors if "mlp.c_fc.weight" in name)
    tensors[name] = tensors[name][:, :-1].copy()
    save_file(tensors, weights)


@pytest.mark.parametrize("spoil", [_truncated, _without_a_tensor, _of_a_wrong_shape])
def test_a_corrupt_checkpoint(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_defs_dir() / "pico", broken)
    spoil(broken / "model.safetensors")
    assert main(["explain", str(broken), "--corpus", str(texts), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("neuron-lens: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--help"], ["explain", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom neuron_lens.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pandas', 'matplotlib', 'jinja2', 'pydantic'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.usefixtures("planted_model")
def test_heads_and_latents(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, save_saelens

    site = Site(path="resid.torso.post_mlp", layer=0)
    config = AutoencoderConfig(
        d_in=30, d_latent=24, activation="topk", k=3, site_in=site, input_bias="decoder_bias"
    )
    save_saelens(Autoencoder(config, generator=torch.Generator().manual_seed(1)), tmp_path / "sae")
    common = ["--corpus", str(texts), "--out", str(tmp_path / "out"), "--quiet"]
    sae = ["--sae", str(tmp_path / "sae")]
    assert main(["explain", "planted", "--head", "1", *common]) == 0
    assert "L0 head 1" in capsys.readouterr().out
    assert main(["explain", "planted", *sae, "--latents", "4:6", *common]) == 0
    printed = capsys.readouterr().out
    assert "L0 latent 4" in printed and "L0 latent 5" in printed and "head 1" not in printed
    assert len(RunResult.read(tmp_path / "out" / "run.json").units) == 3
    for arguments, complaint in (
        ([*sae, "--latent", "24"], "latent 24 does not exist"),
        ([*sae, "--latent", "1", "--layer", "3"], "reads layer 0, not layer 3"),
        ([*sae, "--neuron", "1"], "--sae goes with --latent"),
        (["--latent", "1"], "say which with --sae"),
        (["--head", "2"], "head 2 does not exist"),
        (["--sae", str(tmp_path / "none"), "--latent", "1"], "no autoencoder ships"),
    ):
        assert main(["explain", "planted", *arguments, *common]) == 2
        error = capsys.readouterr().err
        assert complaint in error and error.count("\n") == 1
