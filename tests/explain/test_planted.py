"""The main job on a transformer whose neurons are known: rules found, files whole, work never done twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_lens.errors import RequestError
from neuron_lens.explain.pipeline import Pipeline
from neuron_lens.explain.result import RunResult, UnitResult
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape
from neuron_lens.harvest.run import HarvestSettings, harvest, harvest_layers, model_inputs
from neuron_lens.harvest.sources import NeuronSource
from neuron_lens.hooks import TransformerHooks
from neuron_lens.records import Unit
from neuron_lens.transformer import Transformer
from neuron_lens.windows import SPLITS

from . import planted

SETTINGS = HarvestSettings(
    shape=WindowShape(length=32, row_length=128, context=32),
    random=(128, 48, 48),
    top=(8, 8, 8),
    batch_rows=8,
)
UNITS = [Unit(layer=0, index=index) for index in range(4)]


def pipeline(folder: Path, **options: object) -> Pipeline:
    return Pipeline(planted.model(), planted.corpus(), folder, settings=SETTINGS, progress=False, **options)


def worked(folder: Path, model: Transformer | None = None) -> SourceWork:
    """The neurons, harvested."""
    source = NeuronSource(model or planted.model(), 0)
    kept = harvest(source.model, planted.corpus(), [source], folder, SETTINGS, progress=False)
    return SourceWork(source, kept[source.name])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("planted")
    return folder, pipeline(folder).run(UNITS)


def _result(run: tuple[Path, RunResult], index: int) -> UnitResult:
    return UnitResult.read(run[0] / "units" / UNITS[index].name / "result.json")


@pytest.mark.parametrize(
    ("neuron", "words"),
    [(planted.SELF, "' self'"), (planted.DIGIT, "digits"), (planted.AFTER_DEF, "after ' def'")],
)
def test_planted_rules_are_recovered(run: tuple[Path, RunResult], neuron: int, words: str) -> None:
    result = _result(run, neuron)
    assert words in result.explanation.sentence
    for name in ("correlation", "correlation_random", "detection_auc", "detection_accuracy"):
        score = result.scores[name]
        assert score.low is not None and score.low > 0.95
    shuffled = result.controls[1].scores["correlation"]
    assert shuffled.value is not None and abs(shuffled.value) < 0.1


def test_noise_is_called_noise_and_its_intervals_hold_chance(run: tuple[Path, RunResult]) -> None:
    result = _result(run, planted.RANDOM)
    assert result.explanation.sentence.startswith("No rule to rely on")
    for name, chance in (("correlation", 0.0), ("detection_accuracy", 0.5), ("detection_auc", 0.5)):
        score = result.scores[name]
        assert score.low is not None and score.high is not None
        assert score.low <= chance <= score.high


def test_the_simulation_is_what_is_written_down(run: tuple[Path, RunResult]) -> None:
    result = _result(run, planted.SELF)
    predicate = result.explanation.predicate
    assert predicate is not None and [table.feature for table in predicate.tables] == ["token"]
    effects = {entry.key: entry.value for entry in predicate.tables[0].entries}
    for scored in result.test_windows:
        assert scored.simulated is not None
        expected = [
            max(predicate.floor, predicate.base + effects.get(f"'{token}'", 0.0))
            for token in scored.window.tokens
        ]
        assert np.allclose(scored.simulated, expected, atol=1e-3)


def test_recorded_activations_reproduce(run: tuple[Path, RunResult]) -> None:
    model = planted.model()
    harvest = harvest_layers(model, planted.corpus(), [0], run[0] / "harvest", SETTINGS, progress=False)[0]
    windows = harvest.windows
    kept = harvest.unit(planted.AFTER_DEF)
    for slot in (0, 5, len(kept.random_rows) - 1):
        row = int(kept.random_rows[slot])
        ids = windows.columns["token"][row, : windows.context + windows.length]
        tokens, _, _ = model_inputs(model, [ids[ids >= 0]])
        caught: list[torch.Tensor] = []
        model(tokens, hooks=TransformerHooks().append_to_path("mlp.post_act.fwd", caught.append))
        begin = int(windows.context_position[row])
        present = int(windows.present[row].sum())
        again = caught[0][0, begin : begin + present, planted.AFTER_DEF].detach().numpy()
        assert np.allclose(again, kept.random[slot][:present], atol=2e-3)


def test_parts_share_no_window(run: tuple[Path, RunResult]) -> None:
    for index in range(4):
        result = _result(run, index)
        train = {window.identity for window in result.train_top}
        train |= {window.identity for stratum in result.strata for window in stratum.windows}
        assert not train & {scored.window.identity for scored in result.test_windows}
        assert min(result.splits.train, result.splits.validation, result.splits.test) > 0


def test_statistics_are_those_of_all_tokens(run: tuple[Path, RunResult]) -> None:
    statistics = _result(run, planted.SELF).statistics
    words = [word for document in planted.corpus() for word in document.text.split()]
    share = words.count("self") / len(words)
    assert statistics.n_tokens == len(words)
    assert statistics.mean == pytest.approx(2 * share, rel=1e-4)
    assert statistics.variance == pytest.approx(4 * share * (1 - share), rel=1e-4)
    assert statistics.maximum == pytest.approx(2) and statistics.minimum == 0
    assert statistics.density == pytest.approx(share, rel=0.3)


def test_ablation_changes_the_loss_where_the_unit_fires(run: tuple[Path, RunResult]) -> None:
    causal = _result(run, planted.SELF).causal
    assert causal is not None
    firing, silent = causal.where_firing, causal.where_silent
    assert firing.n_positions > 0 and silent.n_positions > firing.n_positions
    assert (
        firing.loss_intact is not None
        and firing.loss_ablated is not None
        and firing.loss_change.value is not None
    )
    assert firing.loss_ablated - firing.loss_intact == pytest.approx(firing.loss_change.value, abs=1e-4)
    assert firing.divergence is not None and silent.divergence is not None
    assert firing.divergence > 10 * silent.divergence
    assert firing.raised[0].value > 0 > firing.lowered[0].value


def test_results_round_trip(run: tuple[Path, RunResult]) -> None:
    for result in pipeline_results(run[0]):
        assert UnitResult.model_validate_json(result.model_dump_json()) == result
    again = RunResult.read(run[0] / "run.json")
    assert again == run[1] and [one.unit for one in again.units] == UNITS
    with pytest.raises(RequestError, match="not a UnitResult"):
        UnitResult.read(run[0] / "run.json")


def pipeline_results(folder: Path) -> list[UnitResult]:
    return list(pipeline(folder).results())


def test_the_same_run_again_does_nothing_and_calls_add_up(
    tmp_path: Path, run: tuple[Path, RunResult]
) -> None:
    done = pipeline(tmp_path / "a")
    first = done.run(UNITS[:2])
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*.*") if path.parent.name != "a"
    }
    second = pipeline(tmp_path / "a")
    second.explain = None  # type: ignore[assignment, method-assign]  # any attempt to explain fails
    assert second.run(UNITS[:2]) == first
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    # What one call did before is in the index of the next, and nothing depends on who came first.
    assert pipeline(tmp_path / "a").run(UNITS[2:]) == run[1]


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from explain.test_planted import UNITS, pipeline
pipeline(Path({folder!r}), pages=False).run(UNITS)
"""


def test_a_killed_run_goes_on_and_equals_an_uninterrupted_one(
    tmp_path: Path, run: tuple[Path, RunResult]
) -> None:
    tests = str(Path(__file__).parents[1])
    code = _CHILD.format(tests=tests, folder=str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment)
    first = tmp_path / "units" / UNITS[0].name / "result.json"
    deadline = time.monotonic() + 300
    while not first.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert first.exists()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "units").glob("*/result.json")}
    assert pipeline(tmp_path, pages=False).run(UNITS) == run[1]
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for unit in UNITS:
        name = Path("units") / unit.name / "result.json"
        assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


def test_splits_of_the_harvest_follow_the_rows(run: tuple[Path, RunResult]) -> None:
    harvest = harvest_layers(
        planted.model(), planted.corpus(), [0], run[0] / "harvest", SETTINGS, progress=False
    )[0]
    windows = harvest.windows
    row_start = windows.start - windows.context_position
    by_row: dict[tuple[int, int], set[int]] = {}
    for document, start, split in zip(windows.document, row_start, windows.split, strict=True):
        by_row.setdefault((int(document), int(start)), set()).add(int(split))
    assert all(len(splits) == 1 for splits in by_row.values())
    assert {split for splits in by_row.values() for split in splits} == set(range(len(SPLITS)))


@pytest.mark.parametrize(
    ("unit", "complaint"),
    [
        (Unit(layer=1, index=0), "layer 1 does not exist"),
        (Unit(layer=0, index=4), "neuron 4 does not exist"),
        (Unit(kind="head", layer=0, index=2, site="attn.v_out"), "head 2 does not exist"),
    ],
)
def test_units_that_do_not_exist_are_refused_before_any_work(
    tmp_path: Path, unit: Unit, complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        pipeline(tmp_path / "out").run([UNITS[0], unit])
    with pytest.raises(RequestError, match="no units"):
        pipeline(tmp_path / "out").run([])
    assert not (tmp_path / "out").exists()


def test_a_corpus_too_small_to_split_is_refused(tmp_path: Path) -> None:
    corpus = Corpus.of_documents([Document("one", " x y self")])
    with pytest.raises(RequestError, match="too small"):
        Pipeline(planted.model(), corpus, tmp_path, settings=SETTINGS, progress=False).run(UNITS)
    assert list(tmp_path.iterdir()) == []
