"""Simulation: predict the activation at every token, and compare. OpenAI's figures, under their names.

Bills et al., "Language models can explain neurons in language models" (2023), and automated-interpretability's code.
With true activations y and predictions p, pooled over all tokens of all windows:

    ev_correlation_score          Pearson correlation of y and the uncalibrated prediction
    rsquared_score                1 - sum (y - p)^2 / sum y^2       (against zero, not against the mean)
    absolute_dev_explained_score  1 - sum |y - p| / sum |y|
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.calibration import FITTED, Calibration, CalibrationName, calibrated, scale
from neuron_lens.explain.evidence import Evidence, PartName
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import largest_of
from neuron_lens.explain.result import Score, ScoredWindow, ScorerResult
from neuron_lens.explain.scorers.base import NULL_EXPLANATION, BaseScorer
from neuron_lens.explain.scorers.examples import Example, draw_examples
from neuron_lens.explain.scorers.outcome import Outcome, precision_at_density, ratio, without_value
from neuron_lens.explain.scores import MINIMUM_COVERAGE, auc, correlation, from_sums
from neuron_lens.explain.simulators import RuleSimulator, Simulated, Simulator, simulator_for
from neuron_lens.llm import Backend, require
from neuron_lens.records import Unit

__all__ = ["SimulatedWindows", "Simulation"]

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class SimulatedWindows(Outcome):
    """Predicted levels, how they become activations, and which windows these are (document, first token) `[window, 2]`."""

    calibration: Calibration
    windows: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Simulation(BaseScorer):
    """See the module; besides, of "does it fire at this token": auc, precision and precision_at_density, where the
    prediction says so above the unit's own threshold.

    The coverage is the share of tokens with a prediction: a token may miss one within a window that has others.

    Args:
        simulator: None takes the one that suits the backend; see `simulator_for`.
        calibration: see `explain.calibration`; "linear" and "percentile" simulate as many validation windows too. A
            `RuleSimulator` predicts activations: "none".
        rules: of a unit, the simulator by its own rule and that of another unit; for a `RuleSimulator` without any.
        n_firing, n_silent: windows of each sort, at most.
    """

    name: ClassVar[str] = "simulation"
    headline: ClassVar[str] = "ev_correlation_score"
    chance: ClassVar[float] = 0.0

    simulator: Simulator | None = None
    calibration: CalibrationName = "scale"
    n_firing: int = 10
    n_silent: int = 10
    rules: Callable[[Unit], RuleSimulator] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration not in get_args(CalibrationName):
            known = get_args(CalibrationName)
            raise RequestError(
                f"there is no calibration {self.calibration!r}; {did_you_mean(self.calibration, known)}"
            )
        if self.calibration in FITTED and self.part == "validation":
            raise RequestError(
                f"{self.calibration} calibration is fitted on validation and cannot be scored there; take 'scale'"
            )
        if isinstance(self.simulator, RuleSimulator) and self.calibration != "none":
            raise RequestError(
                f"a rule predicts activations, which {self.calibration} calibration would take for levels from 0 to 10: "
                "give calibration='none' with a RuleSimulator"
            )

    @property
    def asks(self) -> bool:
        """See `BaseScorer.asks`."""
        return self.simulator is None or bool(self.simulator.needs)

    def by_rule(self) -> Self:
        """Raises RequestError: what a rule predicts is compared with the activations already, on all test windows."""
        if not self.asks:
            return self
        raise RequestError(
            f"the scorer {self.name!r} asks a judge: give it a backend (by command: --judge). How well the rules of token "
            "statistics predict is their correlation, and what of a unit's effect they keep ablate_to_simulation tells; "
            "both ask nobody"
        )

    def plan(
        self,
        evidence: Evidence,
        explanation: str,
        backend: Backend | None,
        *,
        seed: int,
        others: Sequence[str] = (),
    ) -> Plan[ScorerResult]:
        """See `Scorer.plan`. By rule, the control is another rule or, where none is at hand, the mean everywhere."""
        if not isinstance(self.simulator, RuleSimulator):
            return super().plan(evidence, explanation, backend, seed=seed, others=others)
        known = self.simulator.rules
        if not known and self.rules is not None:
            known = self.rules(evidence.unit).rules
        mean = evidence.statistics.mean
        nothing = {NULL_EXPLANATION: lambda window: (mean,) * len(window.tokens)}
        bound = replace(self, simulator=RuleSimulator({**nothing, **known}))
        others = [one for one in others if one in known]
        return super(Simulation, bound).plan(evidence, explanation, backend, seed=seed, others=others)

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        simulator = self._simulator(backend)
        if backend is not None:
            require(backend, simulator.needs, f"the simulator {simulator.name!r}")
        elif simulator.needs:
            raise RequestError(
                f"the simulator {simulator.name!r} asks a judge: give it a backend (see neuron_lens.llm)"
            )

    def prompt(self, backend: Backend | None) -> str:
        """The version of the simulator's prompt."""
        return self._simulator(backend).prompt

    def method(self, backend: Backend | None) -> str:
        """Simulator and calibration."""
        simulator = self._simulator(backend)
        if isinstance(simulator, RuleSimulator):
            return "simulated by the rule itself"
        return f"{simulator.name}, {self.calibration} calibration"

    def notes(self, outcome: Outcome, evidence: Evidence) -> tuple[str, ...]:
        """A calibration that was refused, or is none."""
        assert isinstance(outcome, SimulatedWindows)
        if isinstance(self.simulator, RuleSimulator):
            return ()
        if self.calibration == "none":
            return (
                "levels from 0 to 10 were compared with raw activations: only the correlation and auc mean anything",
            )
        refused = outcome.calibration.refused
        return (refused,) if refused else ()

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        simulator = self._simulator(backend)
        examples = self._drawn(evidence, self.part, seed)
        fitting = self._drawn(evidence, "validation", seed) if self.calibration in FITTED else ()
        asked = simulator.plan(explanation, [one.window for one in (*examples, *fitting)])
        largest = largest_of(evidence.train.windows)

        def read(simulated: list[Simulated]) -> Outcome:
            there = [
                (level, true)
                for example, levels in zip(fitting, simulated[len(examples) :], strict=True)
                for level, true in zip(levels, example.window.activations, strict=True)
                if level is not None
            ]
            pairs = np.array(there, dtype=np.float64).reshape(-1, 2)
            fitted = calibrated(self.calibration, largest, pairs[:, 0], pairs[:, 1])
            return _outcome(examples, simulated[: len(examples)], fitted)

        return asked.then(read)

    def shown(
        self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int
    ) -> Plan[tuple[ScoredWindow, ...]]:
        """The windows scored with what was predicted there, in activations ("scale"): the calls of `ask` again."""
        examples = self._drawn(evidence, self.part, seed)
        back = scale(largest_of(evidence.train.windows)).apply
        words: dict[str, Literal["top", "quantile", "random"]] = {"top": "top", "stratum": "quantile"}

        def read(simulated: list[Simulated]) -> tuple[ScoredWindow, ...]:
            return tuple(
                ScoredWindow(
                    window=example.window,
                    simulated=None
                    if all(level is None for level in levels)
                    else tuple(
                        None if level is None else round(float(back(np.asarray(level))), 4)
                        for level in levels
                    ),
                    stratum=words.get(example.source, "random"),
                )
                for example, levels in zip(examples, simulated, strict=True)
            )

        return self._simulator(backend).plan(explanation, [one.window for one in examples]).then(read)

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See the class."""
        assert isinstance(outcome, SimulatedWindows), "made by ask"
        there = outcome.mask
        true = np.where(there, outcome.true, 0.0)
        applied = outcome.calibration.apply(outcome.predicted)
        predicted = np.where(there, applied, 0.0)
        error = true - predicted
        squares = np.stack([(error**2).sum(1), (true**2).sum(1)], axis=1)
        deviations = np.stack([np.abs(error).sum(1), np.abs(true).sum(1)], axis=1)
        n = int(there[outcome.given].sum())

        def explained(sums: Floats) -> Floats:
            return 1 - ratio(sums)

        said = there & (applied > evidence.firing_threshold)
        hits = said & (outcome.true > evidence.firing_threshold)
        counts = np.stack([hits.sum(1), said.sum(1)], axis=1).astype(np.float64)
        scores = {
            "ev_correlation_score": correlation(outcome.predictions, seed),
            "auc": auc(outcome.predictions, evidence.firing_threshold, seed),
            "rsquared_score": from_sums(squares, explained, given=outcome.given, n=n, seed=seed),
            "absolute_dev_explained_score": from_sums(
                deviations, explained, given=outcome.given, n=n, seed=seed
            ),
            "precision": from_sums(counts, ratio, given=outcome.given, n=n, seed=seed),
            "precision_at_density": precision_at_density(
                counts[:, 0], counts[:, 1], outcome.fires, outcome, self.density(evidence), seed
            ),
        }
        coverage = float(there.sum() / max(int(outcome.present.sum()), 1))
        if outcome.calibration.refused:
            scores |= {
                name: without_value(scores[name]) for name in scores.keys() - {"ev_correlation_score", "auc"}
            }
        return {
            name: (score if coverage >= MINIMUM_COVERAGE else without_value(score)).model_copy(
                update={"coverage": coverage}
            )
            for name, score in scores.items()
        }

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The correlation."""
        return correlation(outcome.predictions, seed)

    def _simulator(self, backend: Backend | None) -> Simulator:
        return self.simulator or simulator_for(backend)

    def _drawn(self, evidence: Evidence, part: PartName, seed: int) -> tuple[Example, ...]:
        return draw_examples(evidence, part, firing=self.n_firing, silent=self.n_silent, seed=seed)


def _outcome(
    examples: Sequence[Example], simulated: Sequence[Simulated], calibration: Calibration
) -> SimulatedWindows:
    shape = (len(examples), max((len(example.window.tokens) for example in examples), default=0))
    true, predicted = np.zeros(shape), np.zeros(shape)
    present, mask = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    for row, (example, levels) in enumerate(zip(examples, simulated, strict=True)):
        length = len(levels)
        true[row, :length] = example.window.activations
        predicted[row, :length] = [0.0 if level is None else level for level in levels]
        present[row, :length] = True
        mask[row, :length] = [level is not None for level in levels]
    return SimulatedWindows(
        true=true,
        predicted=predicted,
        present=present,
        mask=mask,
        given=np.asarray(mask.any(1)),
        fires=np.array([example.fires for example in examples], dtype=bool),
        natural=np.array([example.natural for example in examples], dtype=bool),
        stratum=tuple(example.stratum for example in examples),
        calibration=calibration,
        windows=np.array([one.window.identity for one in examples], dtype=np.int64).reshape(-1, 2),
    )
