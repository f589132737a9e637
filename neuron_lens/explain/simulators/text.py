"""Simulation by text: a judge writes one number a token, as JSON. Any chat model can; a wrong length is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import LEVELS
from neuron_lens.explain.simulators.base import Simulated
from neuron_lens.llm import Missing, Request, StructuredRequest
from neuron_lens.records import TokenWindow

__all__ = ["Level", "TextSimulator"]

Level = Annotated[int, Field(ge=0, le=LEVELS)]


class SimulationAnswer(BaseModel):
    """One number a token."""

    model_config = ConfigDict(extra="forbid")
    activations: list[Level]


@dataclass(frozen=True)
class TextSimulator:
    """One call a window."""

    name: ClassVar[str] = "simulation_text"
    needs: ClassVar[tuple[str, ...]] = ("chat",)

    @property
    def prompt(self) -> str:
        """The version of its prompt."""
        return prompt_named(self.name).version

    def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
        """See `Simulator.plan`."""
        prompt = prompt_named(self.name)
        calls = tuple(
            StructuredRequest(
                request=Request(
                    messages=prompt.messages(
                        explanation=explanation,
                        count=len(window.tokens),
                        tokens=json.dumps(window.tokens, ensure_ascii=False),
                    ),
                    max_tokens=64 + 8 * len(window.tokens),
                    prompt_version=prompt.version,
                ),
                shape=SimulationAnswer,
                lengths={"activations": len(window.tokens)},
                name="activations",
            )
            for window in windows
        )

        def read(answers: Sequence[Answer]) -> list[Simulated]:
            return [
                (None,) * len(window.tokens)
                if isinstance(answer, Missing)
                else tuple(float(level) for level in answer.activations)
                for window, answer in zip(windows, answers, strict=True)
            ]

        return Plan(calls, read)
