"""The hand-written transformer. Reading order: config, model, block, attention, mlp, moe, norm, rotary, masks."""

from neuron_lens.transformer.config import ExpertsConfig, RotaryConfig, RotaryScaling, TransformerConfig
from neuron_lens.transformer.kv_cache import KVCache
from neuron_lens.transformer.model import Transformer

__all__ = ["ExpertsConfig", "KVCache", "RotaryConfig", "RotaryScaling", "Transformer", "TransformerConfig"]
