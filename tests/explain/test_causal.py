"""Causal scores on a transformer whose neurons are known: the true explanation stands above the false ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain import source_work
from neuron_lens.explain.pipeline import Pipeline
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.scorers import (
    AblateToSimulation,
    BaseScorer,
    Causal,
    Continuation,
    Remembered,
    ScorerResult,
    Simulation,
)
from neuron_lens.explain.simulators import TextSimulator
from neuron_lens.explain.simulators.base import Simulated
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.harvest.effects import UnitEffects
from neuron_lens.llm import Request, Response, ScriptedBackend, TokenLogprobs
from neuron_lens.records import TokenWindow, Unit

from . import planted, word_judge
from .test_planted import SETTINGS, UNITS, worked

SENTENCES = {
    planted.SELF: "the word 'self'",
    planted.DIGIT: "digits",
    planted.AFTER_DEF: "what follows def",
    planted.RANDOM: "noise",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> SourceWork:
    return worked(tmp_path_factory.mktemp("harvest"))


class Knowing:
    """Knows which tokens each neuron promotes: a description is likelier the more of them were written. Simulates by
    the rule that a description names."""

    def __init__(self, work: SourceWork) -> None:
        texts = work.harvest.windows.token_texts
        inside = "".join([*planted.WORDS, *planted.DIGITS])  # what cannot be told from a part of a word
        self.promoted: dict[str, list[str]] = {}
        for index, sentence in SENTENCES.items():
            logits = work._logits_of(index)
            assert logits is not None
            told = [texts[token] for token in np.argsort(-logits)]
            self.promoted[sentence] = [text for text in told if text != "\ufffd" and text not in inside][:40]

    def __call__(self, request: Request) -> str | Response:
        if request.prompt is None:
            return self._simulated(request.texts[-1])
        head, asked = request.prompt.rsplit("\nDescription: ", 1)
        written = json.loads(head.rsplit("\nIt wrote: ", 1)[1])
        logprob = -5.0 + 0.2 * sum(written.count(token) for token in self.promoted.get(asked, ()))
        before = TokenLogprobs(token=request.prompt.removesuffix(asked), logprob=None)
        return Response(text="", prompt_tokens=(before, TokenLogprobs(token=asked, logprob=logprob)))

    def _simulated(self, text: str) -> str:
        described = text.rsplit("Description: ", 1)[1].split("\n")[0]
        tokens = [token.strip() for token in json.loads(text.split("): ", 1)[1])]
        fires = {
            SENTENCES[planted.SELF]: [token == "self" for token in tokens],
            SENTENCES[planted.DIGIT]: [token in planted.DIGITS for token in tokens],
            SENTENCES[planted.AFTER_DEF]: [before == "def" for before in ["", *tokens[:-1]]],
        }.get(described, [place % 3 == 0 for place in range(len(tokens))])
        return json.dumps({"activations": [10 * one for one in fires]})


def judge(work: SourceWork, **options: object) -> ScriptedBackend:
    return ScriptedBackend(Knowing(work), name="knowing", **options)  # type: ignore[arg-type]


def held_to_the_truth(scorer: BaseScorer, work: SourceWork) -> dict[tuple[int, int], ScorerResult]:
    """Of every unit the true sentence ranks first, above chance with its whole interval; the results by unit and whose
    sentence it is."""
    units = (planted.SELF, planted.DIGIT, planted.AFTER_DEF)
    scores = {
        (unit, other): replace(scorer, controls=unit == other).score(
            work.evidence(unit), SENTENCES[other], judge(work), seed=0, others=["nothing"]
        )
        for unit in units
        for other in SENTENCES
    }
    for unit in units:
        true = scores[unit, unit].score
        assert true.low is not None and true.value is not None and true.low > scores[unit, unit].chance
        false = [scores[unit, other].score.value for other in SENTENCES if other != unit]
        assert all(value is not None and value < true.value for value in false), (unit, true, false)
    return scores


def test_after_steering_the_true_explanation_is_likelier_and_beats_random_units(work: SourceWork) -> None:
    scorer = work.equipped(Causal(random_units=tuple(UNITS), form="likelihood"), seed=0)
    scores = held_to_the_truth(scorer, work)
    for unit in (planted.SELF, planted.DIGIT, planted.AFTER_DEF):
        result = scores[unit, unit]
        controls = {one.name: one.scores["likelihood_gain"] for one in result.controls}
        assert list(controls) == ["another_unit", "shuffled", "random_unit"]
        assert controls["another_unit"].value == 0.0 and controls["random_unit"].n_windows == 12
        random = controls["random_unit"].value
        assert random is not None and random < (result.score.low or 0.0)
        assert result.scores["divergence"].value == pytest.approx(0.5, rel=0.06)
        assert result.calls == 24 and result.method == "likelihood"
        assert result.prompt.startswith("causal_likelihood@")


def test_the_form_is_picked_by_what_the_judge_can_and_refused_by_name(work: SourceWork) -> None:
    able, chat = judge(work), judge(work, capabilities=word_judge.CHAT)
    scorer = work.equipped(Causal(), seed=0)
    assert isinstance(scorer, Causal)
    assert (scorer.taken(able), scorer.taken(chat), scorer.taken(None)) == (
        "likelihood",
        "answers",
        "answers",
    )
    assert Causal(effects=scorer.effects).taken(able) == "answers"
    assert replace(scorer, form="answers").taken(able) == "answers"
    with pytest.raises(BackendError, match="'causal' needs completion, prompt_logprobs"):
        replace(scorer, form="likelihood").plan(work.evidence(0), "x", chat, seed=0)
    with pytest.raises(RequestError, match="needs continuations"):
        Causal(form="likelihood").plan(work.evidence(0), "x", able, seed=0)
    with pytest.raises(RequestError, match="did you mean 'answers'"):
        Causal(form="answer")  # type: ignore[arg-type]


def test_candidates_are_chosen_on_effects_in_validation_windows(work: SourceWork) -> None:
    asked: list[str] = []
    effects = UnitEffects(work.source, work.harvest.windows, work.explained, n_windows=2, n_tokens=2)

    def noted(unit: Unit, part: str, count: int) -> list[Continuation]:
        asked.append(part)
        return effects.continuations(unit, part, count)  # type: ignore[arg-type]

    scorer = Causal(continuations=noted, random_units=tuple(UNITS), part="validation", controls=False)
    assert scorer.score(work.evidence(0), "x", judge(work), seed=0).part == "validation"
    assert asked == ["validation"]


def test_what_a_unit_does_is_the_same_in_whatever_group_it_is_held(
    work: SourceWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = UnitEffects(work.source, work.harvest.windows, work.explained, n_windows=3, n_tokens=4)
    expected = [(whole(unit), whole.continuations(unit)) for unit in UNITS]
    monkeypatch.setattr(source_work, "GROUP_UNITS", 2)
    apart = SourceWork(work.source, work.harvest)
    effects = UnitEffects(apart.source, apart.harvest.windows, apart.explained, n_windows=3, n_tokens=4)
    assert [(effects(unit), effects.continuations(unit)) for unit in UNITS] == expected


def test_the_model_does_not_notice_a_true_simulation(work: SourceWork) -> None:
    scorer = work.equipped(AblateToSimulation(simulator=TextSimulator()), seed=0)
    scores = held_to_the_truth(scorer, work)
    for unit in (planted.SELF, planted.DIGIT):
        result = scores[unit, unit]
        assert (result.score.value or 0.0) > 0.99 and result.scores["moved_by_mean"].value
        for control in result.controls:
            assert (control.scores["ablation_score"].value or 0.0) < 0.2
        assert result.absent.keys() == {"precision", "precision_at_density"} and result.quantiles
        shared = Simulation(simulator=TextSimulator()).plan(
            work.evidence(unit), SENTENCES[unit], judge(work), seed=0
        )
        assert result.calls == len(shared.calls) / 2  # the same calls, without those of the control


def test_a_simulation_that_is_the_mean_scores_nothing_and_a_missing_one_is_missing(work: SourceWork) -> None:
    scorer = work.equipped(AblateToSimulation(simulator=TextSimulator(), controls=False), seed=0)
    evidence = work.evidence(planted.DIGIT)
    mute = ScriptedBackend(lambda request: "I would rather not")
    nothing = scorer.score(evidence, "x", mute, seed=0)
    assert nothing.score.value is None and nothing.score.coverage == 0.0 and nothing.missing
    mean = evidence.statistics.mean
    assert isinstance(scorer, AblateToSimulation) and scorer.divergences is not None
    windows = [window.identity for window in evidence.test.top]
    rows = scorer.divergences(evidence.unit, windows, np.full((len(windows), 32), mean))
    np.testing.assert_allclose(rows[:, 0], rows[:, 1], rtol=1e-3)


def test_a_simulation_in_hand_is_scored_offline(work: SourceWork) -> None:
    class Levels:
        """The true activations, as levels."""

        name, needs, prompt = "levels", (), ""

        def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
            return Plan((), lambda answers: [tuple(5.0 * value for value in w.activations) for w in windows])

    scorer = work.equipped(AblateToSimulation(simulator=Levels()), seed=0)
    result = scorer.score(work.evidence(planted.SELF), "whatever it is", None, seed=0)
    assert result.score.value == pytest.approx(1.0, abs=1e-3) and result.calls == 0
    shuffled = next(one for one in result.controls if one.name == "shuffled").scores["ablation_score"]
    assert shuffled.value is not None and shuffled.value < 0


def test_divergences_are_asked_for_once() -> None:
    asked: list[int] = []

    def divergences(unit: Unit, windows: object, simulated: np.ndarray) -> np.ndarray:
        asked.append(len(simulated))
        return simulated[:, :2]

    remembered = Remembered(divergences)  # type: ignore[arg-type]
    rows = np.arange(12.0).reshape(4, 3)
    windows = [(0, place) for place in range(4)]
    first = remembered(UNITS[0], windows, rows)
    assert (remembered(UNITS[0], windows[::-1], rows[::-1]) == first[::-1]).all() and asked == [4]
    assert (remembered(UNITS[1], windows[:1], rows[:1]) == first[:1]).all() and asked == [4, 1]


def test_what_cannot_be_replaced_by_its_simulation_is_refused(work: SourceWork) -> None:
    evidence = work.evidence(0)
    with pytest.raises(RequestError, match="needs divergences"):
        AblateToSimulation(simulator=TextSimulator()).plan(evidence, "x", judge(work), seed=0)
    head = evidence.replaced(unit=Unit(kind="head", layer=0, index=0, site="attn.v_out"))
    scorer = work.equipped(AblateToSimulation(simulator=TextSimulator()), seed=0)
    with pytest.raises(RequestError, match="says nothing of the direction"):
        scorer.plan(head, "x", judge(work), seed=0)


def test_a_pipeline_makes_the_calls_it_was_estimated_to(work: SourceWork, tmp_path: Path) -> None:
    """Both forms of causal scoring in turn, the simulation shared, heads scored as far as they can be."""
    pipeline = Pipeline(
        planted.model(), planted.corpus(), tmp_path, settings=SETTINGS, progress=False, pages=True,
        scorers=["causal", Simulation(simulator=TextSimulator()), AblateToSimulation(simulator=TextSimulator())],
        backend=(backend := judge(work)),
    )  # fmt: skip
    units = [*UNITS[:2], *pipeline.heads(0, [0])]
    planned = pipeline.estimate(units)
    assert backend.calls == 0
    run = pipeline.run(units)
    assert backend.calls == planned.calls > 100
    judged = {row.unit: {one.scorer: one for one in row.judged} for row in run}
    assert judged[units[0]].keys() == {"causal", "simulation", "ablate_to_simulation"}
    assert judged[units[2]].keys() == {"causal", "simulation"}
    assert judged[units[0]]["causal"].figure == "likelihood_gain"
    head = next(result for result in pipeline.results() if result.unit == units[2])
    assert "direction" in head.unscored["ablate_to_simulation"]
    assert head.judged[0].scores["divergence"].value is not None
    page = (tmp_path / "units" / units[0].name / "index.html").read_text()
    assert "nothing is said to be the unit" in page
    pipeline.run(units)
    assert backend.calls == planned.calls
