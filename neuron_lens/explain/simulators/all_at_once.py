"""Simulation in one reading: the text with "unknown" for every activation, and what the model expected instead.

OpenAI's trick (automated-interpretability, 2023): after examples in which "unknown" turns into numbers, the model's
log-probabilities at each "unknown" say what number it would have written. The prediction is the expectation over the
numbers among the likeliest tokens: sum k p(k) / sum p(k), k from 0 to 10.

Where a tokenizer has no token for "10" the scale ends at 9, and where it joins the tab and the word no number can stand
at the slot: such tokens are missing, as are those with no number among the likeliest. (The original gives both a 0.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import LEVELS, visible
from neuron_lens.explain.simulators.base import Simulated
from neuron_lens.llm import Missing, Request, Response, TokenLogprobs
from neuron_lens.records import TokenWindow

__all__ = ["AllAtOnceSimulator", "expected_level"]

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class AllAtOnceSimulator:
    """One call a window, nothing written. `alternatives`: how many of the likeliest tokens are looked at."""

    name: ClassVar[str] = "simulation_all_at_once"
    needs: ClassVar[tuple[str, ...]] = ("completion", "prompt_logprobs")
    alternatives: int = 15

    @property
    def prompt(self) -> str:
        """The version of its prompt."""
        return prompt_named(self.name).version

    def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
        """See `Simulator.plan`."""
        prompt = prompt_named(self.name)
        rows = [[f"{visible(token)}\t{_UNKNOWN}" for token in window.tokens] for window in windows]
        tables = ["\n".join(["<start>", *lines, "<end>"]) for lines in rows]
        calls = tuple(
            Request(
                prompt=prompt.render(explanation=explanation, activations=table),
                max_tokens=0,
                prompt_logprobs=self.alternatives,
                prompt_version=prompt.version,
            )
            for table in tables
        )

        def read(answers: Sequence[Answer]) -> list[Simulated]:
            return [
                _read(answer, table, _slots(lines))
                for answer, table, lines in zip(answers, tables, rows, strict=True)
            ]

        return Plan(calls, read)


def _slots(lines: list[str]) -> list[int]:
    """Where each "unknown" of the table begins, in characters from the table's begin."""
    slots, at = [], len("<start>\n")
    for line in lines:
        slots.append(at + len(line) - len(_UNKNOWN))
        at += len(line) + 1
    return slots


def _read(answer: Response | Missing, table: str, slots: list[int]) -> Simulated:
    """The table is found at the end of the prompt: before it there may be tokens of the model's own."""
    nothing: Simulated = (None,) * len(slots)
    if isinstance(answer, Missing) or answer.prompt_tokens is None:
        return nothing
    whole = "".join(token.token for token in answer.prompt_tokens)
    if not whole.endswith(table):
        return nothing  # a tokenizer that rewrites the text leaves no slot to be found
    begins: dict[int, TokenLogprobs] = {}
    at = len(table) - len(whole)
    for token in answer.prompt_tokens:
        begins[at] = token
        at += len(token.token)
    return tuple(expected_level(begins.get(slot)) for slot in slots)


def expected_level(token: TokenLogprobs | None) -> float | None:
    """The expected number at a slot; None when no token begins there or none of the likeliest is a number."""
    if token is None:
        return None
    numbers = {str(level): level for level in range(LEVELS + 1)}
    found = [(numbers[one.token], math.exp(one.logprob)) for one in token.top if one.token in numbers]
    total = sum(probability for _, probability in found)
    return sum(level * probability for level, probability in found) / total if total > 0 else None
