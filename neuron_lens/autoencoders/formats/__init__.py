"""One loader per published format. Each module has NAME, EXPECTS (its files), `recognises` and `load`."""

from __future__ import annotations

from typing import Protocol

from neuron_lens.autoencoders.formats import (
    circuit_tracer,
    cross_layer,
    dictionary_learning,
    gemma_scope,
    llama_scope,
    openai,
    plain_pickles,
    saelens,
    sparsify,
)
from neuron_lens.autoencoders.formats.source import Checkpoint, Loaded, LoadOptions

__all__ = ["FORMATS", "Checkpoint", "Format", "LoadOptions", "Loaded"]


class Format(Protocol):
    """What a module of this package offers."""

    NAME: str
    EXPECTS: str

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Whether these files are of this format."""

    def load(self, checkpoint: Checkpoint, options: LoadOptions) -> Loaded:
        """Config and weights under canonical names. Raises CheckpointError."""


_MODULES: tuple[Format, ...] = (
    saelens,
    openai,
    gemma_scope,
    dictionary_learning,
    sparsify,
    llama_scope,
    circuit_tracer,
    cross_layer,
    plain_pickles,
)

FORMATS: dict[str, Format] = {module.NAME: module for module in _MODULES}
