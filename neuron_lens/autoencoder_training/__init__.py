"""Training and evaluating sparse autoencoders on a model's activations.

Reading order: settings, stream, stored, objectives, optimisation, trainer, checkpoint, evaluation.
"""

from __future__ import annotations

from neuron_lens.autoencoder_training.absorption import ClassAbsorption, measure_absorption
from neuron_lens.autoencoder_training.evaluation import Evaluation, evaluate_autoencoder
from neuron_lens.autoencoder_training.optimisation import Optimisation
from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoder_training.stored import StoredStream
from neuron_lens.autoencoder_training.stream import ActivationStream
from neuron_lens.autoencoder_training.trainer import Trainer, train_autoencoder

__all__ = [
    "ActivationStream",
    "ClassAbsorption",
    "Evaluation",
    "Optimisation",
    "StoredStream",
    "Trainer",
    "TrainingSettings",
    "evaluate_autoencoder",
    "measure_absorption",
    "train_autoencoder",
]
