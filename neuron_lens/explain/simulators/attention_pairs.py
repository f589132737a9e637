"""How likely each pair of tokens is one an attention head acts on, by its explanation: a number from 0 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from neuron_lens.explain.explainers.attention_pairs import Pair, shown_pair
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import quoted_texts
from neuron_lens.explain.scorers.batches import expecting
from neuron_lens.explain.simulators.text import Level
from neuron_lens.llm import Missing, Request, StructuredRequest

__all__ = ["PairSimulator"]


class PairAnswer(BaseModel):
    """One number a pair, in order."""

    model_config = ConfigDict(extra="forbid")
    ratings: list[Level]


@dataclass(frozen=True)
class PairSimulator:
    """`batch` pairs a call; any chat model can."""

    name: ClassVar[str] = "simulation_attention_pairs"
    needs: ClassVar[tuple[str, ...]] = ("chat",)
    batch: int = 5

    @property
    def prompt(self) -> str:
        """The version of its prompt."""
        return prompt_named(self.name).version

    def plan(self, explanation: str, pairs: Sequence[Pair]) -> Plan[list[float | None]]:
        """The calls, and the rating of each pair they give; None where it is missing."""
        prompt = prompt_named(self.name)
        batches = [pairs[begin : begin + self.batch] for begin in range(0, len(pairs), self.batch)]
        calls = tuple(
            StructuredRequest(
                request=Request(
                    messages=prompt.messages(
                        explanation=explanation, texts=quoted_texts(shown_pair(pair) for pair in some)
                    ),
                    max_tokens=64 + 8 * len(some),
                    prompt_version=prompt.version,
                ),
                shape=PairAnswer,
                check=expecting(len(some), "ratings"),
                name="ratings",
            )
            for some in batches
        )

        def read(answers: Sequence[Answer]) -> list[float | None]:
            ratings: list[float | None] = []
            for some, answer in zip(batches, answers, strict=True):
                missing = isinstance(answer, Missing)
                ratings += [None] * len(some) if missing else [float(level) for level in answer.ratings]
            return ratings

        return Plan(calls, read)
