"""Simulated by their own rules, explanations are scored without a judge: exactly as offline scores take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.explain.pipeline import Pipeline
from neuron_lens.explain.run_folder import RunFolder
from neuron_lens.explain.scorers import (
    NULL_EXPLANATION,
    AblateToSimulation,
    Remembered,
    ScorerResult,
    Simulation,
)
from neuron_lens.explain.scores import Predictions, correlation
from neuron_lens.explain.simulators import RuleSimulator
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.harvest.ablation import _jensen_shannon
from neuron_lens.llm import ScriptedBackend
from neuron_lens.records import TokenWindow, Unit

from . import planted, word_judge
from .test_planted import SETTINGS, UNITS, worked

KNOWN = (planted.SELF, planted.DIGIT, planted.AFTER_DEF)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> SourceWork:
    return worked(tmp_path_factory.mktemp("harvest"))


def sentence(work: SourceWork, index: int) -> str:
    return work.explained(index).explanation.sentence


def scored(work: SourceWork, index: int, explanation: str, others: Sequence[str] = ()) -> ScorerResult:
    scorer = work.equipped(AblateToSimulation().by_rule(), seed=0)
    return scorer.score(work.evidence(index), explanation, None, seed=0, others=others)


def score_of(result: ScorerResult, control: str = "") -> float:
    scores = {one.name: one.scores for one in result.controls}[control] if control else result.scores
    value = scores["ablation_score"].value
    assert value is not None
    return value


@pytest.mark.parametrize("index", range(4))
def test_a_rule_predicts_what_offline_scores_are_made_of(work: SourceWork, index: int) -> None:
    explained = work.explained(index)
    test = explained.held.part("test")
    simulator = work._rules(UNITS[index])
    shown = explained.shown_tests()
    predicted = simulator.plan(explained.explanation.sentence, [one.window for one in shown]).read([])
    for one, levels in zip(shown, predicted, strict=True):
        assert one.simulated == tuple(round(level or 0.0, 4) for level in levels)
    every = simulator.plan(explained.explanation.sentence, test.records(np.arange(len(test.rows)))).read([])
    levels = np.zeros(test.mask.shape)
    for row, one in enumerate(every):
        levels[row, : len(one)] = one
    offline = explained.predictions()
    assert (levels[offline.mask] == offline.predicted[offline.mask]).all()
    again = Predictions(offline.true, levels, offline.mask, offline.given, offline.random)
    assert correlation(again, seed=0) == explained.scores(0)["correlation"]


def test_a_unit_that_is_a_rule_is_replaced_by_it_unnoticed(work: SourceWork) -> None:
    for index in KNOWN:
        other = next(one for one in KNOWN if one != index)
        simulator = work._rules(UNITS[index])
        anothers = work.explained(other).simulated
        both = RuleSimulator({**simulator.rules, sentence(work, other): anothers})
        scorer = work.equipped(AblateToSimulation(simulator=both, calibration="none"), seed=0)
        result = scorer.score(
            work.evidence(index), sentence(work, index), None, seed=0, others=[sentence(work, other)]
        )
        assert score_of(result) > 0.98 and (result.score.low or 0.0) > 0.95
        assert score_of(result, "another_unit") < 0.1 and score_of(result, "shuffled") < 0.1
        assert result.score.coverage == 1.0 and result.calls == 0 and not result.missing
        assert result.method == "simulated by the rule itself" and not result.notes and not result.backend


def test_the_parts_are_what_the_score_is_made_of(work: SourceWork) -> None:
    result = scored(work, planted.AFTER_DEF, sentence(work, planted.AFTER_DEF))
    simulated, mean = (result.scores[f"moved_by_{one}"].value for one in ("simulation", "mean"))
    assert simulated is not None and mean
    assert result.score.value == pytest.approx(1 - simulated / mean, abs=1e-5)
    assert result.score.n_windows == 20 and len(result.quantiles) >= 3


def test_the_control_is_the_rule_of_another_unit_or_the_mean(work: SourceWork) -> None:
    own, partner = sentence(work, 0), sentence(work, work.partner(0))
    both = scored(work, 0, own, [partner])
    assert (both.controls[0].name, both.controls[0].sentence) == ("another_unit", partner)
    alone = scored(work, 0, own, ["what a judge says of another unit"])
    assert (alone.controls[0].name, alone.controls[0].sentence) == ("null", NULL_EXPLANATION)
    assert score_of(alone, "null") == pytest.approx(0.0, abs=1e-3)
    assert score_of(alone) == score_of(both)


def test_a_sentence_without_a_rule_is_refused(work: SourceWork) -> None:
    with pytest.raises(RequestError, match="no rule is known that 'digits'"):
        scored(work, 0, "digits")
    with pytest.raises(RequestError, match="no rule is known"):
        AblateToSimulation(simulator=RuleSimulator(), calibration="none", divergences=no_effect).score(
            work.evidence(0), sentence(work, 0), None, seed=0
        )


def no_effect(unit: Unit, windows: Sequence[object], simulated: np.ndarray) -> np.ndarray:
    return np.zeros((len(windows), 2))


def test_a_unit_without_effect_says_so(tmp_path: Path) -> None:
    model = planted.model()
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[:, planted.DIGIT] = 0.0
    work = worked(tmp_path, model)
    idle = scored(work, planted.DIGIT, sentence(work, planted.DIGIT))
    assert idle.score.value is None and idle.score.coverage == 1.0
    assert idle.scores["moved_by_mean"].value == 0.0 == idle.scores["moved_by_simulation"].value
    assert any("there is no effect" in note for note in idle.notes)
    assert not scored(work, planted.SELF, sentence(work, planted.SELF)).notes


def test_any_function_of_a_window_is_an_explanation(work: SourceWork) -> None:
    """The planted neuron is 2 where its word stands."""
    rules = {
        "it counts self": lambda window: [2.0 * (token == " self") for token in window.tokens],
        "it counts digits": lambda window: [2.0 * (token.strip().isdigit()) for token in window.tokens],
    }
    options = {"simulator": RuleSimulator(rules), "calibration": "none"}
    ablation = work.equipped(AblateToSimulation(**options), seed=0)
    result = ablation.score(
        work.evidence(planted.SELF), "it counts self", None, seed=0, others=["it counts digits"]
    )
    assert score_of(result) > 0.999 and score_of(result, "another_unit") < 0
    simulation = Simulation(**options)
    told = simulation.score(work.evidence(planted.SELF), "it counts self", None, seed=0)
    assert told.score.value == pytest.approx(1.0, abs=1e-4)
    assert told.scores["rsquared_score"].value == pytest.approx(1.0, abs=1e-4) and not told.notes
    with pytest.raises(RequestError, match="calibration='none' with a RuleSimulator"):
        AblateToSimulation(simulator=RuleSimulator(rules))
    short = RuleSimulator({"short": lambda window: [0.0]})
    with pytest.raises(RequestError, match="gave 1 values for the 32 tokens"):
        replace(simulation, simulator=short).score(work.evidence(planted.SELF), "short", None, seed=0)


def test_units_said_in_the_same_words_keep_their_own_rules(work: SourceWork) -> None:
    same = "fires on something"
    scorer = work.equipped(AblateToSimulation().by_rule(), seed=0)

    def renamed(unit: Unit) -> RuleSimulator:
        return RuleSimulator({same: work.explained(unit.index).simulated})

    scorer = replace(scorer, rules=renamed)
    for index in (planted.SELF, planted.DIGIT):
        expected = scored(work, index, sentence(work, index))
        assert scorer.score(work.evidence(index), same, None, seed=0).scores == expected.scores


def test_a_pipeline_scores_rules_without_a_judge(tmp_path: Path) -> None:
    def pipeline(folder: str, **options: object) -> Pipeline:
        return Pipeline(
            planted.model(), planted.corpus(), tmp_path / folder, settings=SETTINGS, progress=False, **options
        )

    at_once = pipeline("a", scorers=["ablate_to_simulation"])
    assert at_once.estimate(UNITS[:2]).calls == 0
    run = at_once.run(UNITS[:2])
    for row in run:
        (one,) = row.judged
        assert one.control is not None and one.control.value is not None and one.score.value is not None
        assert one.score.value > 0.98 > 0.1 > one.control.value
    method = RunFolder(tmp_path / "a").require_manifest().scorers["ablate_to_simulation"]
    assert method.options["simulator"] == "rule" and method.judge == ""
    page = (tmp_path / "a" / "units" / UNITS[0].name / "index.html").read_text()
    assert "Further scores" in page and "simulated by the rule itself" in page
    # Explained first and scored later, as by the command `score`, it is the same.
    plain = pipeline("b")
    plain.run(UNITS[:2])
    assert pipeline("b", explainer=None, scorers=["ablate_to_simulation"]).run(UNITS[:2]) == run
    for left, right in zip(at_once.results(), plain.results(), strict=True):
        assert left == right


def test_without_rules_a_judge_is_needed(tmp_path: Path) -> None:
    def pipeline(**options: object) -> Pipeline:
        return Pipeline(
            planted.model(),
            planted.corpus(),
            tmp_path,
            settings=SETTINGS,
            progress=False,
            pages=False,
            **options,
        )

    for options, complaint in (
        ({"scorers": ["simulation"]}, r"'simulation' asks a judge.*ablate_to_simulation"),
        ({"scorers": ["ablate_to_simulation", "detection"]}, "'detection' asks a judge"),
        (
            {"explainer": "max_activating", "scorers": ["ablate_to_simulation"]},
            "'max_activating' asks a judge",
        ),
    ):
        with pytest.raises(RequestError, match=complaint):
            pipeline(**options).run(UNITS[:1])
    assert not list(tmp_path.iterdir())
    backend = ScriptedBackend(word_judge.scripted, name="words")
    pipeline(explainer="max_activating", backend=backend).run(UNITS[:1])
    with pytest.raises(RequestError, match="'ablate_to_simulation' asks a judge"):
        pipeline(explainer=None, scorers=["ablate_to_simulation"]).run(UNITS[:1])


def test_a_judge_that_is_given_simulates_unless_the_rule_is_asked_for(tmp_path: Path) -> None:
    def run(folder: str, scorer: str | AblateToSimulation) -> tuple[ScorerResult, int]:
        backend = ScriptedBackend(lambda request: "I would rather not", name="mute")
        pipeline = Pipeline(
            planted.model(), planted.corpus(), tmp_path / folder, settings=SETTINGS, progress=False, pages=False,
            scorers=[scorer], backend=backend,
        )  # fmt: skip
        pipeline.run(UNITS[:1])
        (result,) = next(iter(pipeline.results())).judged
        return result, backend.calls

    judged, calls = run("judge", "ablate_to_simulation")
    assert calls > 0 and judged.score.coverage == 0 and judged.method.startswith("simulation_")
    ruled, calls = run("rule", AblateToSimulation().by_rule())
    assert calls == 0 and ruled.score.coverage == 1
    with pytest.raises(RequestError, match="another scorer ablate_to_simulation"):
        run("rule", "ablate_to_simulation")


@given(st.floats(1e-3, 3.0), st.integers(0, 2**31))
def test_a_divergence_is_exact_however_small(size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 500, generator=generator)
    moved = logits + size * torch.randn(3, 500, generator=generator)
    a, b = logits.log_softmax(-1), moved.log_softmax(-1)
    assert _jensen_shannon(a, a).max() == 0
    p, q = a.double().exp(), b.double().exp()
    middle = (p + q) / 2
    expected = ((p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2).float()
    torch.testing.assert_close(_jensen_shannon(a, b), expected, rtol=2e-3, atol=1e-11)
    torch.testing.assert_close(_jensen_shannon(b, a), expected, rtol=2e-3, atol=1e-11)


def test_a_word_that_becomes_impossible_or_certain_has_a_divergence() -> None:
    a, b = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    torch.testing.assert_close(_jensen_shannon(a, b), torch.tensor([np.log(2)], dtype=torch.float32))


def test_windows_that_were_not_kept_have_no_prediction(work: SourceWork) -> None:
    window: TokenWindow = work.evidence(0).test.top[0]
    with pytest.raises(RequestError, match="was not kept"):
        work.explained(0).simulated(window.model_copy(update={"document_index": 10_000}))


def test_simulations_of_one_window_are_run_together_as_if_alone(work: SourceWork) -> None:
    """Whatever is asked for together: windows several times, in any order, with and without predictions."""
    rng = np.random.default_rng(0)
    windows = [window.identity for window in work.evidence(planted.DIGIT).test.windows[:11]]
    picked = [windows[place] for place in rng.integers(len(windows), size=30)]
    simulated = rng.random((30, 32)) * 2
    simulated[rng.random(simulated.shape) < 0.2] = np.nan
    together = work._unit_effects.simulated(UNITS[planted.DIGIT], picked, simulated)
    alone = [
        work._unit_effects.simulated(UNITS[planted.DIGIT], [window], row[None])[0]
        for window, row in zip(picked, simulated, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-9)
    assert (together > 0).any() and len({tuple(row) for row in together}) > len(windows)


def test_the_model_runs_once_for_what_controls_share(work: SourceWork) -> None:
    asked: list[int] = []
    scorer = work.equipped(AblateToSimulation().by_rule(), seed=0)
    assert isinstance(scorer, AblateToSimulation)
    effects = work._unit_effects.simulated

    def counted(unit: Unit, windows: Sequence[tuple[int, int]], simulated: np.ndarray) -> np.ndarray:
        asked.append(len(windows))
        return effects(unit, windows, simulated)

    remembered = replace(scorer, divergences=Remembered(counted))
    own, other = sentence(work, 0), sentence(work, work.partner(0))
    result = remembered.score(work.evidence(0), own, None, seed=0, others=[other])
    assert len(asked) == 1 and asked[0] <= 60
    plain = replace(scorer, divergences=effects)
    again = plain.score(work.evidence(0), own, None, seed=0, others=[other])
    assert score_of(result) == pytest.approx(score_of(again), abs=1e-5)
    assert score_of(result, "shuffled") == pytest.approx(score_of(again, "shuffled"), abs=1e-5)
