"""Interventions as data, sweeps over them, patching and attribution.

Reading order: tensors, places, declared, kinds, apply, store, runs; metrics, grid, sweep_plan, sweep_run,
sweep; gradients, attribution; circuits; path_patching, direct_paths; patch_setters, patch_sources, generic_patching,
patching.
"""

from neuron_lens.interventions.apply import capture, mean_activations, to_hooks
from neuron_lens.interventions.attention_knockout import AttentionKnockout
from neuron_lens.interventions.attribution import attribution_patch
from neuron_lens.interventions.circuits import (
    Ablation,
    Circuit,
    CircuitScore,
    Edge,
    GraphShape,
    Units,
    attribute_edges,
    exact_edge_effects,
    run_circuit,
    score_circuit,
)
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.direct_paths import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from neuron_lens.interventions.generic_patching import generic_activation_patch
from neuron_lens.interventions.gradients import grad_at, jacobian_rows, jvp_at, vjp_at
from neuron_lens.interventions.grid import Grid, grid
from neuron_lens.interventions.kinds import (
    Add,
    AddRecorded,
    Clamp,
    Freeze,
    MeanAblate,
    ProjectOut,
    ResampleAblate,
    Scale,
    Set,
    Zero,
    frozen_sites,
)
from neuron_lens.interventions.latents import EditLatents
from neuron_lens.interventions.metrics import (
    CrossEntropy,
    KLDivergence,
    LogitDifference,
    Metric,
    OfLogits,
    TokenLogit,
    TokenProbability,
    TokenRank,
)
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.patching_result import PatchingResult
from neuron_lens.interventions.path_patching import Receiver, Sender, path_patch
from neuron_lens.interventions.places import PerRow, Span, TokenText
from neuron_lens.interventions.runs import RecordedRun, Replay, record, replay
from neuron_lens.interventions.store import load_interventions, save_interventions
from neuron_lens.interventions.sweep import sweep
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.tensors import Activations, TensorData

__all__ = [
    "Ablation",
    "Activations",
    "Add",
    "AddRecorded",
    "AttentionKnockout",
    "Circuit",
    "CircuitScore",
    "Clamp",
    "CrossEntropy",
    "Edge",
    "EditLatents",
    "Freeze",
    "GraphShape",
    "Grid",
    "Intervention",
    "KLDivergence",
    "LogitDifference",
    "MeanAblate",
    "Metric",
    "OfLogits",
    "Patch",
    "PatchingResult",
    "PerRow",
    "ProjectOut",
    "Receiver",
    "RecordedRun",
    "Replay",
    "ResampleAblate",
    "Scale",
    "Sender",
    "Set",
    "Span",
    "SweepResult",
    "TensorData",
    "TokenLogit",
    "TokenProbability",
    "TokenRank",
    "TokenText",
    "Units",
    "Zero",
    "attribute_edges",
    "attribution_patch",
    "capture",
    "exact_edge_effects",
    "frozen_sites",
    "generic_activation_patch",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "grad_at",
    "grid",
    "jacobian_rows",
    "jvp_at",
    "load_interventions",
    "mean_activations",
    "path_patch",
    "record",
    "replay",
    "run_circuit",
    "save_interventions",
    "score_circuit",
    "sweep",
    "to_hooks",
    "vjp_at",
]
