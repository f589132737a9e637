"""Intruder: of some texts the unit fires in all but one; which does the explanation not fit?

EleutherAI's Delphi has an odd-one-out test that shows no explanation, and so measures the unit (Paulo & Belrose 2025);
here the explanation is shown, and is what is measured. As there, the texts the unit fires in are of one stratum in each
trial, the strata taking turns: the share found in each says how far down the activation the explanation holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.explain.rendering import quoted_texts, text_of
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.base import BaseScorer
from neuron_lens.explain.scorers.examples import Example, draw_firing, draw_silent
from neuron_lens.explain.scorers.outcome import Outcome, precision_of_sums
from neuron_lens.explain.scores import share_score
from neuron_lens.llm import Backend, Missing, Request, StructuredRequest

__all__ = ["Intruder"]

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class IntruderAnswer(BaseModel):
    """The number of the text that does not belong."""

    model_config = ConfigDict(extra="forbid")
    intruder: int


@dataclass(frozen=True)
class _Trial:
    """Texts as they are shown, where the intruder is, and the stratum the others are of (None: of several)."""

    shown: tuple[Example, ...]
    place: int
    stratum: int | None


@dataclass(frozen=True, eq=False)
class _Trials(Outcome):
    """A row a trial, a column a text: `true` is 0 at the intruder, `predicted` at the text that was named, 1 elsewhere.

    `natural_at` `[trial, text]`: whether the text is as the unit's firing (or silent) windows are in the corpus.
    """

    natural_at: Bools


@dataclass(frozen=True, kw_only=True)
class Intruder(BaseScorer):
    """`accuracy`: the share of intruders found; chance is one in `texts`. `n_trials` calls, fewer where windows are few.

    To name an intruder is to say of the other texts that they fit: with the share r of firing windows that are let
    stand, and the share f of intruders that are,

        precision              r / (r + f): as many firing windows as silent ones; an explanation that says nothing gets 1/2
        precision_at_density   r d / (r d + f (1 - d)), of windows of the corpus alone; it gets d

    Both speak of choices, one a trial, and flatter a judge who says yes to much when asked of each text by itself.

    No window is in two trials as an intruder, and none in two as one that belongs unless there are too few.
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
                        explanation=explanation,
                        texts=quoted_texts(text_of(one.window) for one in trial.shown),
                    ),
                    max_tokens=64,
                    prompt_version=prompt.version,
                ),
                shape=IntruderAnswer,
                check=within,
                name="intruder",
            )
            for trial in trials
        )

        def read(answers: Sequence[Answer]) -> Outcome:
            named = [None if isinstance(answer, Missing) else answer.intruder - 1 for answer in answers]
            return self._outcome(trials, named)

        return Plan(calls, read)

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See the class."""
        assert isinstance(outcome, _Trials), "made by ask"
        given, density = outcome.given, self.density(evidence)
        every = np.ones_like(outcome.natural_at)
        return {
            "accuracy": share_score(_found(outcome), given),
            "precision": precision_of_sums(
                _let_stand(outcome, every), given, 0.5, n=int(given.sum()), seed=seed
            ),
            "precision_at_density": precision_of_sums(
                _let_stand(outcome, outcome.natural_at),
                given,
                density,
                n=int((outcome.natural & given).sum()),
                seed=seed,
            ),
        }

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The share found in the trials whose firing windows are of the stratum."""
        return share_score(_found(outcome), outcome.given)

    def _outcome(self, trials: Sequence[_Trial], named: Sequence[int | None]) -> _Trials:
        shape = (len(trials), self.texts)
        true, predicted, natural = np.ones(shape), np.ones(shape), np.zeros(shape, dtype=bool)
        for row, (trial, said) in enumerate(zip(trials, named, strict=True)):
            true[row, trial.place] = 0.0
            natural[row] = [example.natural for example in trial.shown]
            if said is not None:
                predicted[row, said] = 0.0
        there = np.ones(shape, dtype=bool)
        return _Trials(
            true=true,
            predicted=predicted,
            present=there,
            mask=there,
            given=np.array([said is not None for said in named], dtype=bool),
            fires=np.ones(len(trials), dtype=bool),
            natural=natural[np.arange(len(trials)), [trial.place for trial in trials]],
            stratum=tuple(trial.stratum for trial in trials),
            natural_at=natural,
        )

    def _trials(self, evidence: Evidence, seed: int) -> list[_Trial]:
        rng = np.random.default_rng([seed, 5])
        others = self.texts - 1
        pools = self._pools(evidence, seed)
        trials: list[_Trial] = []
        supplies: list[list[Example]] = [[] for _ in pools]
        for turn, intruder in enumerate(draw_silent(evidence, self.part, self.n_trials, seed)):
            if not pools:
                break
            number = turn % len(pools)
            stratum, firing = pools[number]
            if len(supplies[number]) < others:
                fresh = [firing[int(p)] for p in rng.permutation(len(firing))]
                supplies[number] += [one for one in fresh if one not in supplies[number]]
            belonging, supplies[number] = supplies[number][:others], supplies[number][others:]
            place = int(rng.integers(self.texts))
            trials.append(_Trial((*belonging[:place], intruder, *belonging[place:]), place, stratum))
        return trials

    def _pools(self, evidence: Evidence, seed: int) -> list[tuple[int | None, list[Example]]]:
        """Firing windows to fill trials from: those of each stratum that fills one, or, where none does, all."""
        firing = draw_firing(evidence, self.part, len(evidence.part(self.part).windows), seed)
        of_stratum: defaultdict[int, list[Example]] = defaultdict(list)
        for example in firing:
            if example.source == "stratum" and example.stratum is not None:
                of_stratum[example.stratum].append(example)
        pools = [(s, found) for s, found in sorted(of_stratum.items()) if len(found) >= self.texts - 1]
        if pools:
            return [*pools]
        return [(None, list(firing))] if len(firing) >= self.texts - 1 else []


def _found(outcome: Outcome) -> Bools:
    return np.asarray(((outcome.true == 0) & (outcome.predicted == 0)).any(1))


def _let_stand(outcome: Outcome, counted: Bools) -> Floats:
    """The counts of `precision_of_sums` a trial, over the texts that are `counted`."""
    said, fires = (outcome.predicted > 0) & counted, outcome.true > 0
    stood, firing = (said & fires).sum(1), (fires & counted).sum(1)
    wrongly, silent = (said & ~fires).sum(1), (~fires & counted).sum(1)
    none = np.zeros_like(stood)
    return np.stack([stood, stood, firing, none, wrongly, silent], axis=1).astype(np.float64)
