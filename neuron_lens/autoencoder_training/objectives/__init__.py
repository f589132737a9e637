"""What training minimises: one file per objective, chosen by the activation."""

from __future__ import annotations

from neuron_lens.autoencoder_training.objectives.base import Objective, Pass, auxiliary_loss
from neuron_lens.autoencoder_training.objectives.batch_topk import BatchTopKObjective
from neuron_lens.autoencoder_training.objectives.gated import GatedObjective
from neuron_lens.autoencoder_training.objectives.jumprelu import JumpReLUObjective
from neuron_lens.autoencoder_training.objectives.relu import ReLUObjective
from neuron_lens.autoencoder_training.objectives.topk import TopKObjective
from neuron_lens.autoencoder_training.settings import TrainingSettings

__all__ = ["Objective", "Pass", "auxiliary_loss", "build_objective"]

_OBJECTIVES: dict[str, type[Objective]] = {
    "relu": ReLUObjective,
    "topk": TopKObjective,
    "batch_topk": BatchTopKObjective,
    "jumprelu": JumpReLUObjective,
    "gated": GatedObjective,
}


def build_objective(settings: TrainingSettings, variance: float) -> Objective:
    """The objective of a run. variance: total variance of the scaled activations, summed over d_in."""
    return _OBJECTIVES[settings.activation](settings, variance)
