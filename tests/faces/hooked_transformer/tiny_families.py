"""Configurations of tiny models, one for each way the parts of a model are put together."""

from __future__ import annotations

from neuron_lens.transformer.config import RotaryConfig

ROTARY = {"position": "rotary", "rotary": RotaryConfig(dims=6)}
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "parallel": {"parallel": True, **ROTARY, "tied": False},
    "llama": {**ROTARY, "norm": "rms", "n_kv_heads": 2, "mlp": "gated", "unembed_bias": True},
    "sandwich": {
        **ROTARY,
        "norm": "rms",
        "norm_place": "sandwich",
        "n_kv_heads": 2,
        "mlp": "gated",
        "logit_softcap": 9.0,
    },
    "post": {**ROTARY, "norm": "layer", "norm_place": "post", "mlp": "gated"},
    "attention_only": {"mlp": "none"},
    "granite": {**ROTARY, "norm": "rms", "residual_scale": 0.5, "logit_scale": 0.7, "embedding_scale": 2.0},
}
