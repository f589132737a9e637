"""Simulators: from an explanation to a predicted activation at every token. See `base.Simulator`."""

from __future__ import annotations

from neuron_lens.errors import RequestError
from neuron_lens.explain.simulators.all_at_once import AllAtOnceSimulator
from neuron_lens.explain.simulators.attention_pairs import PairSimulator
from neuron_lens.explain.simulators.base import Simulated, Simulator
from neuron_lens.explain.simulators.rule import Rule, RuleSimulator
from neuron_lens.explain.simulators.text import TextSimulator
from neuron_lens.llm import Backend, require

__all__ = [
    "AllAtOnceSimulator",
    "PairSimulator",
    "Rule",
    "RuleSimulator",
    "Simulated",
    "Simulator",
    "TextSimulator",
    "simulator_for",
]


def simulator_for(backend: Backend | None) -> Simulator:
    """The simulator that suits the backend: all at once where it reports log-probabilities of a prompt, else by text.

    Raises BackendError, by name, when it can do neither.
    """
    if backend is None:
        raise RequestError("simulation asks a judge: give it a backend (see neuron_lens.llm)")
    if not backend.capabilities.lacking(AllAtOnceSimulator.needs):
        most = backend.capabilities.max_top_logprobs
        return AllAtOnceSimulator(alternatives=min(AllAtOnceSimulator.alternatives, most))
    require(backend, TextSimulator.needs, "simulation by text (all at once needs prompt_logprobs)")
    return TextSimulator()
