"""Interventions as data, sweeps over them, patching and attribution.

Reading order: tensors, places, declared, kinds, apply, store, runs.
"""

from neuron_lens.interventions.apply import capture, mean_activations, to_hooks
from neuron_lens.interventions.attention_knockout import AttentionKnockout
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.kinds import (
    Add,
    Clamp,
    Freeze,
    MeanAblate,
    Patch,
    ProjectOut,
    ResampleAblate,
    Scale,
    Set,
    Zero,
    frozen_sites,
)
from neuron_lens.interventions.latents import EditLatents
from neuron_lens.interventions.places import PerRow, Span, TokenText
from neuron_lens.interventions.runs import RecordedRun, Replay, record, replay
from neuron_lens.interventions.store import load_interventions, save_interventions
from neuron_lens.interventions.tensors import Activations, TensorData

__all__ = [
    "Activations",
    "Add",
    "AttentionKnockout",
    "Clamp",
    "EditLatents",
    "Freeze",
    "Intervention",
    "MeanAblate",
    "Patch",
    "PerRow",
    "ProjectOut",
    "RecordedRun",
    "Replay",
    "ResampleAblate",
    "Scale",
    "Set",
    "Span",
    "TensorData",
    "TokenText",
    "Zero",
    "capture",
    "frozen_sites",
    "load_interventions",
    "mean_activations",
    "record",
    "replay",
    "save_interventions",
    "to_hooks",
]
