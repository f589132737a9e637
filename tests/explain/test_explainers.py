"""What judges are shown, what becomes of their answers, and how one of several candidates is chosen."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain.best_of import best_of
from neuron_lens.explain.evidence import PARTS, Evidence, Part, strata_of
from neuron_lens.explain.explainers import (
    EXPLAINERS,
    AttentionPairs,
    Candidate,
    Contrastive,
    LogitWeights,
    MaxActivating,
    TokenActivationPairs,
    TokenStatistics,
    explainer_named,
)
from neuron_lens.explain.explainers.base import most_active, prompt_named
from neuron_lens.explain.plan import carry_out
from neuron_lens.explain.puzzles import puzzle_named, puzzles
from neuron_lens.explain.result import TokenValue
from neuron_lens.explain.scorers import AttentionPairsScorer, Causal, Detection, Embedding
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.harvest.effects import UnitEffects
from neuron_lens.llm import Capabilities, Missing, RandomFaults, Request, ScriptedBackend, prompt_names
from neuron_lens.records import TokenWindow, Unit

from . import planted
from .judge import rule_judge
from .test_evidence import statistics
from .test_planted import UNITS, worked

ANIMALS = puzzle_named("animals").evidence()


def answering(sentence: str = "names of animals") -> ScriptedBackend:
    return ScriptedBackend(lambda request: json.dumps({"explanation": f" {sentence}\n"}))


def with_weights(evidence: Evidence) -> Evidence:
    token = TokenValue(token=" zebra", id=3, value=2.5)
    return evidence.replaced(promoted=(token,), reads=(token,))


def head_evidence(n: int = 60) -> Evidence:
    """A head that attends from every later copy of a word to its first copy."""
    draw = random.Random(0)
    parts = {}
    for document, name in enumerate(PARTS):
        windows = []
        for place in range(n):
            tokens = tuple(f" {draw.choice('abcdefgh')}" for _ in range(8))
            sources = tuple(tokens.index(t) if tokens.index(t) < i else -1 for i, t in enumerate(tokens))
            windows.append(
                TokenWindow(
                    document=name, document_index=document, start=8 * place, character_start=0, context_position=0,
                    tokens=tokens, ids=(0,) * 8, sources=sources,
                    activations=tuple(5.0 + draw.random() if s >= 0 else 0.1 for s in sources),
                )
            )  # fmt: skip
        parts[name] = Part(random=tuple(windows), strata=strata_of(tuple(windows), 1.0))
    return Evidence(
        unit=Unit(kind="head", layer=0, index=1, site="attn.v_out"), statistics=statistics(1.0), **parts
    )


EVIDENCE = {"logit_weights": with_weights(ANIMALS), "attention_pairs": head_evidence()}


@pytest.mark.parametrize("name", sorted(set(EXPLAINERS) - {"token_statistics"}))
def test_a_judges_sentence_becomes_a_candidate_that_says_where_it_is_from(name: str) -> None:
    backend = answering()
    (found,) = explainer_named(name)().explain(EVIDENCE.get(name, ANIMALS), backend)
    assert found == Candidate(
        explainer=name,
        sentence="names of animals",
        prompt=prompt_named(name).version,
        backend="scripted scripted",
    )
    (request,) = backend.requests
    assert request.prompt_version.startswith(prompt_named(name).version) and request.temperature == 0.0
    assert not any("{{" in message.content for message in request.messages)


@pytest.mark.parametrize("name", sorted(set(EXPLAINERS) - {"token_statistics"}))
def test_several_candidates_are_drawn_apart_and_a_failed_one_is_missing(name: str) -> None:
    explainer = explainer_named(name)(n_candidates=40)
    backend = ScriptedBackend(
        lambda request: json.dumps({"explanation": f"sentence {request.seed}"}),
        faults=RandomFaults(0.4, ["refusal", "bad_request"]),
    )
    found = explainer.explain(EVIDENCE.get(name, ANIMALS), backend)
    assert [one.number for one in found] == list(range(40))
    assert {request.seed for request in backend.requests} == set(range(40))
    kinds = {one.missing.kind for one in found if one.missing is not None}
    assert kinds == {"refused", "failed"}
    for one in found:
        assert (one.sentence is None) == (one.missing is not None)
        assert one.sentence in (None, f"sentence {one.number}")


@pytest.mark.parametrize("name", sorted(EXPLAINERS))
def test_explainers_read_training_windows_only(name: str) -> None:
    """Other validation and test windows, the same request (or, of the fitted one, the same without test windows)."""
    evidence = EVIDENCE.get(name, ANIMALS)
    hidden = ("test",) if name == "token_statistics" else ("validation", "test")
    blind = evidence.replaced(**{part: Part() for part in hidden})
    if name == "token_statistics":
        assert TokenStatistics().explain(evidence) == TokenStatistics().explain(blind)
        return
    seen, unseen = answering(), answering()
    explainer_named(name)().explain(evidence, seen)
    explainer_named(name)().explain(blind, unseen)
    assert seen.requests == unseen.requests


def _user(backend: ScriptedBackend) -> str:
    return backend.requests[0].messages[-1].content.split("\n\nAnswer with one JSON")[0]


def test_tables_hold_every_token_and_sparse_ones_are_repeated_without_zeros() -> None:
    backend = answering()
    TokenActivationPairs(n_windows=3).explain(ANIMALS, backend)
    text = _user(backend)
    whole, filtered = text.split("Same activations, but with all zeros filtered out:")
    shown = most_active(ANIMALS, 3)
    rows = [line.split("\t") for line in whole.split("\n") if "\t" in line]
    assert [row[0] for row in rows] == [token for window in shown for token in window.tokens]
    levels = [int(row[1]) for row in rows]
    assert max(levels) == 10 and filtered.count("\t") == sum(level > 0 for level in levels)


def test_marks_stand_around_firing_tokens_and_are_not_in_the_text() -> None:
    backend = answering()
    angled = [w.model_copy(update={"tokens": ("<<", *w.tokens[1:])}) for w in ANIMALS.train.top]
    evidence = ANIMALS.replaced(train=Part(top=tuple(angled)))
    MaxActivating(n_windows=4).explain(evidence, backend)
    text = _user(backend)
    assert "The marks are [[ and ]]." in text
    texts = [json.loads(line.split(": ", 1)[1]) for line in text.split("\n") if line[:1].isdigit()]
    for window, shown in zip(most_active(evidence, 4), texts, strict=True):
        assert shown.replace("[[", "").replace("]]", "") == "".join(window.tokens)
        inside = "".join(piece.split("]]")[0] for piece in shown.split("[[")[1:])
        fired = [t for t, value in zip(window.tokens, window.activations, strict=True) if value > 1.0]
        assert inside == "".join(fired)


def test_contrast_is_with_silent_windows_near_misses_first() -> None:
    backend = answering()
    Contrastive(n_silent=3).explain(ANIMALS, backend)
    silent = _user(backend).split("The unit is silent:\n")[1].split("\n")
    wanted = ["".join(window.tokens) for window in ANIMALS.train.near_misses[:3]]
    assert [json.loads(line.split(": ", 1)[1]) for line in silent] == wanted


def test_what_the_evidence_lacks_is_refused_by_name() -> None:
    nothing = ANIMALS.replaced(train=Part())
    loud = ANIMALS.replaced(train=Part(top=ANIMALS.train.top))
    for explainer, evidence, words in (
        (MaxActivating(), nothing, "fires in none of its 0"),
        (Contrastive(), loud, "no training window in which it is silent"),
        (LogitWeights(), ANIMALS, "no tokens from its weights"),
        (AttentionPairs(), ANIMALS, "no pair of tokens"),
        (TokenStatistics(), nothing, "at least 1 in each"),
    ):
        with pytest.raises(RequestError, match=words):
            explainer.explain(evidence, answering())
    with pytest.raises(RequestError, match="give it a backend"):
        MaxActivating().explain(ANIMALS, None)
    with pytest.raises(BackendError, match="'max_activating' needs chat"):
        MaxActivating().explain(ANIMALS, ScriptedBackend({}, capabilities=Capabilities(chat=False)))
    with pytest.raises(RequestError, match="did you mean 'contrastive'"):
        explainer_named("contrastiv")
    with pytest.raises(RequestError, match="0 candidates"):
        MaxActivating(n_candidates=0)


def test_every_prompt_belongs_to_something_and_has_an_example() -> None:
    from neuron_lens.explain.scorers import SCORERS

    simulators = {"simulation_text", "simulation_all_at_once", "simulation_attention_pairs"}
    known = {*EXPLAINERS, *SCORERS, *simulators, "causal_likelihood"}
    for name in prompt_names(package="neuron_lens.explain"):
        assert name in known
        template = prompt_named(name).template
        read = ("surprisal", "simulation_all_at_once", "causal_likelihood")
        assert "[assistant]" in template or name in read


@pytest.mark.parametrize("name", ["animals", "digits", "bank", "after_the", "doubled", "commas"])
def test_token_statistics_find_the_planted_words_offline(name: str) -> None:
    evidence = puzzle_named(name).evidence()
    (found,) = TokenStatistics().explain(evidence)
    assert found.sentence is not None and found.predicate is not None and found.prompt == found.backend == ""
    fired = {
        token.strip()
        for window in evidence.train.windows
        for token, value in zip(window.tokens, window.activations, strict=True)
        if value > evidence.firing_threshold
    }
    assert any(word in found.sentence for word in {*fired, " the'", "digits", "punctuation"})
    judged = Detection(controls=False).plan(evidence, found.sentence, rule_judge(), seed=0)
    assert judged.calls  # its sentence is scored like any other


def _candidates(*sentences: str | None) -> list[Candidate]:
    return [
        Candidate(
            explainer="x", sentence=sentence, number=number,
            missing=None if sentence is not None else Missing(kind="refused", reason="would not"),
        )
        for number, sentence in enumerate(sentences)
    ]  # fmt: skip


def test_the_best_candidate_is_chosen_on_validation_alone() -> None:
    puzzle = puzzle_named("months")
    judge = rule_judge()
    choice = best_of(
        puzzle.evidence(), _candidates(None, *puzzle.explanations[::-1]), Detection(), judge, seed=0
    )
    assert choice.chosen.sentence == puzzle.explanation and choice.validation[0] is None
    assert {result.part for result in choice.validation if result is not None} == {"validation"}
    asked = " ".join(text for request in judge.requests for text in request.texts)
    reported = {json.dumps("".join(w.tokens)) for w in puzzle.evidence().test.windows}
    chosen_on = {json.dumps("".join(w.tokens)) for w in puzzle.evidence().validation.windows}
    assert not any(text in asked for text in reported - chosen_on)
    alone = rule_judge()
    assert (
        best_of(puzzle.evidence(), _candidates(None, "one"), Detection(), alone, seed=0).chosen.sentence
        == "one"
    )
    assert alone.calls == 0
    with pytest.raises(RequestError, match="would not"):
        best_of(puzzle.evidence(), _candidates(None), Detection(), alone, seed=0)


def test_among_explanations_that_say_nothing_the_choice_flatters_only_on_validation() -> None:
    """The largest of several chance scores is above chance where it was chosen, and at chance on test."""

    class Blind:
        name, instructed = "blind", False

        def __call__(self, texts: list[str]) -> np.ndarray:
            rng = np.random.default_rng(abs(hash(tuple(texts))))
            return rng.normal(size=(len(texts), 4))

    scorer = Embedding(embedder=Blind(), controls=False)
    validation, test = [], []
    for puzzle in puzzles()[:12]:
        candidates = _candidates(*(f"nothing {number} {puzzle.name}" for number in range(8)))
        choice = best_of(puzzle.evidence(), candidates, scorer, None, seed=1)
        validation.append(max(r.score.value or 0.0 for r in choice.validation if r is not None))
        test.append(
            scorer.score(puzzle.evidence(), choice.chosen.sentence or "", None, seed=1).score.value or 0.0
        )
    assert np.mean(validation) > 0.58
    assert abs(np.mean(test) - 0.5) < 3.5 * np.std(test) / np.sqrt(len(test))


def _pair_judge(request: Request) -> str:
    """Rates a pair 10 when the explanation says "same word" and the words are the same."""
    text = request.texts[-1]
    rows = [json.loads(line.split(": ", 1)[1]) for line in text.split("\n") if line[:1].isdigit()]
    same = [row.split("**")[1].strip() == row.split("[[")[1].split("]]")[0].strip() for row in rows]
    return json.dumps({"ratings": [10 * (s == ("same word" in text)) for s in same]})


def test_attention_pairs_tell_a_heads_explanation_from_a_false_one() -> None:
    evidence = EVIDENCE["attention_pairs"]
    backend = ScriptedBackend(_pair_judge)
    scorer = AttentionPairsScorer(n_firing=12, n_silent=12)
    true = scorer.score(evidence, "attends to the same word from its later copies", backend, seed=0)
    false = scorer.score(evidence, "attends to another word", backend, seed=0)
    assert true.score.value is not None and true.score.value > 0.9 and true.score.n == 24
    assert false.score.value is not None and false.score.value < 0.1
    assert not true.absent and len(true.quantiles) == 5
    shuffled = next(control for control in true.controls if control.name == "shuffled")
    assert shuffled.scores["auc"].value is not None and shuffled.scores["auc"].value < 0.8
    with pytest.raises(RequestError, match="no pairs of tokens"):
        scorer.plan(ANIMALS, "x", backend, seed=0)


def test_equal_calls_of_several_plans_are_made_once() -> None:
    judge = rule_judge()
    plan = Detection(controls=False).plan(ANIMALS, "names of animals", judge, seed=0)
    one, two = carry_out(judge, [plan, plan])
    assert one == two and judge.calls == len(plan.calls)


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> SourceWork:
    return worked(tmp_path_factory.mktemp("harvest"))


def test_evidence_of_a_harvested_unit_is_its_windows(harvested: SourceWork) -> None:
    explained = harvested.explained(planted.SELF)
    promoted, suppressed = harvested.output_tokens(planted.SELF)
    evidence = Evidence.of(explained, promoted=promoted, suppressed=suppressed)
    assert evidence.unit == UNITS[0] and evidence.firing_threshold == explained.firing_threshold
    for name, part in evidence.parts():
        held = explained.held.part(name)
        own = {w.identity for w in held.records(np.arange(len(held.rows)))}
        assert {w.identity for w in part.windows} == own | {w.identity for w in part.near_misses}
        assert part.top and part.random and part.strata
        sizes = [window.max_activation for window in part.top]
        assert sizes == sorted(sizes, reverse=True)
        assert part.near_misses == explained.held.near_misses(name)
    (found,) = TokenStatistics().explain(evidence)
    assert found.sentence is not None and "' self'" in found.sentence
    (named,) = LogitWeights().explain(evidence, answering("the word self"))
    assert named.sentence == "the word self"


def test_effects_of_a_changed_unit_are_what_its_weights_say(harvested: SourceWork) -> None:
    """The planted model has no norms: a neuron moves the logits along one column of the unembedding."""
    effects = UnitEffects(harvested.source, harvested.harvest.windows, harvested.explained, n_windows=3)
    texts = harvested.harvest.windows.token_texts
    for neuron, column in ((planted.SELF, 0), (planted.DIGIT, 1), (planted.AFTER_DEF, 4)):
        found = effects(Unit(layer=0, index=neuron))
        assert [one.kind for one in found] == ["steer", "ablate"] * 3
        order = np.argsort(-harvested.source.model.unembed.weight[:, column].detach().numpy())
        raised = tuple(texts[token] for token in order[:10])
        for one in found:
            assert (one.raised if one.kind == "steer" else one.lowered)[:10] == raised
            assert one.divergence is not None and one.divergence > 0
        ends = [one.text for one in found if one.kind == "ablate"]
        assert neuron != planted.SELF or all(text.endswith(" self") for text in ends)


def test_causal_scoring_tells_a_units_effects_from_those_of_others(harvested: SourceWork) -> None:
    effects = UnitEffects(harvested.source, harvested.harvest.windows, harvested.explained)
    evidence = Evidence.of(harvested.explained(planted.SELF))
    likely = {token.token for token in harvested.output_tokens(planted.SELF)[0][:4]}

    def script(request: Request) -> str:
        text = request.texts[-1]
        records = [json.loads(line.split(": ", 1)[1]) for line in text.split("\n") if line[:1].isdigit()]
        moved = [one["more likely" if one["done"] == "made stronger" else "less likely"] for one in records]
        own = [likely <= set(tokens) for tokens in moved]
        return json.dumps({"answers": own if "Description: the word self" in text else [False] * len(own)})

    scorer = Causal(effects=effects, random_units=tuple(UNITS), n_firing=12, n_silent=12)
    assert scorer.method(None) == "answers"
    result = scorer.score(evidence, "the word self", ScriptedBackend(script), seed=0, others=["digits"])
    assert result.score.value == 1.0 and result.score.n == 24
    assert (
        result.controls[0].name == "another_unit" and result.controls[0].scores[result.headline].value == 0.5
    )
    assert result.scores["precision_at_density"].value is None
    assert result.absent.keys() == {"precision_at_density"} and result.quantiles
