"""What a harvest reads: one file for each kind of unit, one interface for all."""

from __future__ import annotations

from neuron_lens.harvest.sources.base import Caught, UnitSource
from neuron_lens.harvest.sources.directions import Direction, DirectionSource
from neuron_lens.harvest.sources.heads import HeadSource
from neuron_lens.harvest.sources.latents import LatentSource, dictionary_of
from neuron_lens.harvest.sources.neurons import NeuronSource

__all__ = [
    "Caught",
    "Direction",
    "DirectionSource",
    "HeadSource",
    "LatentSource",
    "NeuronSource",
    "UnitSource",
    "dictionary_of",
]
