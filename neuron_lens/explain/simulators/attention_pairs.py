"""How likely each pair of tokens is one an attention head acts on, by its explanation: a number from 0 to 10."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from neuron_lens.explain.explainers.attention_pairs import Pair, shown_pair
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import quoted_texts
from neuron_lens.explain.scorers.batches import ask_in_batches
from neuron_lens.explain.simulators.text import Level

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
        return ask_in_batches(
            prompt_named(self.name),
            [shown_pair(pair) for pair in pairs],
            self.batch,
            lambda texts: {"explanation": explanation, "texts": quoted_texts(texts)},
            PairAnswer,
            "ratings",
        )
