"""What a scorer is: evidence and an explanation in, figures with intervals, coverage and controls out.

Every scorer asks the same questions three times over: with the explanation; with another unit's (or, where none is
given, with one that says nothing); and, without asking, with the first answers dealt to other examples at random. A
score means something only as far as it stands above these two.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import PARTS, Evidence, PartName
from neuron_lens.explain.explainers.base import described, prompt_named
from neuron_lens.explain.plan import Answer, Plan, carry_out, missing_kinds
from neuron_lens.explain.result import QuantileScore, Score, ScorerControl, ScorerResult
from neuron_lens.explain.scorer_result import DEMANDED, Demanded
from neuron_lens.explain.scorers.outcome import Outcome
from neuron_lens.explain.scores import MINIMUM_COVERAGE
from neuron_lens.llm import Backend, require

__all__ = ["NULL_EXPLANATION", "BaseScorer", "QuantileScore", "Scorer", "ScorerControl", "ScorerResult"]

NULL_EXPLANATION = "no particular pattern: any token of any text, at random"


@runtime_checkable
class Scorer(Protocol):
    """Evidence and an explanation in, figures out."""

    @property
    def name(self) -> str: ...
    @property
    def part(self) -> PartName: ...

    def plan(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> Plan[ScorerResult]:
        """The calls it takes, and the result they give. `others`: explanations of other units, for the control.

        Raises BackendError when the backend cannot do it, and RequestError when the evidence lacks what it needs.
        """
        ...

    def score(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> ScorerResult:
        """The result, asked for now."""
        ...


@dataclass(frozen=True, kw_only=True)
class BaseScorer(ABC):
    """Base of the scorers.

    Args:
        part: the part scored on; "validation" to choose among explanations, "test" to report.
        controls: also score an explanation that should fail (twice the calls), and shuffled predictions (no calls).

    `meaningless` names figures that every result should carry and that mean nothing for this scorer, with the reason.
    """

    name: ClassVar[str]
    headline: ClassVar[str]
    chance: ClassVar[float]
    needs: ClassVar[tuple[str, ...]] = ("chat",)
    meaningless: ClassVar[Mapping[Demanded, str]] = {}

    part: PartName = "test"
    controls: bool = True

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise RequestError(
                f"the scorer {self.name!r} was given the part {self.part!r}; known: {', '.join(PARTS)}"
            )
        for name, value in vars(self).items():
            if isinstance(value, int) and not isinstance(value, bool) and value < 1:
                raise RequestError(f"the scorer {self.name!r} was given {name}={value}; it is at least 1")

    def plan(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> Plan[ScorerResult]:
        """See `Scorer.plan`."""
        if not explanation.strip():
            raise RequestError(f"the scorer {self.name!r} was given an empty explanation of {evidence.unit}")
        self.check(evidence, backend)
        kind, control = _control_sentence(explanation, others, seed)
        sentences = [explanation, control] if self.controls else [explanation]
        asked = [self.ask(evidence, sentence, backend, seed) for sentence in sentences]
        further = self.further_controls(evidence, explanation, backend, seed) if self.controls else {}
        calls = len(asked[0].calls)
        joined = Plan.joined([*asked, *further.values()])

        def read(answers: Sequence[Answer]) -> ScorerResult:
            outcomes = joined.read(answers)
            dealt = [outcomes[0].shuffled(seed)] if self.controls else []
            self.prepare([*outcomes, *dealt], evidence)
            figures = [self.figures(outcome, evidence, seed) for outcome in outcomes]
            controls = []
            if self.controls:
                controls = [
                    ScorerControl(name=kind, sentence=control, scores=figures[1]),
                    ScorerControl(
                        name="shuffled", sentence=None, scores=self.figures(dealt[0], evidence, seed)
                    ),
                ]
                controls += [
                    ScorerControl(name=name, sentence=None, scores=scores)
                    for name, scores in zip(further, figures[2:], strict=True)
                ]
            quantiles = self._quantiles(outcomes[0], evidence, seed)
            return ScorerResult(
                scorer=self.name,
                part=self.part,
                explanation=explanation,
                headline=self.headline,
                chance=self.chance_level(),
                scores=figures[0],
                controls=tuple(controls),
                quantiles=quantiles,
                prompt=self.prompt(backend),
                backend=described(backend),
                method=self.method(backend),
                seed=seed,
                calls=calls,
                missing=missing_kinds(answers[:calls]),
                notes=self.notes(outcomes[0], evidence),
                absent=self._absent(outcomes[0], evidence, figures[0], bool(quantiles)),
            )

        return Plan(joined.calls, read)

    def score(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> ScorerResult:
        """See `Scorer.score`."""
        plan = self.plan(evidence, explanation, backend, seed=seed, others=others)
        return carry_out(backend, [plan])[0]

    @property
    def asks(self) -> bool:
        """Whether it asks a judge."""
        return bool(self.needs)

    def by_rule(self) -> Self:
        """The scorer as explanations that carry a rule can be scored without a judge; itself where there is no such form."""
        return self

    def rehearsed(self) -> Self:
        """The scorer as an estimate takes it: what it asks of others than the judge is not asked."""
        return self

    def kept_in(self, embeddings: Path) -> Self:
        """The scorer as a run takes it: vectors that are paid for are kept in the file `embeddings`."""
        return self

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """Refuse what cannot be done: raise BackendError or RequestError."""
        if backend is None:
            raise RequestError(
                f"the scorer {self.name!r} asks a judge: give it a backend (see neuron_lens.llm)"
            )
        require(backend, self.needs, f"the scorer {self.name!r}")

    @abstractmethod
    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """The calls for one explanation; the same examples for every explanation of one unit and seed."""

    def prepare(self, outcomes: Sequence[Outcome], evidence: Evidence) -> None:  # noqa: B027  nothing by default
        """Called with all outcomes before the figures of each: what they share is worked out once."""

    @abstractmethod
    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """The figures by name; `headline` is among them."""

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The figure of one stratum; `outcome` holds its firing windows and all silent ones."""
        return self.figures(outcome, evidence, seed)[self.headline]

    def further_controls(
        self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int
    ) -> dict[Literal["random_unit"], Plan[Outcome]]:
        """Controls besides another explanation and shuffled predictions, by name."""
        return {}

    def density(self, evidence: Evidence) -> float | None:
        """The share of the corpus that is true of the unit, by windows; None where it is not known."""
        return None if evidence.density is None else evidence.density.windows

    def bounds(self, evidence: Evidence) -> dict[int, tuple[float, float]]:
        """The activations each stratum lies between, by its index."""
        return {stratum.index: (stratum.low, stratum.high) for stratum in evidence.part(self.part).strata}

    def chance_level(self) -> float:
        """What the headline comes to for an explanation that says nothing."""
        return self.chance

    def prompt(self, backend: Backend | None) -> str:
        """The version of the prompt used: the one of the scorer's name."""
        return prompt_named(self.name).version

    def method(self, backend: Backend | None) -> str:
        """What was used, where there is a choice."""
        return ""

    def notes(self, outcome: Outcome, evidence: Evidence) -> tuple[str, ...]:
        """What the reader must know."""
        return ()

    def _quantiles(self, outcome: Outcome, evidence: Evidence, seed: int) -> tuple[QuantileScore, ...]:
        bounds = self.bounds(evidence)
        found = sorted(
            {s for s, fires in zip(outcome.stratum, outcome.fires, strict=True) if fires and s is not None}
        )
        return tuple(
            QuantileScore(
                index=index,
                low=bounds[index][0],
                high=bounds[index][1],
                score=self.quantile_figure(outcome.of_stratum(index), evidence, seed),
            )
            for index in found
        )

    def _absent(
        self, outcome: Outcome, evidence: Evidence, scores: Mapping[str, Score], quantiles: bool
    ) -> dict[Demanded, str]:
        """Why each figure that every result should carry and this one does not is not there."""
        there = {name for name, score in scores.items() if score.value is not None}
        there |= {"quantiles"} if quantiles else set()
        return {name: self._why_absent(name, outcome, evidence) for name in DEMANDED if name not in there}

    def _why_absent(self, name: Demanded, outcome: Outcome, evidence: Evidence) -> str:
        planned, given = len(outcome.given), outcome.given
        if name in self.meaningless:
            return self.meaningless[name]
        if not planned:
            return f"the {self.part} part holds no examples to ask about"
        if given.mean() < MINIMUM_COVERAGE:
            return f"{int(given.sum())} of {planned} answers came: too few for a figure"
        if name == "quantiles":
            return f"no example the unit fires in lies in a stratum of the {self.part} part"
        if name == "precision_at_density":
            if self.density(evidence) is None:
                return "without a uniform sample it is not known how often the unit fires"
            if not (outcome.natural & given).any():
                return "none of the examples is as windows of the corpus are: they were chosen for being hard or strong"
        return "too few examples of either sort, or none of them gets a yes"


def _control_sentence(
    explanation: str, others: Sequence[str], seed: int
) -> tuple[Literal["another_unit", "null"], str]:
    """One of the other explanations, drawn; the empty one where there is none that differs."""
    different = [other for other in others if other.strip() and other != explanation]
    if not different:
        return "null", NULL_EXPLANATION
    return "another_unit", different[int(np.random.default_rng([seed, 3]).integers(len(different)))]
