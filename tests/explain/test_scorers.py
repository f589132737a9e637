"""Which windows are asked about, what becomes of the answers, and what a result says of itself."""

from __future__ import annotations

import doctest
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import neuron_lens.explain
from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain.evidence import Part
from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.puzzles import puzzle_named
from neuron_lens.explain.scorers import (
    NULL_EXPLANATION,
    SCORERS,
    BagOfWords,
    Detection,
    Embedding,
    Fuzzing,
    GradedDetection,
    GradedFuzzing,
    Intruder,
    Scorer,
    ScorerResult,
    SentenceTransformer,
    Simulation,
    scorer_named,
)
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.graded import probability_of_yes
from neuron_lens.explain.scorers.outcome import binary_figures, judgements, ranking_figures
from neuron_lens.explain.scorers.surprisal import surprisal_of
from neuron_lens.llm import (
    Capabilities,
    Missing,
    Request,
    Response,
    ScriptedBackend,
    TokenLogprob,
    TokenLogprobs,
)

from .judge import RuleJudge, rule_judge

ANIMALS = puzzle_named("animals")
EVIDENCE = ANIMALS.evidence()


def test_every_scorer_is_found_by_name_and_is_one() -> None:
    for name, scorer in SCORERS.items():
        made = scorer(embedder="bag_of_words") if name == "embedding" else scorer()  # type: ignore[call-arg]
        assert isinstance(made, Scorer) and made.name == name and scorer_named(name) is scorer
    with pytest.raises(RequestError, match="did you mean 'fuzzing'"):
        scorer_named("fuzing")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_examples_are_distinct_mixed_and_spread_over_the_strata(firing: int, silent: int, seed: int) -> None:
    drawn = draw_examples(EVIDENCE, "test", firing=firing, silent=silent, seed=seed)
    assert drawn == draw_examples(EVIDENCE, "test", firing=firing, silent=silent, seed=seed)
    assert len({one.window.identity for one in drawn}) == len(drawn)
    loud, quiet = [one for one in drawn if one.fires], [one for one in drawn if not one.fires]
    assert len(loud) == min(firing, len(EVIDENCE.test.firing(1.0))) and len(quiet) == silent
    assert all(one.fires == EVIDENCE.fires(one.window) for one in drawn)
    strata = [sum(one.stratum == index for one in loud) for index in range(5)]
    assert max(strata) - min(strata) <= 1 or firing > 55  # 58 windows fire
    near = sum(one.source == "near_miss" for one in quiet)
    assert near >= min(silent // 2, len(EVIDENCE.test.near_misses)) - 1


def test_a_unit_that_never_fires_in_the_part_has_no_score() -> None:
    silent = EVIDENCE.replaced(test=Part(random=EVIDENCE.test.silent(1.0)[:30]))
    judge = rule_judge()
    for scorer in (Detection(), Fuzzing(), Intruder(), Simulation()):
        result = scorer.score(silent, ANIMALS.explanation, judge, seed=0)
        assert result.score.value is None and result.quantiles == ()
    nothing = EVIDENCE.replaced(test=Part())
    result = Detection().score(nothing, ANIMALS.explanation, judge, seed=0)
    assert (result.score.value, result.score.n, result.score.coverage, result.calls) == (None, 0, 0.0, 0)


def test_the_last_batch_may_be_smaller_and_loses_nothing() -> None:
    judge = rule_judge()
    result = Detection(n_firing=11, n_silent=12, batch=5, controls=False).score(
        EVIDENCE, ANIMALS.explanation, judge, seed=0
    )
    assert result.calls == 5 and result.score.n == 23 and result.score.value == 1.0
    assert (
        result.score
        == Detection(n_firing=11, n_silent=12, batch=23, controls=False)
        .score(EVIDENCE, ANIMALS.explanation, judge, seed=0)
        .score
    )


def test_precision_at_density_is_the_formula_over_natural_examples() -> None:
    rng = np.random.default_rng(0)
    fires = rng.random(200) < 0.5
    natural = rng.random(200) < 0.7
    yes = rng.random(200) < np.where(fires, 0.8, 0.3)
    outcome = judgements([float(v) for v in yes], fires=list(fires), natural=list(natural))
    density = 0.02
    recall, fall_out = yes[fires & natural].mean(), yes[~fires & natural].mean()
    figures = binary_figures(outcome, density, seed=0)
    expected = recall * density / (recall * density + fall_out * (1 - density))
    assert figures["precision_at_density"].value == pytest.approx(expected, abs=1e-6)
    assert figures["precision"].value == pytest.approx((yes & fires).sum() / yes.sum(), abs=1e-6)
    assert figures["precision"].value > 5 * expected  # what a balanced set hides
    assert figures["recall"].value == pytest.approx(yes[fires].mean(), abs=1e-6)
    unnatural = judgements([float(v) for v in yes], fires=list(fires), natural=[False] * 200)
    assert binary_figures(unnatural, density, seed=0)["precision_at_density"].value is None
    assert binary_figures(outcome, None, seed=0)["precision_at_density"].value is None


def test_an_interval_never_loses_its_width() -> None:
    """All right, or all told alike, of few examples is no certainty; least of all at a low density."""
    for n in (5, 20, 100):
        fires = [True, False] * n
        perfect = judgements([float(f) for f in fires], fires=fires, natural=[True] * (2 * n))
        told_alike = judgements([1.0] * (2 * n), fires=fires, natural=[True] * (2 * n))
        figures = binary_figures(perfect, 0.001, 0) | ranking_figures(perfect, 0.001, 0)
        for name, score in figures.items():
            assert score.low is not None and score.high is not None and score.high - score.low > 0.4 / n, name
        rare = figures["precision_at_density"]
        assert rare.value == rare.high == 1.0 and rare.low is not None and rare.low < 0.05
        blind = binary_figures(told_alike, 0.001, 0)["balanced_accuracy"]
        assert blind.value == 0.5 and blind.low is not None and blind.high is not None
        assert blind.low < 0.5 < blind.high


def test_a_ranking_says_yes_as_often_as_there_is_truth() -> None:
    fires = [True, True, False, False, False, True]
    perfect = judgements([9.0, 8.0, 1.0, 2.0, 0.0, 7.0], fires=fires, natural=[True] * 6)
    figures = ranking_figures(perfect, 0.1, seed=0)
    assert figures["auc"].value == figures["precision"].value == figures["precision_at_density"].value == 1.0
    half = judgements([9.0, 0.0, 8.0, 2.0, 0.0, 7.0], fires=fires, natural=[True] * 6)
    assert ranking_figures(half, 0.1, seed=0)["precision"].value == pytest.approx(2 / 3, abs=1e-6)


def test_quantiles_show_a_judge_that_sees_only_the_strong() -> None:
    """A judge that says yes where the true activation is high: recall rises over the strata."""
    strong = {"".join(w.tokens): w.max_activation > 6 for w in EVIDENCE.test.windows}

    def script(request: Request) -> str:
        texts = [json.loads(t) for t in re.findall(r'^\d+: (".*")$', request.texts[-1], re.MULTILINE)]
        return json.dumps({"answers": [strong[text] for text in texts]})

    result = Detection(controls=False).score(EVIDENCE, "x", ScriptedBackend(script), seed=0)
    recalls = [one.score.value for one in result.quantiles]
    assert recalls[0] == 0.0 and recalls[-1] == 1.0
    assert [one.index for one in result.quantiles] == list(range(5))
    assert all(
        a.high <= b.low or a.low <= b.low
        for a, b in zip(result.quantiles, result.quantiles[1:], strict=False)
    )


def test_controls_are_there_unless_told_otherwise_and_name_what_they_are() -> None:
    judge = rule_judge()
    with_null = Detection().score(EVIDENCE, ANIMALS.explanation, judge, seed=0)
    assert [(c.name, c.sentence) for c in with_null.controls] == [
        ("null", NULL_EXPLANATION),
        ("shuffled", None),
    ]
    others = [ANIMALS.explanation, "words for food"]
    with_other = Detection().score(EVIDENCE, ANIMALS.explanation, judge, seed=0, others=others)
    assert (
        with_other.controls[0].name == "another_unit" and with_other.controls[0].sentence == "words for food"
    )
    assert with_other.scores == with_null.scores
    for control in with_other.controls:
        assert control.scores.keys() == with_other.scores.keys()
        value = control.scores["balanced_accuracy"].value
        assert value is not None and value < 0.75
    alone = rule_judge()
    assert Detection(controls=False).score(EVIDENCE, ANIMALS.explanation, alone, seed=0).controls == ()
    assert judge.calls > 2 * alone.calls


def test_a_result_says_what_it_was_made_with_and_keeps_in_json() -> None:
    result = Fuzzing().score(EVIDENCE, ANIMALS.explanation, rule_judge(), seed=3)
    assert result.prompt.startswith("fuzzing@") and result.backend == "scripted rules 0 0.0"
    assert (result.scorer, result.part, result.seed, result.chance) == ("fuzzing", "test", 3, 0.5)
    assert ScorerResult.model_validate_json(result.model_dump_json()) == result
    simulated = Simulation().score(EVIDENCE, ANIMALS.explanation, rule_judge(), seed=3)
    assert simulated.method == "simulation_all_at_once, scale calibration"


def test_wrong_marks_are_as_many_as_right_ones_and_never_at_firing_tokens() -> None:
    judge = rule_judge()
    Fuzzing(controls=False, batch=1).score(EVIDENCE, ANIMALS.explanation, judge, seed=0)
    text_of = {"".join(window.tokens): window for window in EVIDENCE.test.windows}
    right, wrong, wrong_in_firing = [], [], 0
    for request in judge.requests:
        shown = json.loads(re.findall(r'^1: (".*")$', request.texts[-1], re.MULTILINE)[0])
        window = text_of[shown.replace("<<", "").replace(">>", "")]
        inside = [piece.split(">>")[0] for piece in shown.split("<<")[1:]]
        fired = {t for t, v in zip(window.tokens, window.activations, strict=True) if v > 1.0}
        marked_tokens = [t for piece in inside for t in re.findall(r" ?\w+|[^\w\s]|\s", piece)]
        if fired and set(marked_tokens) == fired:
            right.append(len(marked_tokens))
        else:
            assert not fired & set(marked_tokens)
            wrong.append(len(marked_tokens))
            wrong_in_firing += bool(fired)
    assert len(right) == 25 and len(wrong) == 25 and 10 <= wrong_in_firing <= 13
    assert np.mean(wrong) == pytest.approx(np.mean(right), abs=0.35)


def test_a_yes_is_its_share_of_yes_and_no_however_they_are_written() -> None:
    def said(**shares: float) -> Response:
        top = tuple(TokenLogprob(token=word, logprob=math.log(share)) for word, share in shares.items())
        return Response(text="", tokens=(TokenLogprobs(token=top[0].token, logprob=top[0].logprob, top=top),))

    assert probability_of_yes(said(Yes=0.3, **{" yes": 0.1, "NO": 0.1, "Well": 0.5})) == pytest.approx(0.8)
    assert probability_of_yes(said(no=0.9)) == 0.0 and probability_of_yes(said(yes=1e-6)) == 1.0
    assert probability_of_yes(said(Well=0.9, yesterday=0.1)) is None
    assert probability_of_yes(Response(text="yes")) is None
    assert probability_of_yes(Response(text="", tokens=())) is None
    assert probability_of_yes(Missing(kind="failed", reason="gone")) is None


def test_a_judge_that_always_says_yes_is_told_by_how_sure_it_is() -> None:
    result = GradedDetection().score(EVIDENCE, ANIMALS.explanation, rule_judge(), seed=0)
    assert result.headline == "auc" and result.score.value == 1.0
    assert result.controls[0].scores["auc"].value != 1.0
    with pytest.raises(BackendError, match="'graded_detection' needs logprobs"):
        mute = ScriptedBackend(RuleJudge(), capabilities=Capabilities(json_schema=True))
        GradedDetection().score(EVIDENCE, "x", mute, seed=0)


def test_the_same_markings_are_graded_as_are_answered_by_yes_and_no() -> None:
    asked: dict[str, set[str]] = {}
    for scorer in (Fuzzing(controls=False, batch=1), GradedFuzzing(controls=False)):
        judge = rule_judge()
        scorer.score(EVIDENCE, ANIMALS.explanation, judge, seed=5)
        asked[scorer.name] = {
            json.loads(found)
            for request in judge.requests
            for found in re.findall(r'^(?:1|Text): (".*")$', request.texts[-1], re.MULTILINE)
        }
    assert asked["fuzzing"] == asked["graded_fuzzing"] and len(asked["fuzzing"]) == 50


def test_surprisal_is_over_the_texts_own_tokens() -> None:
    def said(*tokens: tuple[str, float | None]) -> Response:
        return Response(text="", prompt_tokens=tuple(TokenLogprobs(token=t, logprob=p) for t, p in tokens))

    whole = said(("<s>", None), ("Text:", -9.0), (" a", -1.0), (" cat", -3.0))
    assert surprisal_of(whole, " a cat") == pytest.approx(2.0)
    assert surprisal_of(whole, "cat") is None  # no token begins where the text does, none is left
    assert surprisal_of(whole, " a dog") is None and surprisal_of(whole, "") is None
    assert surprisal_of(Response(text=""), "x") is None
    assert surprisal_of(Missing(kind="failed", reason="gone"), "x") is None
    assert surprisal_of(said((" a", None), (" cat", -3.0)), " a cat") is None


def test_spelling_is_compared_only_when_asked_for_by_name() -> None:
    result = Embedding(embedder="bag_of_words").score(EVIDENCE, "dog cat horse owl fox", None, seed=0)
    assert result.method == "bag_of_words" and "not meaning" in result.notes[0] and result.backend == ""
    assert result.score.value is not None and result.score.value > 0.6
    rows = BagOfWords()(["a dog", "a dog", "violin", ""])
    assert (rows[0] == rows[1]).all() and not (rows[0] == rows[2]).all() and not rows[3].any()
    assert SentenceTransformer("some/model").name == "sentence_transformers some/model"

    class Wrong:
        name, instructed = "wrong", True

        def __call__(self, texts: list[str]) -> np.ndarray:
            assert texts[0].startswith("Instruct: ")
            return np.zeros((2, 3))

    with pytest.raises(RequestError, match=r"'wrong' gave an array of shape \[2, 3\] for 51 texts"):
        Embedding(embedder=Wrong()).score(EVIDENCE, "x", None, seed=0)


def test_a_plan_with_calls_needs_a_backend() -> None:
    plan = Detection().plan(EVIDENCE, "x", rule_judge(), seed=0)
    with pytest.raises(RequestError, match="no backend to make them of"):
        carry_out(None, [plan])


def test_the_example_in_the_packages_own_words_runs() -> None:
    outcome = doctest.testmod(neuron_lens.explain)
    assert outcome.attempted > 5 and outcome.failed == 0
