"""Every score carries precision, precision at the unit's density and figures by strength, or says why one is absent."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from neuron_lens.explain.evidence import Part
from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.puzzles import puzzle_named, puzzles
from neuron_lens.explain.scorer_result import DEMANDED
from neuron_lens.explain.scorers import (
    AttentionPairsScorer,
    BaseScorer,
    Causal,
    Detection,
    Embedding,
    Fuzzing,
    GradedDetection,
    GradedFuzzing,
    Intruder,
    ScorerResult,
    Simulation,
    Surprisal,
)
from neuron_lens.llm import Request, ScriptedBackend

from .judge import RuleEmbedder, guess, planted_continuations, planted_effects, rule_judge
from .test_chance import held_to_the_rate
from .test_explainers import head_evidence

ANIMALS = puzzle_named("animals")
EVIDENCE = ANIMALS.evidence()
HEAD = head_evidence()
OTHERS = tuple(p.evidence().unit for p in puzzles()[5:9])


def rating(request: Request) -> str:
    """Blind ratings of pairs."""
    texts = re.findall(r"^\d+: (.*)$", request.texts[-1], re.MULTILINE)
    return json.dumps({"ratings": [int(11 * guess(request.texts[-1], place)) for place in range(len(texts))]})


ASKED: dict[str, tuple[BaseScorer, set[str]]] = {
    "detection": (Detection(), set()),
    "fuzzing": (Fuzzing(), set()),
    "graded detection": (GradedDetection(), set()),
    "graded fuzzing": (GradedFuzzing(), set()),
    "intruder": (Intruder(), set()),
    "simulation": (Simulation(), set()),
    "surprisal": (Surprisal(), set()),
    "embedding": (Embedding(embedder=RuleEmbedder()), set()),
    "causal by answers": (
        Causal(effects=planted_effects, random_units=OTHERS),
        {"precision_at_density", "quantiles"},
    ),
    "causal by likelihood": (
        Causal(continuations=planted_continuations, random_units=OTHERS),
        set(DEMANDED),
    ),
    "attention_pairs": (AttentionPairsScorer(), set()),
}


def scored(name: str) -> ScorerResult:
    scorer, _ = ASKED[name]
    if name == "attention_pairs":
        return scorer.score(HEAD, "whatever", ScriptedBackend(rating), seed=0)
    return scorer.score(EVIDENCE, ANIMALS.explanation, rule_judge(), seed=0)


@pytest.mark.parametrize("name", ASKED)
def test_what_every_score_should_carry_is_there_or_its_absence_is_explained(name: str) -> None:
    result, absent = scored(name), ASKED[name][1]
    there = {key for key in ("precision", "precision_at_density") if key in result.scores}
    there = {key for key in there if result.scores[key].value is not None}
    there |= {"quantiles"} if result.quantiles else set()
    assert set(result.absent) == absent and there | absent == set(DEMANDED) and not there & absent
    assert all(len(reason) > 20 for reason in result.absent.values())
    assert ScorerResult.model_validate_json(result.model_dump_json()) == result
    for score in result.scores.values():
        assert score.low is None or score.high is None or score.low <= (score.value or 0.0) <= score.high


@pytest.mark.parametrize(
    "name", sorted(set(ASKED) - {"causal by answers", "causal by likelihood", "attention_pairs"})
)
def test_without_a_uniform_sample_there_is_no_density_and_it_is_said(name: str) -> None:
    top = EVIDENCE.test.firing(1.0)[:30] + EVIDENCE.test.silent(1.0)[:30]
    bare = {part: Part(top=getattr(EVIDENCE, part).top) for part in ("train", "validation")}
    evidence = EVIDENCE.replaced(**bare, test=Part(top=top, near_misses=top[30:]))
    result = ASKED[name][0].score(evidence, ANIMALS.explanation, rule_judge(), seed=0)
    assert "how often the unit fires" in result.absent["precision_at_density"]
    assert "stratum" in result.absent["quantiles"] and result.score.value is not None


def test_failed_answers_explain_absent_figures() -> None:
    backend = ScriptedBackend(lambda request: "no idea")
    result = Detection().score(EVIDENCE, "x", backend, seed=0)
    assert result.absent["precision"] == "0 of 50 answers came: too few for a figure"
    nothing = Detection().score(EVIDENCE.replaced(test=Part()), "x", backend, seed=0)
    assert set(nothing.absent.values()) == {"the test part holds no examples to ask about"}


def test_an_intruders_precision_is_that_of_what_was_let_stand() -> None:
    """Recall and false positives counted by hand from the requests and a judge that errs at times."""
    stood, silent = [], []

    def script(request: Request) -> str:
        texts = [json.loads(one) for one in re.findall(r'^\d+: (".*")$', request.texts[-1], re.MULTILINE)]
        named = int(guess(*texts) * 5)
        for place, text in enumerate(texts):
            fires = next(EVIDENCE.fires(w) for w in EVIDENCE.test.windows if "".join(w.tokens) == text)
            near = any("".join(w.tokens) == text for w in EVIDENCE.test.near_misses)
            (stood if fires else silent).append((place != named, not near))
        return json.dumps({"intruder": named + 1})

    result = Intruder(controls=False).score(EVIDENCE, "x", ScriptedBackend(script, concurrency=1), seed=0)
    assert len(stood) == 80 and len(silent) == 20
    recall, fall_out = np.mean([said for said, _ in stood]), np.mean([said for said, _ in silent])
    assert result.scores["accuracy"].value == pytest.approx(1 - fall_out)
    assert result.scores["precision"].value == pytest.approx(recall / (recall + fall_out), abs=1e-6)
    density = EVIDENCE.density
    assert density is not None
    natural = np.mean([said for said, own in silent if own])
    d = density.windows
    expected = recall * d / (recall * d + natural * (1 - d))
    assert result.scores["precision_at_density"].value == pytest.approx(expected, abs=1e-6)


def test_the_windows_of_one_trial_are_of_one_stratum_and_figures_rise_with_it() -> None:
    strong = {"".join(w.tokens): w.max_activation for w in EVIDENCE.test.windows}
    stratum = {"".join(w.tokens): one.index for one in EVIDENCE.test.strata for w in one.windows}

    def script(request: Request) -> str:
        """Knows the intruder where the others are strong; says the first text otherwise."""
        texts = [json.loads(one) for one in re.findall(r'^\d+: (".*")$', request.texts[-1], re.MULTILINE)]
        firing = [text for text in texts if strong[text] > 1.0]
        assert len(firing) == 4 and len({stratum[text] for text in firing}) == 1
        silent = next(place for place, text in enumerate(texts) if strong[text] <= 1.0)
        right = min(strong[text] for text in firing) > 6
        return json.dumps({"intruder": silent + 1 if right else (silent + 1) % 5 + 1})

    result = Intruder(controls=False).score(EVIDENCE, "x", ScriptedBackend(script), seed=0)
    shares = [one.score.value for one in result.quantiles]
    assert [one.index for one in result.quantiles] == list(range(5)) and shares == sorted(shares)
    assert shares[0] == 0.0 and shares[-1] == 1.0 and result.quantiles[0].score.n == 4


def test_blind_intruders_have_the_precision_of_chance() -> None:
    results = []
    for repeat in range(60):
        judge, puzzle = rule_judge(salt=repeat), puzzles()[repeat % len(puzzles())]
        plan = Intruder(controls=False).plan(puzzle.evidence(), f"nothing {repeat}", judge, seed=repeat)
        results.append((carry_out(judge, [plan])[0], puzzle.evidence().density))
    held_to_the_rate([result.scores["precision"] for result, _ in results], 0.5)
    ratios = [
        (result.scores["precision_at_density"].value or 0.0) / density.windows
        for result, density in results
        if density is not None
    ]
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.15)


def test_the_density_of_pairs_is_counted_in_the_sample() -> None:
    acting = every = 0
    for _, part in HEAD.parts():
        for window in part.random:
            for place in range(len(window.tokens)):
                for source in range(place + 1):
                    assert window.sources is not None
                    acting += window.activations[place] > 1.0 and window.sources[place] == source
                    every += 1
    assert AttentionPairsScorer().density(HEAD) == pytest.approx(acting / every)


def test_pairs_asked_about_act_or_do_not_and_are_asked_once() -> None:
    backend = ScriptedBackend(rating)
    AttentionPairsScorer(batch=1, n_silent=40, controls=False).score(HEAD, "x", backend, seed=1)
    shown = [json.loads(r.texts[-1].rsplit("1: ", 1)[1].split("\n")[0]) for r in backend.requests]
    assert len(shown) == 65 and len(set(shown)) > 60


def test_blind_ratings_of_pairs_score_chance() -> None:
    results = []
    for repeat in range(60):
        backend = ScriptedBackend(rating)
        scorer = AttentionPairsScorer(n_firing=60, n_silent=120, batch=30, controls=False)
        results.append(scorer.score(HEAD, f"nothing {repeat}", backend, seed=repeat))
    held_to_the_rate([one.score for one in results], 0.5)
    density = AttentionPairsScorer().density(HEAD)
    assert density is not None
    at_density = [one.scores["precision_at_density"].value or 0.0 for one in results]
    assert np.mean(at_density) == pytest.approx(density, rel=0.25)
