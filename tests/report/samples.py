"""Made-up but plausible results: a neuron that follows `self`, over a few lines of Python."""

from __future__ import annotations

import random
import re

from neuron_lens.explain.result import (
    AblationEffect,
    Baseline,
    CandidateScore,
    CausalEffect,
    Control,
    Explanation,
    ModelFacts,
    Predicate,
    QuantileScore,
    RunFacts,
    Score,
    ScoredWindow,
    ScorerControl,
    ScorerResult,
    SimilarUnit,
    SplitCounts,
    Table,
    TableEntry,
    TokenValue,
    UnitResult,
)
from neuron_lens.records import Histogram, QuantileStratum, TokenWindow, Unit, UnitStatistics

TEXT = '''
class Queue:
    """A first-in, first-out queue; `put` blocks when it is full <maxsize & more>."""

    def __init__(self, maxsize=0):
        self.maxsize = maxsize
        self._init(maxsize)
\tif self.maxsize > 0:
            self.not_full = threading.Condition(self.mutex)

    def task_done(self):
        with self.all_tasks_done:
            unfinished = self.unfinished_tasks - 1
            if unfinished <= 0:
                if unfinished < 0:
                    raise ValueError('task_done() called too many times')
                self.all_tasks_done.notify_all()
            self.unfinished_tasks = unfinished

    def qsize(self):
        """Return the approximate size of the queue (not reliable!)."""
        with self.mutex:
            return self._qsize()
'''

MODEL = ModelFacts(name="pico", n_layers=4, d_model=256, d_mlp=1024, fingerprint="3f9a51c7d2e8")
RUN = RunFacts(
    package_version="0.1.0",
    corpus="model_defs/pico/sample",
    corpus_fingerprint="b71e06aa90c4",
    n_documents=64,
    n_tokens=262_144,
    n_unlexed_documents=1,
    window_length=64,
    row_length=512,
    seed=0,
)


def split(text: str) -> list[str]:
    """Tokens like those of a byte-level BPE: indentation after a newline stays with the newline."""
    return re.findall(r"\n[ ]*|\t+|[ ]?[A-Za-z_]+|[ ]?[0-9]+|[ ]?[^\sA-Za-z0-9_]{1,2}|[ ]+", text)


def window(seed: int, *, length: int = 56, tokens: list[str] | None = None, gain: float = 6.5) -> TokenWindow:
    """A window of the text in which "self" sets the unit off."""
    generator = random.Random(seed)
    all_tokens = split(TEXT)
    start = generator.randrange(0, len(all_tokens) - length)
    chosen = tokens if tokens is not None else all_tokens[start : start + length]

    def activation(token: str) -> float:
        if "self" in token:
            return gain * generator.uniform(0.6, 1.0)
        return gain * 0.3 * generator.random() if token.startswith("._") else generator.gauss(-0.12, 0.05)

    return TokenWindow(
        document=f"Lib/queue_{seed % 7}.py",
        document_index=seed,
        start=start,
        character_start=4 * start,
        context_position=start % 512,
        tokens=tuple(chosen),
        ids=tuple(range(len(chosen))),
        activations=tuple(activation(token) for token in chosen),
        preceding=tuple(all_tokens[max(0, start - 6) : start]) if tokens is None else (),
    )


def score(value: float | None, spread: float = 0.04, n: int = 7680) -> Score:
    """A score with a symmetric interval; None for one that could not be computed."""
    if value is None:
        return Score(value=None, low=None, high=None, n=0, n_windows=0, coverage=0.0)
    return Score(value=value, low=value - spread, high=value + spread, n=n, n_windows=n // 64, coverage=0.97)


def scores(level: float | None, seed: int = 0) -> dict[str, Score]:
    """All four scores of a prediction as good as `level` (a correlation)."""
    if level is None:
        return {"correlation": score(None), "detection_auc": score(None)}
    wobble = random.Random(seed).uniform(-0.03, 0.03)
    return {
        "correlation": score(level),
        "correlation_random": score(level * 0.9 + wobble, 0.07, 2560),
        "detection_accuracy": score(0.5 + 0.45 * abs(level) + wobble, 0.03),
        "detection_auc": score(min(0.97, 0.52 + 0.46 * abs(level)), 0.02),
    }


def scored(seed: int, stratum: str, *, missing: bool = False, gain: float = 6.5) -> ScoredWindow:
    """A test window with what the explanation predicts: a little less than the truth, and blind to `._`."""
    shown = window(seed, gain=gain)
    predicted = tuple(5.2 if "self" in token else 0.0 for token in shown.tokens)
    return ScoredWindow.model_validate(
        {"window": shown, "simulated": None if missing else predicted, "stratum": stratum}
    )


def token_values(words: str, first: float, step: float) -> tuple[TokenValue, ...]:
    """The words, each with a figure `step` further from `first`."""
    return tuple(
        TokenValue(token=word.replace("_", " "), id=place, value=first + step * place)
        for place, word in enumerate(words.split())
    )


def statistics() -> UnitStatistics:
    """Figures of a unit that is silent nearly always."""
    edges = tuple(round(-0.5 + 0.15 * place, 3) for place in range(51))
    tail = [int(9000 * 0.9**place) + 200 * (30 < place < 42) for place in range(45)]
    counts = (40, 3100, 90_000, 82_000, 20_000, *tail)
    return UnitStatistics(
        n_tokens=262_144, mean=0.082, variance=0.61, skewness=6.1, kurtosis=44.8, minimum=-0.17, maximum=6.91,
        firing_threshold=1.0, density=0.0312, histogram=Histogram(edges=edges, counts=counts),
    )  # fmt: skip


def ablation(change: float | None) -> AblationEffect:
    """What replacing the unit did to the loss, by `change` nats."""
    return AblationEffect(
        n_positions=512,
        loss_intact=1.932,
        loss_ablated=None if change is None else 1.932 + change,
        loss_change=score(change, 0.004, 512),
        divergence=None if change is None else 0.2 * abs(change),
        raised=token_values(", ) : _other", 0.09, -0.013),
        lowered=token_values("._ . .__ ._init", -0.21, 0.04),
    )


def predicate() -> Predicate:
    """Two tables of effects."""
    entries = (("self", 4.7, 3120), (" self", 4.4, 2980), ("cls", 1.9, 214), ("\n        ", -0.2, 9000))
    tokens = tuple(TableEntry(key=key, value=value, n=n) for key, value, n in entries)
    classes = (TableEntry(key="name", value=0.3, n=70_000), TableEntry(key="operator", value=-0.1, n=60_000))
    return Predicate(
        base=0.05,
        floor=-0.17,
        tables=(
            Table(feature="token", title="the token", entries=tokens, share=0.71),
            Table(feature="lexical_class", title="the lexical class", entries=classes, share=0.02),
        ),
    )


def unit_result(
    index: int = 17,
    *,
    layer: int = 2,
    level: float | None = 0.83,
    control: float | None = 0.04,
    sentence: str = "Fires on the token `self` (and ` self`), mostly as the first argument of a method.",
    causal: bool = True,
    small: bool = False,
) -> UnitResult:
    """One unit, explained as well as `level`; `small` keeps few windows, for reports of many units."""
    many = 1 if small else 9
    seed = 1000 * layer + index
    test = [scored(seed + place, "top") for place in range(many)]
    test += [scored(seed + 20 + place, "quantile", gain=1.0 + place) for place in range(many)]
    test += [scored(seed + 40 + place, "random", missing=place == 2, gain=0.4) for place in range(many)]
    strata = [
        QuantileStratum(
            index=place,
            low=1.6 * place,
            high=1.6 * (place + 1),
            windows=tuple(window(seed + 60 + place + n, gain=1.6 * (place + 1)) for n in range(many // 2)),
        )
        for place in range(4)
    ]  # fmt: skip
    return UnitResult(
        model=MODEL,
        run=RUN,
        unit=Unit(layer=layer, index=index),
        explanation=Explanation(explainer="token_statistics", sentence=sentence, predicate=predicate()),
        statistics=statistics(),
        scores=scores(level, seed),
        controls=(
            Control(name="another_unit", description="the explanation of another unit of the same layer",
                    sentence="Fires on digits inside a number.", scores=scores(control, seed + 1)),
            Control(name="shuffled", description="this explanation's predictions, dealt to other windows",
                    sentence=None, scores=scores(-0.01, seed + 2)),
        ),
        splits=SplitCounts(train=160, validation=80, test=120),
        train_top=tuple(window(seed + 80 + place) for place in range(many)),
        strata=tuple(strata),
        test_windows=tuple(test),
        promoted=token_values("._ . _is .__ _.", 1.42, -0.11),
        suppressed=token_values("_self self \n\n ) _=", -1.05, 0.12),
        reads=token_values("_self _cls _this", 2.31, -0.2),
        causal=CausalEffect(
            replaced_by="mean", value=0.082, where_firing=ablation(0.031), where_silent=ablation(0.0004)
        ) if causal else None,
    )  # fmt: skip


def many_results(count: int) -> list[UnitResult]:
    """A run of `count` units, explained more and less well."""
    generator = random.Random(7)
    words = [
        "`self`",
        "digits",
        "a token after `def`",
        "closing brackets",
        "words in docstrings",
        "`import` lines",
    ]
    results = []
    for index in range(count):
        level = None if index % 97 == 5 else min(0.97, max(-0.1, generator.betavariate(2.2, 2.0)))
        results.append(
            unit_result(
                index,
                layer=1 + index % 2,
                level=level,
                control=generator.gauss(0.02, 0.05),
                sentence=f"Fires on {generator.choice(words)}, mostly at the start of a line.",
                causal=index % 3 > 0,
                small=True,
            )
        )
    return results


def judged(name: str, level: float | None, control: float | None = 0.5, chance: float = 0.5) -> ScorerResult:
    """What a scorer says of an explanation as good as `level`."""
    figure = "ev_correlation_score" if name == "simulation" else "balanced_accuracy"
    return ScorerResult(
        scorer=name,
        part="test",
        explanation="the word self",
        headline=figure,
        chance=chance,
        scores={figure: score(level, n=50), "precision_at_density": score(None)},
        controls=(
            ScorerControl(name="another_unit", sentence="digits", scores={figure: score(control, n=50)}),
            ScorerControl(name="shuffled", sentence=None, scores={figure: score(chance, n=50)}),
        ),
        quantiles=(QuantileScore(index=0, low=1.0, high=2.0, score=score(level, n=10)),),
        prompt=f"{name}@0123456789ab",
        backend="openai words",
        calls=10,
        missing={"refused": 1},
        notes=("levels were compared with activations",),
    )


def judged_result(index: int = 17, *, level: float | None = 0.9, simulated: bool = True) -> UnitResult:
    """A unit explained and scored by a judge, in place of token statistics."""
    plain = unit_result(index, small=True)
    windows = plain.test_windows
    windows = (*windows[:-1], windows[-1].model_copy(update={"simulated": None}))
    if not simulated:
        windows = tuple(window.model_copy(update={"simulated": None}) for window in windows)
    return plain.model_copy(
        update={
            "explanation": Explanation(
                explainer="max_activating",
                sentence="the word `self` in methods",
                prompt="max_activating@0123456789ab",
                backend="openai words",
                another="digits",
                chosen_by="detection",
                candidates=(
                    CandidateScore(
                        sentence="the word `self` in methods", chosen=True, validation=score(0.9, n=50)
                    ),
                    CandidateScore(sentence=None, missing="it was refused"),
                ),
            ),
            "scores": {},
            "controls": (),
            "baseline": Baseline(explanation=plain.explanation, scores=plain.scores, controls=plain.controls),
            "judged": (judged("detection", level), judged("simulation", level, 0.0, 0.0)),
            "unscored": {"attention_pairs": "no pairs of tokens"},
            "similar": (SimilarUnit(unit=Unit(layer=2, index=3), pearson=0.4, jaccard=0.2, cosine=-0.1),),
            "test_windows": windows,
        }
    )
