"""Ablate to simulation: how much of what the unit does is still done with its simulated activation in its place?

Ablation scoring of Bills et al. (2023), "Language models can explain neurons in language models". With m(x) the model's
predictions of the next tokens of x, m(x, n = s(x)) those with the unit n set to its simulation, and m(x, n = mu) those
with it set to its mean,

    1 - E[AvgJSD(m(x, n = s(x)) || m(x))] / E[AvgJSD(m(x, n = mu) || m(x))]

with the Jensen-Shannon divergence averaged over the tokens of a window, and the mean over windows. 1: the model does not
notice the difference; 0: the simulation is worth no more than the mean; below 0: it does harm. The model comes from
outside (`harvest.effects.UnitEffects.simulated`); no call is made but those of the simulation, and none where the
explanation carries a rule, which simulates by itself (`by_rule`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorer_result import Demanded
from neuron_lens.explain.scorers.outcome import Outcome, ratio, without_value
from neuron_lens.explain.scorers.simulation import SimulatedWindows, Simulation
from neuron_lens.explain.scores import from_sums
from neuron_lens.explain.simulators import RuleSimulator
from neuron_lens.llm import Backend
from neuron_lens.records import Unit, WindowId

__all__ = ["AblateToSimulation", "Remembered", "SimulatedDivergences"]

Floats = NDArray[np.float64]

# Of a unit, windows and simulated activations [window, length] (NaN where there is no prediction): how far the model's
# predictions move with the unit replaced by these, and by its mean, at the same tokens [window, 2].
SimulatedDivergences = Callable[[Unit, Sequence[WindowId], Floats], Floats]

_NO_FIRING = "predictions of the model are compared, not of where the unit fires: nothing gets a yes"
_WINDOWS = 4096  # that are remembered
_DECIMALS = 12  # one unit of many moves predictions by millionths of a nat
_ROUNDING = 1e-10  # nats a token: below, predictions differ by rounding only


@dataclass(frozen=True, kw_only=True)
class AblateToSimulation(Simulation):
    """See the module; simulator, calibration and windows as in `Simulation`, whose calls it shares.

    ablation_score        the formula; 0 for a simulation that is the mean everywhere, and less for noise
    moved_by_simulation   the mean divergence with the simulation in place (nats a token)
    moved_by_mean         the same with the mean in place: what there is to explain; where it is nothing, there is no score

    At tokens without a prediction the unit is left as it is, in both. Raises RequestError without `divergences`, and for
    attention heads, whose activation is the norm of a vector: nothing says in which direction it should be set.
    """

    name: ClassVar[str] = "ablate_to_simulation"
    headline: ClassVar[str] = "ablation_score"
    chance: ClassVar[float] = 0.0
    meaningless: ClassVar[Mapping[Demanded, str]] = {
        "precision": _NO_FIRING,
        "precision_at_density": _NO_FIRING,
    }

    divergences: SimulatedDivergences | None = None

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        super().check(evidence, backend)
        if evidence.unit.kind == "head":
            raise RequestError(
                f"{evidence.unit} is simulated by the norm of what it writes, which says nothing of the direction: it "
                "cannot be replaced by its simulation"
            )
        if self.divergences is None:
            raise RequestError(
                f"replacing {evidence.unit} by its simulation needs divergences, a callable that runs the model, such as "
                "harvest.effects.UnitEffects.simulated"
            )

    def by_rule(self) -> Self:
        """With the rule as simulator, where a judge would have been."""
        return replace(self, simulator=RuleSimulator(), calibration="none") if self.asks else self

    def rehearsed(self) -> Self:
        """The model is not run."""
        return replace(self, divergences=lambda unit, windows, simulated: np.zeros((len(windows), 2)))

    def notes(self, outcome: Outcome, evidence: Evidence) -> tuple[str, ...]:
        """Besides: a unit that has no effect."""
        said = super().notes(outcome, evidence)
        assert isinstance(outcome, SimulatedWindows), "made by ask"
        if outcome.calibration.refused or not outcome.given.any():
            return said
        if _has_effect(self._moved(outcome, evidence)[outcome.given]):
            return said
        return (
            *said,
            "with the unit set to its mean the model predicts the same: there is no effect that a simulation could keep, "
            "and no score",
        )

    def prepare(self, outcomes: Sequence[Outcome], evidence: Evidence) -> None:
        """All simulations in one call: the model runs once for what they are compared with."""
        asked = [self._simulated(outcome) for outcome in outcomes]
        windows = [window for some, _ in asked for window in some]
        if windows and isinstance(self.divergences, Remembered):
            self.divergences(evidence.unit, windows, np.concatenate([values for _, values in asked]))

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See the class."""
        moved, given = self._moved(outcome, evidence), outcome.given
        scores = {self.headline: from_sums(moved, lambda totals: 1 - ratio(totals), given=given, seed=seed)}
        for place, name in enumerate(("moved_by_simulation", "moved_by_mean")):
            sums = np.stack([moved[:, place], np.ones(len(moved))], axis=1)
            scores[name] = from_sums(sums, ratio, given=given, seed=seed, decimals=_DECIMALS)
        assert isinstance(outcome, SimulatedWindows), "made by ask"
        if outcome.calibration.refused:
            return {name: without_value(score) for name, score in scores.items()}
        if not _has_effect(moved[given]):
            scores[self.headline] = without_value(scores[self.headline])
        return scores

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The score on the windows of the stratum and the silent ones."""
        return self.figures(outcome, evidence, seed)[self.headline]

    def _moved(self, outcome: Outcome, evidence: Evidence) -> Floats:
        """Divergences `[window, 2]`, zero where nothing is simulated."""
        assert self.divergences is not None, "checked"
        moved = np.zeros((len(outcome.given), 2))
        windows, simulated = self._simulated(outcome)
        if windows:
            moved[outcome.given] = self.divergences(evidence.unit, windows, simulated)
        return moved

    def _simulated(self, outcome: Outcome) -> tuple[list[WindowId], Floats]:
        """The windows that are simulated, and the activations `[window, length]`, NaN where there is no prediction."""
        assert isinstance(outcome, SimulatedWindows), "made by ask"
        given = outcome.given & (outcome.calibration.refused is None)
        simulated = np.where(outcome.mask, outcome.calibration.apply(outcome.predicted), np.nan)
        windows = [(int(document), int(start)) for document, start in outcome.windows[given]]
        return windows, simulated[given]


def _has_effect(moved: Floats) -> bool:
    """Whether predictions move at all with the unit at its mean; `moved` `[window, 2]`."""
    return bool(moved[:, 1].sum() > _ROUNDING * len(moved))


class Remembered:
    """Divergences by window: controls and strata ask for the same ones again."""

    def __init__(self, divergences: SimulatedDivergences) -> None:
        self._divergences = divergences
        self._known: dict[tuple[Unit, WindowId, bytes], Floats] = {}

    def __call__(self, unit: Unit, windows: Sequence[WindowId], simulated: Floats) -> Floats:
        """See `SimulatedDivergences`."""
        keys = [(unit, window, row.tobytes()) for window, row in zip(windows, simulated, strict=True)]
        if len(self._known) + len(keys) > _WINDOWS:
            self._known = {}
        new = list({key: place for place, key in enumerate(keys) if key not in self._known}.values())
        if new:
            rows = self._divergences(unit, [windows[place] for place in new], simulated[new])
            self._known |= {keys[place]: row for place, row in zip(new, rows, strict=True)}
        return np.stack([self._known[key] for key in keys])
