"""A folder made by script is one commands can go on with, where model and corpus can be opened by name and path."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.cli import main
from neuron_lens.errors import RequestError
from neuron_lens.explain import Pipeline
from neuron_lens.explain.recipe import Recipe, SourceRecipe, recipe_of
from neuron_lens.explain.result import ModelFacts
from neuron_lens.explain.run_folder import CorpusFacts, Manifest, RunFolder, SourceFacts
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
from neuron_lens.harvest.settings import HarvestSettings
from neuron_lens.transformer import Transformer

TEXT = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y + {}\n\n"
SETTINGS = HarvestSettings(
    shape=WindowShape(length=32, row_length=128, context=32), random=(32, 8, 8), top=(8, 4, 4), near=(2, 1, 2)
)


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(
            "".join(TEXT.format(place * number) for place in range(40))
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "texts"


def test_commands_go_on_with_a_folder_made_by_script(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    model = Transformer.load("pico").eval()
    pipeline = Pipeline(
        model,
        Corpus.of_paths(["texts"], name="points"),
        out,
        name="mine",
        settings=SETTINGS,
        progress=False,
        pages=False,
    )
    pipeline.run(pipeline.neurons(0, [1, 2]))
    recipe = RunFolder(out).require_manifest().recipe
    assert recipe == Recipe(model="pico", corpus=("texts",), folder=str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["verify", str(out)]) == 0
    judge = ["--judge", "scripted:explain.word_judge:scripted", "--quiet", "--no-pages"]
    assert main(["score", str(out), "--scorers", "detection", *judge]) == 0
    assert [len(row.judged) + len(row.unscored) for row in RunFolder(out).run()] == [1, 1]
    # What the recipe opens is held to the fingerprints.
    next(texts.iterdir()).write_text("another text")
    capsys.readouterr()
    assert main(["verify", str(out)]) == 2
    assert "another corpus" in capsys.readouterr().err


def test_a_relative_corpus_by_command_is_found_from_everywhere(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        main(
            [
                "harvest",
                "pico",
                "--neuron",
                "0",
                "--layer",
                "0",
                "--corpus",
                "texts",
                "--out",
                "run",
                "--quiet",
            ]
        )
        == 0
    )
    monkeypatch.chdir(texts)
    assert main(["verify", str(tmp_path / "run")]) == 0


def test_there_is_no_recipe_where_no_name_opens_what_was_given(texts: Path) -> None:
    named, corpus = Transformer.load("pico"), Corpus.of_paths([texts])
    assert recipe_of(named, corpus)
    keyed = Corpus.of_paths([_rows(texts)], text_key="body")
    assert (found := recipe_of(named, keyed)) is not None and found.text_key == "body"
    made = Transformer(named.config, tokenizer=named.tokenizer)
    assert recipe_of(made, corpus) is None
    assert recipe_of(Transformer.load("pico", dtype="bfloat16"), corpus) is None
    assert recipe_of(named, Corpus.of_documents([Document("one", "text")])) is None


def _rows(folder: Path) -> Path:
    path = folder.parent / "rows.jsonl"
    path.write_text('{"body": "some text"}\n')
    return path


@pytest.mark.parametrize(
    ("written", "sources"),
    [
        ({"model": "m", "corpus": ["a"], "folder": "/f", "sae": None}, ()),
        ({"model": "m", "corpus": None, "sae": "pico"}, (SourceRecipe(kind="autoencoder", path="pico"),)),
    ],
)
def test_recipes_of_older_folders_are_read(
    written: dict[str, object], sources: tuple[SourceRecipe, ...]
) -> None:
    recipe = Recipe.model_validate(written)
    assert recipe.sources == sources and recipe.text_key == "text"
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_manifests_of_older_folders_are_read() -> None:
    facts = {"name": "m", "n_layers": 1, "d_model": 2, "d_mlp": 3, "fingerprint": "f"}
    corpus = {"name": "c", "fingerprint": "g", "n_documents": 1}
    older = {"method_version": 3, "model": facts, "corpus": corpus, "harvest": {}}
    assert Manifest.model_validate({**older, "recipe": {}}).recipe is None
    found = Manifest.model_validate({**older, "recipe": {"model": "m", "corpus": None, "sae": "x"}})
    assert found.recipe is not None and found.recipe.sources[0].path == "x"
    # A newer run into the folder says which autoencoder that is: one entry stays.
    now = SourceRecipe(kind="autoencoder", path="x", dictionary="sae-1")
    other = SourceRecipe(
        kind="direction", dictionary="up-2", name="up", site="mlp.pre_act", layer=0, digest="d"
    )
    newer = found.model_copy(update={"recipe": Recipe(model="m", sources=(now, other))})
    joined = found.joined(newer, Path("run")).recipe
    assert joined is not None and joined.sources == (now, other)
    assert found.joined(newer.model_copy(update={"recipe": None}), Path("run")).recipe == found.recipe


def test_a_source_at_another_site_under_the_same_name_is_refused() -> None:
    def manifest(site: str) -> Manifest:
        facts = ModelFacts(name="m", n_layers=1, d_model=2, d_mlp=3, fingerprint="f")
        corpus = CorpusFacts(name="c", fingerprint="g", n_documents=1)
        source = SourceFacts(kind="direction", layer=0, site=site, dictionary="up-1")
        return Manifest(method_version=3, model=facts, corpus=corpus, harvest={}, sources=(source,))

    first = manifest("resid.torso.post_mlp")
    assert first.joined(first, Path("run")) == first
    with pytest.raises(
        RequestError, match=r"another site of the direction up-1 in layer 0.*give another folder"
    ):
        first.joined(manifest("resid.torso.post_attn"), Path("run"))
