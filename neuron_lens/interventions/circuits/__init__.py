"""Circuits: the graph of edges through the residual stream, their attribution, and running only some of them.

Reading order: nodes, circuit; units, senders; ablation, run; attribution.
"""

from neuron_lens.interventions.circuits.ablation import Ablation
from neuron_lens.interventions.circuits.attribution import attribute_edges, exact_edge_effects
from neuron_lens.interventions.circuits.circuit import Circuit, Edge
from neuron_lens.interventions.circuits.nodes import GraphShape, Node, Port, Units
from neuron_lens.interventions.circuits.run import CircuitScore, circuit_hooks, run_circuit, score_circuit
from neuron_lens.interventions.circuits.senders import sender_outputs

__all__ = [
    "Ablation",
    "Circuit",
    "CircuitScore",
    "Edge",
    "GraphShape",
    "Node",
    "Port",
    "Units",
    "attribute_edges",
    "circuit_hooks",
    "exact_edge_effects",
    "run_circuit",
    "score_circuit",
    "sender_outputs",
]
