"""Units with known meaning, to try judges, explainers and scorers on: a rule over made-up text, and its evidence.

Every puzzle has a true explanation and some false ones, which are true of other puzzles and fit some of the same texts.
A scorer with a judge worth its price ranks the true one above the false ones:

    for puzzle in puzzles():
        scores = [detection.score(puzzle.evidence(), one, judge, seed=0) for one in puzzle.explanations]

The idea, units with true and false labels as a test of scorers, is that of OpenAI's neuron-explainer; rules, texts and
words are our own (`puzzle_files/puzzles.json`).
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.evidence import PARTS, Evidence, Part, strata_of
from neuron_lens.records import Histogram, TokenWindow, Unit, UnitStatistics

__all__ = ["Puzzle", "Rule", "puzzle_named", "puzzles", "tokens_of"]

_THRESHOLD = 1.0  # a planted unit is at most 0.3 where it is silent and 3 to 10 where it fires
_QUIET, _FIRING = 0.3, (3.0, 10.0)
_TOP, _NEAR_MISSES, _SAMPLE = 8, 12, 0.6
_WINDOWS = {"train": 120, "validation": 160, "test": 320}
_TOKENS = re.compile(r" ?\w+|[^\w\s]|\s")


@dataclass(frozen=True)
class Rule:
    """A rule over text. `sentence` says it in words; it fires at what `pattern` finds (its group "fires", if any)."""

    name: str
    sentence: str
    pattern: str

    def fires(self, tokens: Sequence[str]) -> list[bool]:
        """Whether the rule fires at each token."""
        text = "".join(tokens)
        group = "fires" if "?P<fires>" in self.pattern else 0
        spans = [match.span(group) for match in re.finditer(self.pattern, text)]
        ends = list(accumulate(map(len, tokens)))
        # A token's leading space is not what the rule speaks of.
        starts = [end - len(token.lstrip(" ")) for end, token in zip(ends, tokens, strict=True)]
        return [
            any(begin < stop and start < end for start, stop in spans)
            for begin, end in zip(starts, ends, strict=True)
        ]


@dataclass(frozen=True)
class Puzzle:
    """A planted unit: its rule, and explanations that are not true of it."""

    index: int
    rule: Rule
    false_rules: tuple[Rule, ...]

    @property
    def name(self) -> str:
        """The rule's name."""
        return self.rule.name

    @property
    def explanation(self) -> str:
        """The true explanation."""
        return self.rule.sentence

    @property
    def false_explanations(self) -> tuple[str, ...]:
        """Explanations that are not true of it; each is true of another puzzle."""
        return tuple(rule.sentence for rule in self.false_rules)

    @property
    def explanations(self) -> tuple[str, ...]:
        """The true one first."""
        return (self.explanation, *self.false_explanations)

    def evidence(self, seed: int = 0) -> Evidence:
        """The unit on made-up text; near misses are windows that hold what a false explanation speaks of."""
        return _evidence(self, seed)


@lru_cache(maxsize=1)
def puzzles() -> tuple[Puzzle, ...]:
    """All puzzles, in the order of the file."""
    data = _data()
    rules = {
        one["name"]: Rule(one["name"], one["sentence"], _pattern(one, data["words"])) for one in data["rules"]
    }
    return tuple(
        Puzzle(index, rules[one["name"]], tuple(rules[name] for name in one["false"]))
        for index, one in enumerate(data["rules"])
    )


def puzzle_named(name: str) -> Puzzle:
    """The puzzle of that name. Raises RequestError for one there is not."""
    found = {puzzle.name: puzzle for puzzle in puzzles()}
    if name not in found:
        raise RequestError(f"there is no puzzle {name!r}; {did_you_mean(name, found)}")
    return found[name]


def tokens_of(text: str) -> tuple[str, ...]:
    """The tokens of a puzzle's text: words with the space before them, and single signs."""
    return tuple(_TOKENS.findall(text))


def _data() -> dict[str, Any]:
    file = importlib.resources.files("neuron_lens.explain") / "puzzle_files" / "puzzles.json"
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def _pattern(rule: dict[str, Any], words: dict[str, list[str]]) -> str:
    pattern: str = rule.get("pattern") or rf"(?i)\b(?:{'|'.join(words[rule['words']])})\b"
    return pattern


@lru_cache(maxsize=4)
def _sentences(seed: int) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The tokens of every window, by part: each a sentence that is nowhere else, drawn alike for all puzzles."""
    data = _data()
    rng = np.random.default_rng(seed)

    def filled(frame: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda slot: str(rng.choice(data["words"][slot[1]])), frame)

    texts: dict[str, None] = {}
    for place in range(sum(_WINDOWS.values())):
        frame = data["frames"][place % len(data["frames"])]
        while (text := filled(frame)) in texts:
            pass  # every frame has far more fillings than are drawn of it
        texts[text] = None
    drawn = iter([list(texts)[index] for index in rng.permutation(len(texts))])
    return {part: tuple(tokens_of(next(drawn)) for _ in range(_WINDOWS[part])) for part in PARTS}


@lru_cache(maxsize=128)
def _evidence(puzzle: Puzzle, seed: int) -> Evidence:
    rng = np.random.default_rng([seed, puzzle.index])
    parts: dict[str, Part] = {}
    values: list[float] = []
    for document, (name, sentences) in enumerate(_sentences(seed).items()):
        windows, start = [], 0
        for tokens in sentences:
            fires = puzzle.rule.fires(tokens)
            level = float(rng.uniform(*_FIRING))
            activations = tuple(
                round(
                    min(level * float(rng.uniform(0.8, 1.0)), 10.0)
                    if fired
                    else float(rng.uniform(0, _QUIET)),
                    4,
                )
                for fired in fires
            )
            windows.append(
                TokenWindow(
                    document=f"puzzle {name}", document_index=document, start=start, character_start=start,
                    context_position=0, tokens=tokens, ids=(0,) * len(tokens), activations=activations,
                )
            )  # fmt: skip
            start += len(tokens)
            values += activations
        parts[name] = _part(puzzle, windows)
    unit = Unit(kind="latent", layer=0, index=puzzle.index, site="puzzle")
    return Evidence(unit=unit, statistics=_statistics(np.array(values)), **parts)


def _part(puzzle: Puzzle, windows: list[TokenWindow]) -> Part:
    firing = [window for window in windows if window.max_activation > _THRESHOLD]
    silent = [window for window in windows if window.max_activation <= _THRESHOLD]
    near = [window for window in silent if any(any(rule.fires(window.tokens)) for rule in puzzle.false_rules)]
    return Part(
        top=tuple(sorted(firing, key=lambda window: -window.max_activation)[:_TOP]),
        random=tuple(windows[: int(_SAMPLE * len(windows))]),
        near_misses=tuple(near[-_NEAR_MISSES:]),
        strata=strata_of(tuple(firing), _THRESHOLD),
    )


def _statistics(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> UnitStatistics:
    mean, deviation = float(values.mean()), float(values.std())
    standardised = (values - mean) / deviation
    counts, edges = np.histogram(values, bins=20)
    return UnitStatistics(
        n_tokens=len(values), mean=mean, variance=deviation**2,
        skewness=float((standardised**3).mean()), kurtosis=float((standardised**4).mean()),
        minimum=float(values.min()), maximum=float(values.max()), firing_threshold=_THRESHOLD,
        density=float((values > _THRESHOLD).mean()),
        histogram=Histogram(edges=tuple(map(float, edges)), counts=tuple(map(int, counts))),
    )  # fmt: skip
