"""A figure with its interval, and what one scorer says of one explanation: records, plain Python."""

from __future__ import annotations

from typing import Literal, Self, get_args

from pydantic import Field, NonNegativeInt

from neuron_lens.records import Record

__all__ = ["DEMANDED", "Demanded", "Headline", "QuantileScore", "Score", "ScorerControl", "ScorerResult"]

# What every result gives, or says why not: see `ScorerResult.absent`.
Demanded = Literal["precision", "precision_at_density", "quantiles"]
DEMANDED: tuple[Demanded, ...] = get_args(Demanded)


class Score(Record):
    """A figure with a bootstrap 95 % interval over windows; `None` where it could not be computed."""

    value: float | None
    low: float | None
    high: float | None
    n: NonNegativeInt  # tokens it rests on
    n_windows: NonNegativeInt
    coverage: float = Field(ge=0, le=1)  # share of the planned windows that gave a prediction


class ScorerControl(Record):
    """The same scores for what should not work.

    "another_unit": another unit's explanation; "null": one that says nothing; "shuffled": this explanation's
    predictions dealt to other examples at random (no calls); "random_unit": this explanation, asked of what other
    units do.
    """

    name: Literal["another_unit", "null", "shuffled", "random_unit"]
    sentence: str | None
    scores: dict[str, Score]


class QuantileScore(Record):
    """The headline figure on the firing examples of one stratum (activation in [low, high)) against all silent ones;
    for judgements of yes and no the recall in the stratum, for intruders the share found among windows of the
    stratum."""

    index: NonNegativeInt
    low: float
    high: float
    score: Score


class ScorerResult(Record):
    """What one scorer says of one explanation.

    Attributes:
        headline: the name of the figure to rank explanations by; higher is better, and None is below all.
        chance: what the headline comes to for an explanation that says nothing.
        scores: figures by name.
        prompt: version of the prompt file; backend: who judged; method: what of it was used, where there is a choice.
        calls: planned, for the explanation alone; missing: how many gave nothing, by kind.
        notes: what the reader must know.
        absent: of precision, precision_at_density and quantiles those that are not here, each with the reason.
    """

    scorer: str
    part: Literal["train", "validation", "test"]
    explanation: str
    headline: str
    chance: float
    scores: dict[str, Score]
    controls: tuple[ScorerControl, ...]
    quantiles: tuple[QuantileScore, ...] = ()
    prompt: str = ""
    backend: str = ""
    method: str = ""
    seed: int = 0
    calls: NonNegativeInt = 0
    missing: dict[str, int] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    absent: dict[Demanded, str] = Field(default_factory=dict)

    @property
    def score(self) -> Score:
        """The headline figure."""
        return self.scores[self.headline]


class Headline(Record):
    """One scorer's main figure, beside the same for an explanation that should not work."""

    scorer: str
    figure: str
    chance: float
    score: Score
    control: Score | None

    @classmethod
    def of(cls, result: ScorerResult) -> Self:
        """The headline of a scorer's result."""
        asked = [control for control in result.controls if control.name != "shuffled"]
        return cls(
            scorer=result.scorer,
            figure=result.headline,
            chance=result.chance,
            score=result.score,
            control=asked[0].scores.get(result.headline) if asked else None,
        )
