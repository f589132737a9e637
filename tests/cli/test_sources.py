"""Text under any key, directions from files, autoencoders of a script: what a folder keeps of them lets every command
go on from the folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from explain import planted
from safetensors.torch import save_file

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, Site, save_saelens
from neuron_lens.cli import main
from neuron_lens.explain import Pipeline
from neuron_lens.explain.result import RunResult, UnitResult
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.harvest.corpus import Corpus
from neuron_lens.harvest.sources import dictionary_of

pytestmark = pytest.mark.usefixtures("planted_model")

D_MODEL = 30  # of the planted model
JUDGE = ["--judge", "scripted:explain.word_judge:scripted", "--quiet", "--no-pages"]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("neuron-lens: error: ") and error.count("\n") == 1, error
    return error


def flags(*columns: int) -> torch.Tensor:
    """Directions that read one flag of the planted stream each `[n, d_model]`."""
    return torch.eye(D_MODEL)[list(columns)]


def autoencoder(seed: int) -> Autoencoder:
    config = AutoencoderConfig(
        d_in=D_MODEL, d_latent=8, activation="topk", k=3, site_in=Site(path="resid.torso.post_mlp", layer=0),
        normalisation="scale", scale_in=2.0, scale_out=3.0,
    )  # fmt: skip
    return Autoencoder(config, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_with_the_text_under_another_key(
    kind: str,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    read = [file.read_text() for file in sorted(texts.iterdir())]
    rows = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        rows.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(read)))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"id": list(range(len(read))), "body": read}), rows)
    monkeypatch.chdir(tmp_path)
    common = ["planted", "--neuron", "0", "--quiet", "--no-pages"]
    assert main(["explain", *common, "--corpus", "texts", "--out", "plain"]) == 0
    asked = ["explain", *common, "--corpus", rows.name, "--out", "keyed"]
    assert main([*asked, "--text-key", "body"]) == 0
    found, plain = (
        UnitResult.read(tmp_path / out / "units" / "layer0_neuron0" / "result.json")
        for out in ("keyed", "plain")
    )
    assert found.scores == plain.scores and found.explanation == plain.explanation
    monkeypatch.chdir(texts)
    assert main(["verify", str(tmp_path / "keyed")]) == 0  # the folder knows the key
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for key in ([], ["--text-key", "words"]):
        assert main([*asked[:-1], "bad", *key]) == 2
        error = one_line(capsys)
        assert "'id'" in error and "'body'" in error and "--text-key" in error
    assert main(["explain", *common, "--text-key", "body", "--out", "bad"]) == 2
    assert "--corpus" in one_line(capsys)
    assert not (tmp_path / "bad").exists()


def test_directions_of_a_file_are_units_of_a_folder_that_stands_alone(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("probes.npy", 7 * flags(0, 1).numpy())  # only the direction counts
    save_file({"v": flags(4)[0].half()}, "after def.safetensors")
    torch.save(flags(0)[0], "up.pt")
    out, common = tmp_path / "run", ["--corpus", str(texts), "--out", "run", "--quiet"]
    asked = ["explain", "planted", "--layer", "0", *common]
    assert main([*asked, "--directions", "probes.npy"]) == 0
    printed = capsys.readouterr().out
    assert "L0 probes-0" in printed and "L0 probes-1" in printed and "the token ' self'" in printed
    assert main([*asked, "--directions", "after def.safetensors", "--site", "resid.torso.post_attn"]) == 0
    assert main(["harvest", "planted", "--layer", "0", *common, "--directions", "up.pt"]) == 0
    names = [row.unit.dictionary.rpartition("-")[0] for row in RunResult.read(out / "run.json")]
    assert sorted(names) == ["after_def-post_attn", "probes-0", "probes-1"]
    run = RunResult.read(out / "run.json")
    assert all((row.scores["correlation"].value or 0) > 0.95 for row in run), "they read what was planted"
    recipe = RunFolder(out).require_manifest().recipe
    assert recipe is not None and len(recipe.sources) == 4

    moved = tmp_path / "elsewhere" / "moved"
    shutil.copytree(out, moved)
    for file in ("probes.npy", "after def.safetensors", "up.pt"):
        (tmp_path / file).unlink()
    shutil.rmtree(out)
    monkeypatch.chdir(moved.parent)
    capsys.readouterr()
    assert main(["verify", "moved"]) == 0
    verified = capsys.readouterr().out
    assert verified.count("reproduce") == 4 and "DO NOT" not in verified
    assert main(["score", "moved", "--scorers", "detection", *JUDGE]) == 0
    assert all(row.judged or row.unscored for row in RunFolder(moved).run())
    assert main(["report", "moved"]) == 0 and (moved / "index.html").is_file()

    # What was kept is held to its hash.
    kept = next(path for path in (moved / "sources").iterdir() if path.name.startswith("probes-0"))
    whole = kept.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"\x01"):
        kept.write_bytes(damaged)
        capsys.readouterr()
        assert main(["verify", "moved"]) == 2
        assert kept.name in one_line(capsys)
    kept.unlink()
    assert main(["verify", "moved"]) == 2
    assert "is not there" in one_line(capsys)


@pytest.mark.parametrize(
    ("vectors", "more", "complaint"),
    [
        (flags(0), [], "say which with --layer"),
        (flags(0), ["--layer", "-1"], "from 0"),
        (flags(0), ["--layer", "4"], "layer 4 does not exist"),
        (torch.ones(7), ["--layer", "0"], "is 7 wide"),
        (torch.ones(2, 2, D_MODEL), ["--layer", "0"], "shape [2, 2, 30]"),
        (torch.ones(0, D_MODEL), ["--layer", "0"], "shape [0, 30]"),
        (torch.stack([torch.ones(D_MODEL), torch.zeros(D_MODEL)]), ["--layer", "0"], "row 1 of"),
        (torch.full((D_MODEL,), torch.inf), ["--layer", "0"], "not finite"),
        (torch.ones(D_MODEL, dtype=torch.complex64), ["--layer", "0"], "real numbers"),
        ({"a": torch.ones(2), "b": torch.ones(2)}, ["--layer", "0"], "2 entries ('a', 'b')"),
        ([1.0], ["--layer", "0"], "holds a list"),
        (flags(0), ["--layer", "0", "--site", "resid.torso.post_mpl"], "did you mean 'resid.torso.post_mlp'"),
        (flags(0), ["--layer", "0", "--site", "attn.q"], "one vector at every position"),
        (flags(0), ["--layer", "0", "--sae", "pico"], "not with --directions"),
        (None, ["--layer", "0", "--site", "mlp.pre_act"], "give a file of those"),
    ],
)
def test_what_is_no_direction_is_refused(
    vectors: object,
    more: list[str],
    complaint: str,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(vectors, tmp_path / "v.pt")
    given = [] if vectors is None else ["--directions", str(tmp_path / "v.pt")]
    common = ["--corpus", str(texts), "--out", str(tmp_path / "out"), "--quiet"]
    assert main(["explain", "planted", *given, *more, *common]) == 2
    assert complaint in one_line(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("none.npy", None, "no file"),
        ("v.txt", b"1 2 3", "no kind that directions are read from"),
        ("v.npy", b"1 2 3", "no whole .npy array"),
        ("v.pt", b"1 2 3", "v.pt"),
        ("v.safetensors", b"1 2 3", "truncated or corrupt"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    name: str,
    content: bytes | None,
    complaint: str,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    asked = [
        "explain",
        "planted",
        "--layer",
        "0",
        "--directions",
        str(tmp_path / name),
        "--corpus",
        str(texts),
    ]
    assert main([*asked, "--out", str(tmp_path / "out")]) == 2
    assert complaint in one_line(capsys)


def test_two_autoencoders_by_command_are_both_had_again(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, common = tmp_path / "out", ["--corpus", str(texts), "--quiet", "--no-pages"]
    for seed in (1, 2):
        save_saelens(autoencoder(seed), tmp_path / f"sae{seed}")
        sae = ["--sae", str(tmp_path / f"sae{seed}"), "--latents", "0:2"]
        assert main(["explain", "planted", *sae, *common, "--out", str(out)]) == 0
    assert not (out / "sources").exists(), "what has a path is not copied"
    assert main(["verify", str(out)]) == 0
    assert main(["score", str(out), "--scorers", "detection", *JUDGE]) == 0
    assert len({row.unit.dictionary for row in RunFolder(out).run()}) == 2
    save_saelens(autoencoder(3), tmp_path / "sae2")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 2
    assert "now holds another" in one_line(capsys)


def test_a_folder_of_the_older_form_is_gone_on_with(texts: Path, tmp_path: Path) -> None:
    out, sae = tmp_path / "out", tmp_path / "sae"
    save_saelens(autoencoder(1), sae)
    asked = [
        "explain",
        "planted",
        "--sae",
        str(sae),
        "--corpus",
        str(texts),
        "--out",
        str(out),
        "--quiet",
        "--no-pages",
    ]
    assert main([*asked, "--latents", "0:2"]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    (now,) = manifest["recipe"].pop("sources")
    del manifest["recipe"]["text_key"]
    manifest["recipe"]["sae"] = now["path"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(out)]) == 0
    assert main(["score", str(out), "--scorers", "detection", *JUDGE]) == 0
    recipe = RunFolder(out).require_manifest().recipe
    assert recipe is not None and [one.model_dump() for one in recipe.sources] == [now]
    assert main([*asked, "--latent", "3"]) == 0 and len(RunFolder(out).run()) == 3


def test_autoencoders_and_directions_of_a_script_are_had_again_by_command(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from neuron_lens.harvest.sources import Direction

    model = planted.model()
    model.loaded_from = "planted"
    held = [autoencoder(1), autoencoder(2)]
    up = [
        Direction("up", flags(0)[0], "resid.torso.post_mlp", 0),
        Direction("up", flags(0)[0], "mlp.pre_act", 0),
    ]
    out = tmp_path / "run"
    pipeline = Pipeline(
        model,
        Corpus.of_paths([texts]),
        out,
        autoencoders=held,
        directions=up[:1],
        progress=False,
        pages=False,
    )
    pipeline.run([*pipeline.latents([1], held[0]), *pipeline.latents([1, 2], held[1]), *pipeline.directed()])
    recipe = RunFolder(out).require_manifest().recipe
    assert recipe is not None
    dictionaries = {*map(dictionary_of, held), up[0].dictionary}
    assert {one.dictionary for one in recipe.sources} == dictionaries
    assert {row.unit.dictionary for row in RunFolder(out).run()} == dictionaries, "each unit names its own"
    assert {path.stem for path in (out / "sources").iterdir()} == dictionaries
    stamps = {path: path.stat().st_mtime_ns for path in (out / "sources").iterdir()}
    assert main(["verify", str(out)]) == 0
    assert main(["score", str(out), "--scorers", "detection", *JUDGE]) == 0
    assert main(["report", str(out), "--format", "csv"]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert RunFolder(out).require_manifest().recipe == recipe
