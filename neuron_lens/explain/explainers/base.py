"""What an explainer is: evidence in, candidates out. A candidate that could not be had says why, and is no text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.plan import Answer, Plan, carry_out
from neuron_lens.explain.result import Predicate
from neuron_lens.llm import Backend, Missing, Prompt, Request, StructuredRequest, load_prompt, require
from neuron_lens.records import Record, TokenWindow

__all__ = ["Candidate", "Explainer", "JudgeExplainer", "described", "most_active", "prompt_named"]

_LONGEST = 600  # characters of an explanation; more is no summary


class Candidate(Record):
    """One proposed explanation.

    `sentence` is None when the judge gave none (`missing` says why). `prompt` is the version of the prompt file,
    name and hash; "" where no prompt was used. `backend` says who answered. `predicate` is there when the explanation
    is a rule that can be computed.
    """

    explainer: str
    sentence: str | None
    prompt: str = ""
    backend: str = ""
    number: NonNegativeInt = 0
    missing: Missing | None = None
    predicate: Predicate | None = None


@runtime_checkable
class Explainer(Protocol):
    """Evidence in, candidates out."""

    @property
    def name(self) -> str: ...

    def plan(self, evidence: Evidence, backend: Backend | None) -> Plan[tuple[Candidate, ...]]:
        """The calls it takes, and the candidates they give. Raises RequestError when the evidence lacks what this
        explainer reads, and BackendError when the backend cannot do it."""
        ...

    def explain(self, evidence: Evidence, backend: Backend | None) -> tuple[Candidate, ...]:
        """The candidates, asked for now."""
        ...


class ExplanationAnswer(BaseModel):
    """What an explaining judge answers."""

    model_config = ConfigDict(extra="forbid")
    explanation: str = Field(min_length=3, max_length=_LONGEST)


@dataclass(frozen=True, kw_only=True)
class JudgeExplainer(ABC):
    """Base of explainers that show a judge some windows and ask for one sentence.

    Args:
        n_candidates: how many sentences to ask for: one at temperature 0, several at `temperature`, each with its
            own seed.
        n_windows: how many windows of the training part are shown, at most.
        max_tokens: the longest answer.
    """

    name: ClassVar[str]

    n_candidates: int = 1
    n_windows: int = 10
    temperature: float = 1.0
    max_tokens: int = 300

    def __post_init__(self) -> None:
        if self.n_candidates < 1 or self.n_windows < 1:
            raise RequestError(
                f"{self.name} was asked for {self.n_candidates} candidates from {self.n_windows} windows; both are at least 1"
            )

    def plan(self, evidence: Evidence, backend: Backend | None) -> Plan[tuple[Candidate, ...]]:
        """See `Explainer.plan`."""
        if backend is None:
            raise RequestError(
                f"the explainer {self.name!r} asks a judge: give it a backend (see neuron_lens.llm)"
            )
        require(backend, ["chat"], f"the explainer {self.name!r}")
        prompt = prompt_named(self.name)
        messages = prompt.messages(**self.slots(evidence))
        several = self.n_candidates > 1
        calls = tuple(
            StructuredRequest(
                request=Request(
                    messages=messages,
                    max_tokens=self.max_tokens,
                    temperature=self.temperature if several else 0.0,
                    seed=number if several else None,
                    prompt_version=prompt.version,
                ),
                shape=ExplanationAnswer,
                name="explanation",
            )
            for number in range(self.n_candidates)
        )

        def read(answers: Sequence[Answer]) -> tuple[Candidate, ...]:
            return tuple(
                Candidate(
                    explainer=self.name,
                    sentence=None if isinstance(answer, Missing) else " ".join(answer.explanation.split()),
                    missing=answer if isinstance(answer, Missing) else None,
                    prompt=prompt.version,
                    backend=described(backend),
                    number=number,
                )
                for number, answer in enumerate(answers)
            )

        return Plan(calls, read)

    def explain(self, evidence: Evidence, backend: Backend | None) -> tuple[Candidate, ...]:
        """See `Explainer.explain`."""
        return carry_out(backend, [self.plan(evidence, backend)])[0]

    @abstractmethod
    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """What the prompt file's slots are filled with."""


def most_active(evidence: Evidence, count: int) -> tuple[TokenWindow, ...]:
    """The training windows to explain from: firing ones, half from the top, half spread over the strata.

    Raises RequestError when the unit fires in none.
    """
    train = evidence.train
    firing = [window for window in train.windows if evidence.fires(window)]
    if not firing:
        raise RequestError(
            f"{evidence.unit} fires in none of its {len(train.windows)} training windows (above {evidence.firing_threshold}): "
            "there is nothing to explain it from; harvest more text"
        )
    firing.sort(key=lambda window: -window.max_activation)
    n_top = min(len(firing), (count + 1) // 2)
    rest = firing[n_top:]
    n_rest = min(len(rest), count - n_top)
    step = len(rest) / n_rest if n_rest else 1.0
    return tuple(firing[:n_top] + [rest[int(step * place)] for place in range(n_rest)])


def described(backend: Backend | None) -> str:
    """Who answers, for results: kind and model."""
    return "" if backend is None else f"{backend.kind} {backend.model}"


def prompt_named(name: str) -> Prompt:
    """A prompt file of this package."""
    return load_prompt(name, package="neuron_lens.explain")
