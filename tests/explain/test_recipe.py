"""A folder made by script is one commands can go on with, where model and corpus can be opened by name and path."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.cli import main
from neuron_lens.explain import Pipeline
from neuron_lens.explain.recipe import recipe_of
from neuron_lens.explain.run_folder import RunFolder
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
    assert recipe == {"model": "pico", "corpus": ["texts"], "folder": str(tmp_path), "sae": None}
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
    made = Transformer(named.config, tokenizer=named.tokenizer)
    assert recipe_of(made, corpus) == {}
    assert recipe_of(Transformer.load("pico", dtype="bfloat16"), corpus) == {}
    assert recipe_of(named, Corpus.of_documents([Document("one", "text")])) == {}
    assert recipe_of(named, corpus, [object()]) == {}
