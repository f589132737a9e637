"""Simulation by rule: what an explanation predicts is computed, not read out of its sentence. No judge, no calls.

The rules that token statistics find are explanations of this kind, and so is any hypothesis that can be written as a
function of a window. A rule predicts activations themselves, not levels from 0 to 10: nothing is to be calibrated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from neuron_lens.errors import RequestError
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.simulators.base import Simulated
from neuron_lens.records import TokenWindow

__all__ = ["Rule", "RuleSimulator"]

Rule = Callable[[TokenWindow], Sequence[float]]  # the predicted activation at each token of a window


@dataclass(frozen=True, eq=False)
class RuleSimulator:
    """Simulates by the rule whose sentence it is given.

    `rules`: by sentence. Left empty, a scorer takes those of the unit it scores, where it knows them (see
    `Simulation.rules`); a pipeline tells it. Raises RequestError for a sentence without a rule, and for a rule that gives
    another number of values than there are tokens.
    """

    name: ClassVar[str] = "rule"
    needs: ClassVar[tuple[str, ...]] = ()
    prompt: ClassVar[str] = ""

    rules: Mapping[str, Rule] = field(default_factory=dict)

    def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
        """See `Simulator.plan`; the predictions are activations."""
        rule = self.rules.get(explanation)
        if rule is None:
            raise RequestError(
                f"no rule is known that {explanation!r} says: only an explanation that can be computed (one of token "
                "statistics, or a function of a window) is simulated without a judge"
            )
        return Plan((), lambda answers: [_simulated(rule, window) for window in windows])


def _simulated(rule: Rule, window: TokenWindow) -> Simulated:
    predicted = tuple(float(value) for value in rule(window))
    if len(predicted) != len(window.tokens):
        raise RequestError(
            f"the rule gave {len(predicted)} values for the {len(window.tokens)} tokens of the window "
            f"{window.identity}; expected one for each token"
        )
    return predicted
