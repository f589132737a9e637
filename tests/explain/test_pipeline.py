"""The pipeline with a judge, by script: chosen on validation, reported on test, the same in whatever order."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain import Pipeline, RunResult
from neuron_lens.explain.explainers import MaxActivating
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.explain.scorers import Detection, Simulation
from neuron_lens.llm import Budget, BudgetExceeded, Capabilities, Request, ScriptedBackend

from . import planted
from .test_planted import SETTINGS, UNITS
from .word_judge import CHAT, answer, scripted, word_judge


def pipeline(folder: Path, **options: object) -> Pipeline:
    given = {"explainer": "max_activating", "scorers": ("detection", "simulation"), "pages": False} | options
    return Pipeline(planted.model(), planted.corpus(), folder, settings=SETTINGS, progress=False, **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    folder = tmp_path_factory.mktemp("judged")
    explainer = MaxActivating(n_candidates=3)
    return folder, pipeline(folder, explainer=explainer, backend=word_judge(), pages=True).run(UNITS)


def test_the_known_neuron_is_told_from_its_control(run: tuple[Path, RunResult]) -> None:
    result = next(pipeline(run[0], explainer=None).results())
    assert result.explanation.sentence == "it responds to the word 'self'" and result.explanation.another
    assert result.scores == {} and result.baseline is not None and result.explanation.predicate is None
    for judged in result.judged:
        assert judged.part == "test" and judged.score.value is not None and judged.score.value > 0.95
        control = judged.controls[0]
        assert control.name == "another_unit" and control.sentence == result.explanation.another
        assert control.scores[judged.headline].value is not None
        assert control.scores[judged.headline].value < judged.score.value - 0.3
    assert result.explanation.chosen_by == "detection" and len(result.explanation.candidates) == 3
    assert sum(one.chosen for one in result.explanation.candidates) == 1
    # The windows shown are those the judge simulated, on the scale of activations.
    for shown in result.test_windows:
        assert shown.simulated is not None
        expected = [1.6 * (token == " self") for token in shown.window.tokens]
        assert shown.simulated == pytest.approx(expected)


def test_a_candidate_is_chosen_on_windows_that_no_score_rests_on(tmp_path: Path) -> None:
    asked: dict[str, set[str]] = {}

    def varying(request: Request) -> str:
        text = request.texts[-1]
        if "Description:" not in text:
            return (
                json.dumps({"explanation": "it responds to the word 'x'"})
                if not request.seed
                else answer(text)
            )
        described = re.search(r"the word '(.*?)'", text)
        assert described is not None
        texts = {json.loads(one) for one in re.findall(r'^\d+: (".*")$', text, re.MULTILINE)}
        asked.setdefault(described[1], set()).update(texts)
        return answer(text)

    backend = ScriptedBackend(varying, name="varying", capabilities=CHAT)
    made = pipeline(
        tmp_path,
        explainer=MaxActivating(n_candidates=2),
        scorers=(Detection(controls=False),),
        backend=backend,
    )
    made.run(UNITS[:1])
    (result,) = made.results()
    assert [one.chosen for one in result.explanation.candidates] == [False, True]
    parts = {
        name: {"".join(window.tokens) for window in part.windows}
        for name, part in made._evidence(UNITS[0]).parts()
    }
    assert asked["x"] and asked["x"] <= parts["validation"]
    assert asked["self"] & parts["test"] and not asked["self"] & parts["train"]
    assert not parts["validation"] & parts["test"]


def test_order_and_company_change_nothing(run: tuple[Path, RunResult], tmp_path: Path) -> None:
    explainer = MaxActivating(n_candidates=3)
    for units in ([UNITS[2]], [UNITS[3], UNITS[0]], [UNITS[1]]):
        last = pipeline(tmp_path, explainer=explainer, backend=word_judge()).run(units)
    assert last == run[1]
    for unit in UNITS:
        assert RunFolder(tmp_path).read(unit) == RunFolder(run[0]).read(unit)


def test_a_budget_stops_the_run_and_what_is_done_stays(tmp_path: Path, run: tuple[Path, RunResult]) -> None:
    calls = 0
    for _ in range(100):
        backend = word_judge(budget=Budget(max_calls=40))
        try:
            last = pipeline(tmp_path, explainer=MaxActivating(n_candidates=3), backend=backend).run(UNITS)
            break
        except BudgetExceeded:
            assert backend.calls == 40
        finally:
            calls += backend.calls
    assert last == run[1] and calls > 80


def test_rows_tables_and_files(run: tuple[Path, RunResult], tmp_path: Path) -> None:
    _, result = run
    assert [row.unit for row in result] == UNITS and len(result) == 4
    rows = result.to_rows()
    assert rows[0]["detection_balanced_accuracy"] > rows[0]["detection_balanced_accuracy_control"]
    frame = result.to_dataframe()
    assert list(frame["unit"]) == [unit.name for unit in UNITS]
    for name in ("units.csv", "units.jsonl", "units.json"):
        result.save(tmp_path / name)
    assert RunResult.read(tmp_path / "units.json") == result
    assert len((tmp_path / "units.csv").read_text().splitlines()) == 5
    with pytest.raises(RequestError, match="ends in"):
        result.save(tmp_path / "units.xlsx")


def test_what_cannot_be_done_is_refused_before_any_work(tmp_path: Path) -> None:
    for options, complaint in (
        ({}, "asks a judge"),
        ({"explainer": "token_statistics"}, "asks a judge"),
        ({"scorers": ("detection", Detection(batch=2)), "backend": word_judge()}, "named once"),
    ):
        with pytest.raises(RequestError, match=complaint):
            pipeline(tmp_path / "out", **options).run(UNITS)
    with pytest.raises(RequestError, match="did you mean"):
        pipeline(tmp_path / "out", explainer="max_activated")
    with pytest.raises(RequestError, match="is no run folder"):
        pipeline(tmp_path / "out", explainer=None, backend=word_judge()).run(UNITS)
    assert not (tmp_path / "out").exists()
    deaf = ScriptedBackend(scripted, capabilities=Capabilities(chat=False, completion=True))
    with pytest.raises(BackendError, match="needs chat"):
        pipeline(tmp_path / "out", backend=deaf).run(UNITS[:1])


def test_a_scorer_with_other_options_is_refused_by_name(run: tuple[Path, RunResult]) -> None:
    with pytest.raises(RequestError, match="another scorer detection"):
        pipeline(run[0], explainer=None, scorers=(Detection(batch=3),), backend=word_judge()).run(UNITS)
    with pytest.raises(RequestError, match="another explainer"):
        pipeline(run[0], explainer="contrastive", backend=word_judge()).run(UNITS)
    with pytest.raises(RequestError, match="another scorer simulation"):
        scorer = Simulation(calibration="linear")
        pipeline(run[0], explainer=None, scorers=(scorer,), backend=word_judge()).run(UNITS)


def test_units_a_judge_says_nothing_of_are_named_and_tried_again(tmp_path: Path) -> None:
    def silent(request: Request) -> str:
        asked = next(text for text in reversed(request.texts) if "Texts:" in text)
        return "no" if "'self'" in answer(asked) else answer(asked)

    def backend(script: object) -> ScriptedBackend:
        return ScriptedBackend(script, name="words", capabilities=CHAT)  # type: ignore[arg-type]

    first = pipeline(tmp_path, backend=backend(silent), scorers=()).run(UNITS[:2])
    assert list(first.unexplained) == [UNITS[0].name] and [row.unit for row in first] == [UNITS[1]]
    with pytest.raises(RequestError, match="no unit could be explained"):
        pipeline(tmp_path, backend=backend(silent), scorers=()).run(UNITS[:1])


def test_importing_it_is_light() -> None:
    code = "import sys; from neuron_lens.explain import Pipeline; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
