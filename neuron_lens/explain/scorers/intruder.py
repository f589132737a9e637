"""Intruder: of some texts the unit fires in all but one; which does the explanation not fit?

EleutherAI's Delphi has an odd-one-out test that shows no explanation, and so measures the unit; here the explanation
is shown, and is what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import quoted_texts, text_of
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.base import BaseScorer
from neuron_lens.explain.scorers.examples import Example, draw_firing, draw_silent
from neuron_lens.explain.scorers.outcome import Outcome, judgements_of
from neuron_lens.explain.scores import share_score
from neuron_lens.llm import Backend, Missing, Request, StructuredRequest

__all__ = ["Intruder"]


class IntruderAnswer(BaseModel):
    """The number of the text that does not belong."""

    model_config = ConfigDict(extra="forbid")
    intruder: int


@dataclass(frozen=True, kw_only=True)
class Intruder(BaseScorer):
    """`accuracy`: the share of intruders found; chance is one in `texts`. `n_trials` calls, fewer where windows are few.

    No window is in two trials as an intruder, and none in two as one that belongs unless there are too few. There is
    no precision: of yes and no nothing is said.
    """

    name: ClassVar[str] = "intruder"
    headline: ClassVar[str] = "accuracy"
    chance: ClassVar[float] = 0.2

    n_trials: int = 20
    texts: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.texts < 3:
            raise RequestError(f"an intruder among {self.texts} texts cannot be told; texts is at least 3")

    def chance_level(self) -> float:
        """One in `texts`."""
        return 1 / self.texts

    def prompt(self, backend: Backend | None) -> str:
        """The version of the prompt used."""
        return prompt_named(self.name).version

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        trials = self._trials(evidence, seed)
        prompt = prompt_named(self.name)

        def within(answer: IntruderAnswer) -> None:
            if not 1 <= answer.intruder <= self.texts:
                raise ValueError(f"the texts are numbered 1 to {self.texts}; got {answer.intruder}")

        calls = tuple(
            StructuredRequest(
                request=Request(
                    messages=prompt.messages(
                        explanation=explanation, texts=quoted_texts(text_of(one.window) for one in shown)
                    ),
                    max_tokens=64,
                    prompt_version=prompt.version,
                ),
                shape=IntruderAnswer,
                check=within,
                name="intruder",
            )
            for shown, _ in trials
        )

        def read(answers: Sequence[Answer]) -> Outcome:
            chosen = [None if isinstance(answer, Missing) else float(answer.intruder) for answer in answers]
            intruders = [shown[place] for shown, place in trials]
            return judgements_of(intruders, chosen, true=[float(place + 1) for _, place in trials])

        return Plan(calls, read)

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """The share found."""
        return {"accuracy": share_score(outcome.true[:, 0] == outcome.predicted[:, 0], outcome.given)}

    def _trials(self, evidence: Evidence, seed: int) -> list[tuple[list[Example], int]]:
        """The texts of each trial and the place of the intruder."""
        rng = np.random.default_rng([seed, 5])
        others = self.texts - 1
        firing = draw_firing(evidence, self.part, self.n_trials * others, seed)
        intruders = draw_silent(evidence, self.part, self.n_trials, seed)
        if len(firing) < others:
            return []
        trials = []
        supply: list[int] = []
        for intruder in intruders:
            if len(supply) < others:
                fresh = [int(p) for p in rng.permutation(len(firing)) if p not in supply]
                supply += fresh
            belonging = [firing[place] for place in supply[:others]]
            supply = supply[others:]
            place = int(rng.integers(self.texts))
            trials.append(([*belonging[:place], intruder, *belonging[place:]], place))
        return trials
