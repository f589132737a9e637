"""The tree of hooks: the project's core. Torch, and no model.

Reading order: chain (the contract), run (the context), gradient, conditions, record, tree, sites, autoencoder.
"""

from neuron_lens.hooks.autoencoder import AutoencoderHooks
from neuron_lens.hooks.chain import ConditionalHooks, Handle, Hook, Hooks, Site, WrapperHooks
from neuron_lens.hooks.conditions import AtHeads, AtLayers, AtPositions, AtRows, AtSteps, AtUnits, When
from neuron_lens.hooks.gradient import grad_hook_wrapper
from neuron_lens.hooks.record import Recording
from neuron_lens.hooks.run import Run
from neuron_lens.hooks.sites import (
    AttentionHooks,
    MLPHooks,
    NormalizationHooks,
    ResidualStreamHooks,
    ResidualStreamTorsoHooks,
    TransformerHooks,
)
from neuron_lens.hooks.tree import FwdBwdHooks, HookCollection

__all__ = [
    "AtHeads",
    "AtLayers",
    "AtPositions",
    "AtRows",
    "AtSteps",
    "AtUnits",
    "AttentionHooks",
    "AutoencoderHooks",
    "ConditionalHooks",
    "FwdBwdHooks",
    "Handle",
    "Hook",
    "HookCollection",
    "Hooks",
    "MLPHooks",
    "NormalizationHooks",
    "Recording",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "Run",
    "Site",
    "TransformerHooks",
    "When",
    "WrapperHooks",
    "grad_hook_wrapper",
]
