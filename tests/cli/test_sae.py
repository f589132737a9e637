"""Training and evaluating autoencoders from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from autoencoder_training.small import byte_model, text

from neuron_lens.autoencoders import load_autoencoder
from neuron_lens.cli import main


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus folder, and a tiny model in place of a checkpoint."""
    from neuron_lens.transformer import Transformer

    monkeypatch.setattr(Transformer, "load", classmethod(lambda cls, name: byte_model()))
    folder = tmp_path / "texts"
    folder.mkdir()
    for document in text():
        (folder / f"{document.name}.txt").write_text(document.text)
    return str(folder)


def test_train_then_evaluate(texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sae"
    train = [
        "sae",
        "train",
        "tiny",
        "--layer",
        "1",
        "--width",
        "40",
        "--k",
        "3",
        "--tokens",
        "640",
        "--batch",
        "64",
    ]
    train += ["--corpus", texts, "--out", str(out), "--quiet"]
    assert main(train) == 0
    printed = capsys.readouterr().out
    assert "variance explained" in printed and str(out) in printed
    figures = json.loads((out / "evaluation.json").read_text())
    assert load_autoencoder(out, "saelens").config.d_latent == 40
    assert "Absorption" in (out / "evaluation.html").read_text()
    again_folder = tmp_path / "again"
    evaluate = [
        "sae",
        "evaluate",
        "tiny",
        "--sae",
        str(out),
        "--corpus",
        texts,
        "--out",
        str(again_folder),
        "--quiet",
    ]
    assert main(evaluate) == 0
    assert str(again_folder / "evaluation.html") in capsys.readouterr().out
    again = json.loads((again_folder / "evaluation.json").read_text())
    assert again["loss_spliced"] == pytest.approx(figures["loss_spliced"], rel=1e-5)
    assert again["n_tokens"] == figures["n_tokens"]
    assert main(train) == 0, "a finished run is finished again"


def test_a_transcoder_is_trained_and_evaluated(
    texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = "sae train tiny --layer 1 --site resid.torso.post_ln_mlp --site-out resid.torso.delta_mlp --skip"
    train += " --width 40 --k 3 --tokens 640 --batch 64 --quiet"
    assert main([*train.split(), "--corpus", texts, "--out", str(tmp_path / "pair")]) == 0
    assert "circuit-tracer format" in capsys.readouterr().out
    loaded = load_autoencoder(tmp_path / "pair")
    assert loaded.config.has_skip and loaded.config.site_out.path == "resid.torso.delta_mlp"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["train", "tiny", "--width", "40", "--layer", "1"], "activation 'topk' needs k"),
        (["train", "tiny", "--width", "40", "--k", "3", "--tokens", "640", "--batch", "64"], "say which"),
        (["train", "tiny", "--width", "40", "--k", "3", "--groups", "a"], "expected sizes such as"),
        (["evaluate", "tiny"], "no autoencoder ships with 'tiny'"),
        (["evaluate", "tiny", "--sae", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    extra: list[str], message: str, texts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sae", *extra, "--corpus", texts, "--quiet"]
    assert main([*command, "--out", str(tmp_path / "out")] if extra[0] == "train" else command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_activations_are_stored_once_and_trained_from_again(texts: str, tmp_path: Path) -> None:
    store, train = (
        tmp_path / "store",
        ["sae", "train", "tiny", "--layer", "1", "--tokens", "640", "--batch", "64"],
    )
    train += ["--k", "3", "--corpus", texts, "--quiet", "--stored", str(store)]
    assert main([*train, "--width", "40", "--out", str(tmp_path / "first")]) == 0
    stamps = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert main([*train, "--width", "24", "--out", str(tmp_path / "second")]) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert load_autoencoder(tmp_path / "second", "saelens").config.d_latent == 24
    assert main([*train, "--width", "24", "--out", str(tmp_path / "third"), "--seed", "1"]) == 2
