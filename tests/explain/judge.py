"""A judge that applies the rule an explanation names, and guesses (by a hash) where it names none."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.evidence import PartName
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.puzzles import Rule, puzzles, tokens_of
from neuron_lens.explain.scorers import Continuation, Effect
from neuron_lens.llm import Request, Response, ScriptedBackend, TokenLogprob, TokenLogprobs, prompt_names
from neuron_lens.records import Unit

# The first words a model reads, and which prompt they begin.
_KINDS = {
    prompt.messages(**dict.fromkeys(prompt.slots, "x"))[0].content[:300]: name
    for name in prompt_names(package="neuron_lens.explain")
    if (prompt := prompt_named(name)).template.startswith("[system]")
} | {
    prompt_named(name).template[:300].split("{{")[0]: name
    for name in ("surprisal", "simulation_all_at_once", "causal_likelihood")
}

RULES: dict[str, Rule] = {puzzle.explanation: puzzle.rule for puzzle in puzzles()}


def kind_of(request: Request) -> str:
    """The name of the prompt a request was made with."""
    head = request.texts[0]
    return next(name for words, name in _KINDS.items() if head.startswith(words))


def guess(*what: object) -> float:
    """A number from 0 to 1 that depends on nothing but what is asked."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass(frozen=True)
class RuleJudge:
    """Answers every prompt of the package, told apart by their words. `salt` makes other guesses; `error` is the share
    of rule applications that come out wrong."""

    salt: int = 0
    error: float = 0.0

    def __call__(self, request: Request) -> str | Response:
        answer: str | Response = getattr(self, kind_of(request))(request)
        return answer

    def detection(self, request: Request) -> str:
        rule, texts, asked = _parts(request)
        return _answers(self._holds(rule, asked, text) for text in texts)

    def fuzzing(self, request: Request) -> str:
        rule, texts, asked = _parts(request)
        marks = re.search(r"The marks are (\S+) and (\S+)\.", request.texts[-1])
        assert marks is not None
        return _answers(
            _right_marks(text, rule, marks[1], marks[2]) != self._errs(text)
            if rule
            else self._guess(asked, text) > 0.5
            for text in texts
        )

    def graded_detection(self, request: Request) -> Response:
        rule, text, asked = _single(request)
        fits = self._holds(rule, asked, text)
        return _sure(fits if rule else None, self._guess(asked, text, "sure"))

    def graded_fuzzing(self, request: Request) -> Response:
        rule, text, asked = _single(request)
        marks = re.search(r"The marks are (\S+) and (\S+)\.", request.texts[-1])
        assert marks is not None
        fits = _right_marks(text, rule, marks[1], marks[2]) != self._errs(text) if rule else None
        return _sure(fits, self._guess(asked, text, "sure"))

    def intruder(self, request: Request) -> str:
        rule, texts, asked = _parts(request)
        silent = [
            number for number, text in enumerate(texts, 1) if rule and not self._holds(rule, asked, text)
        ]
        choices = silent or list(range(1, len(texts) + 1))
        return json.dumps({"intruder": choices[int(self._guess(asked, texts) * len(choices))]})

    def causal(self, request: Request) -> str:
        rule, _, asked = _parts(request)
        records = [json.loads(line) for line in re.findall(r"^\d+: (\{.*)$", request.texts[-1], re.MULTILINE)]
        return _answers(self._holds(rule, asked, one["text"]) for one in records)

    def simulation_text(self, request: Request) -> str:
        rule, _, asked = _parts(request)
        tokens = json.loads(request.texts[-1].split("): ", 1)[1])
        return json.dumps({"activations": self._levels(rule, asked, tokens)})

    def simulation_all_at_once(self, request: Request) -> Response:
        assert request.prompt is not None
        asked = request.prompt.rsplit("Description: ", 1)[1].split("\n")[0]
        table = request.prompt.rsplit("<start>\n", 1)[1].removesuffix("\n<end>")
        tokens = [line.removesuffix("\tunknown") for line in table.split("\n")]
        levels = iter(self._levels(RULES.get(asked), asked, tokens))
        pieces = re.findall(r"unknown|\w+|\s|[^\w\s]", request.prompt)
        before = len(pieces) - len(re.findall(r"unknown|\w+|\s|[^\w\s]", table + "\n<end>"))
        prompt_tokens = tuple(
            _about(piece, next(levels) if piece == "unknown" and place >= before else None)
            for place, piece in enumerate(pieces)
        )
        return Response(text="", prompt_tokens=prompt_tokens)

    def surprisal(self, request: Request) -> Response:
        assert request.prompt is not None
        head, text = request.prompt.rsplit("\n\nText: ", 1)
        asked = head.rsplit("Property: ", 1)[1]
        rule = RULES.get(asked)
        fits = self._holds(rule, asked, text) if rule else False
        logprob = -3.0 + 0.5 * fits + 0.2 * self._guess(asked, text)
        tokens = tokens_of(request.prompt)
        return Response(
            text="", prompt_tokens=tuple(TokenLogprobs(token=token, logprob=logprob) for token in tokens)
        )

    def causal_likelihood(self, request: Request) -> Response:
        """A description is likelier after text that its rule fires in; all else is a guess."""
        assert request.prompt is not None
        head, asked = request.prompt.rsplit("\nDescription: ", 1)
        written = json.loads(head.rsplit("\nIt wrote: ", 1)[1])
        rule = RULES.get(asked)
        fits = self._holds(rule, asked, written) if rule else False
        logprob = -3.0 + 0.5 * fits + 0.4 * self._guess(asked, written)
        before = TokenLogprobs(token=request.prompt.removesuffix(asked), logprob=None)
        tokens = [TokenLogprobs(token=token, logprob=logprob) for token in tokens_of(asked)]
        return Response(text="", prompt_tokens=(before, *tokens))

    def _levels(self, rule: Rule | None, asked: str, tokens: Sequence[str]) -> list[int]:
        if rule is None:
            return [math.floor(11 * self._guess(asked, place, *tokens)) for place in range(len(tokens))]
        fired = rule.fires(tokens)
        return [8 * (fires != self._errs(place, *tokens)) for place, fires in enumerate(fired)]

    def _holds(self, rule: Rule | None, asked: str, text: str) -> bool:
        if rule is None:
            return self._guess(asked, text) > 0.5
        return any(rule.fires(tokens_of(text))) != self._errs(asked, text)

    def _errs(self, *what: object) -> bool:
        return self.error > 0 and self._guess("error", *what) < self.error

    def _guess(self, *what: object) -> float:
        return guess(self.salt, *what)


def rule_judge(salt: int = 0, error: float = 0.0, **options: Any) -> ScriptedBackend:
    """The judge as a backend."""
    return ScriptedBackend(RuleJudge(salt, error), name=f"rules {salt} {error}", **options)


class RuleEmbedder:
    """One direction a rule: a text points along those that fire in it, an explanation along its own."""

    name = "rules"
    instructed = False

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float64]:
        return np.array([_direction(text) for text in texts])


@lru_cache(maxsize=4096)
def _direction(text: str) -> tuple[float, ...]:
    if text in RULES:
        return tuple(float(sentence == text) for sentence in RULES)
    return tuple(float(any(rule.fires(tokens_of(text)))) for rule in RULES.values())


@lru_cache(maxsize=64)
def planted_effects(unit: Unit, part: PartName = "test") -> list[Effect]:
    """What steering a puzzle's unit would do: its own tokens become likelier."""
    puzzle = puzzles()[unit.index]
    evidence = puzzle.evidence()
    windows = evidence.part(part)
    return [
        Effect(
            kind="steer" if number % 2 else "ablate",
            text="".join(window.tokens),
            raised=tuple(
                token
                for token, fires in zip(window.tokens, puzzle.rule.fires(window.tokens), strict=True)
                if fires
            ),
            lowered=(),
        )
        for number, window in enumerate(windows.firing(evidence.firing_threshold)[:25])
    ]


@lru_cache(maxsize=256)
def planted_continuations(unit: Unit, part: PartName, count: int) -> list[Continuation]:
    """What a model steered with a puzzle's unit would write: a text the unit fires in, and one it is silent in else."""
    puzzle = puzzles()[unit.index]
    evidence, windows = puzzle.evidence(), puzzle.evidence().part(part)
    loud, quiet = (f(evidence.firing_threshold) for f in (windows.firing, windows.silent))
    return [
        Continuation(
            text=f"Text {place}.", intact="".join(a.tokens), steered="".join(b.tokens), divergence=0.5
        )
        for place, (a, b) in enumerate(zip(quiet[-count:], loud[-count:], strict=True))
    ]


def _parts(request: Request) -> tuple[Rule | None, list[str], str]:
    text = request.texts[-1]
    found = re.search(r"^Description: (.*)$", text, re.MULTILINE)
    assert found is not None
    texts = [json.loads(line) for line in re.findall(r'^\d+: (".*")$', text, re.MULTILINE)]
    return RULES.get(found[1]), texts, found[1]


def _single(request: Request) -> tuple[Rule | None, str, str]:
    text = request.texts[-1]
    asked = re.search(r"^Description: (.*)$", text, re.MULTILINE)
    quoted = re.search(r'^Text: (".*")$', text, re.MULTILINE)
    assert asked is not None and quoted is not None
    return RULES.get(asked[1]), json.loads(quoted[1]), asked[1]


def _sure(fits: bool | None, guessed: float) -> Response:
    """Says yes to everything, and is surer where it should be; where it knows nothing it guesses."""
    yes = guessed if fits is None else 0.6 + 0.3 * fits + 0.05 * guessed
    shares = {"Yes": 0.7 * yes, " yes": 0.2 * yes, "No": 0.9 * (1 - yes), "Well": 0.1}
    top = tuple(
        TokenLogprob(token=word, logprob=math.log(max(share, 1e-9))) for word, share in shares.items()
    )
    first = TokenLogprobs(token="Yes", logprob=top[0].logprob, top=top)
    return Response(text="Yes", finish_reason="length", tokens=(first,))


def _right_marks(text: str, rule: Rule, begin: str, end: str) -> bool:
    parts = re.split(f"({re.escape(begin)}|{re.escape(end)})", text)
    tokens: list[str] = []
    said: list[bool] = []
    inside = False
    for part in parts:
        if part in (begin, end):
            inside = part == begin
            continue
        found = tokens_of(part)
        tokens += found
        said += [inside] * len(found)
    return rule.fires(tokens) == said


def _answers(values: Any) -> str:
    return json.dumps({"answers": [bool(value) for value in values]})


@lru_cache(maxsize=4096)
def _about(piece: str, level: int | None) -> TokenLogprobs:
    """A token whose likeliest alternatives are numbers around `level`."""
    if level is None:
        return TokenLogprobs(token=piece, logprob=-1.0)
    near = {level: 0.8, max(level - 1, 0): 0.1, min(level + 1, 10): 0.05}
    top = [TokenLogprob(token=str(value), logprob=math.log(share)) for value, share in near.items()]
    return TokenLogprobs(token=piece, logprob=-5.0, top=(*top, TokenLogprob(token=piece, logprob=-5.0)))
