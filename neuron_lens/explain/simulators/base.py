"""What a simulator is: an explanation and windows in, a predicted activation from 0 to 10 for every token out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from neuron_lens.explain.plan import Plan
from neuron_lens.records import TokenWindow

__all__ = ["Simulated", "Simulator"]

# The predicted activation at each token of a window, 0 to 10 (by rule: in the unit's own measure); None where there is
# no prediction.
Simulated = tuple[float | None, ...]


@runtime_checkable
class Simulator(Protocol):
    """An explanation and windows in, predictions out. `needs`: capabilities of the backend; `prompt`: its version."""

    @property
    def name(self) -> str: ...
    @property
    def needs(self) -> tuple[str, ...]: ...
    @property
    def prompt(self) -> str: ...

    def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
        """The calls, and the predictions for every window they give."""
        ...
