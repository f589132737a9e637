"""Small random models and prompts that the tests of interventions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.apply import capture
from neuron_lens.interventions.tensors import Activations
from neuron_lens.transformer import RotaryConfig, Transformer, TransformerConfig

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {
        "n_kv_heads": 2,
        "norm": "rms",
        "position": "rotary",
        "rotary": RotaryConfig(dims=4),
        "mlp": "gated",
        "activation": "silu",
        "qkv_bias": False,
        "tied": False,
    },
    "parallel": {"parallel": True, "position": "alibi", "windows": (3, None, None)},
    "post": {"norm": "rms", "norm_place": "post", "qk_norm": "full", "residual_scale": 0.5},
    "sandwich": {"norm_place": "sandwich", "attention_softcap": 20.0, "logit_softcap": 10.0},
}


def tiny_model(family: str = "gpt2", *, seed: int = 0, **changes: Any) -> Transformer:
    """Three layers of four heads; weights large enough that interventions matter."""
    sizes = {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_mlp": 24, "d_vocab": 23, "n_ctx": 12}
    model = Transformer(TransformerConfig(**{**sizes, **FAMILIES[family], **changes}), seed=seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(8)
            elif "bias" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.requires_grad_(False)


def prompts(rows: int = 2, length: int = 7, *, seed: int = 0, vocab: int = 23) -> Tensor:
    """Random tokens [rows, length]."""
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def everything(model: Transformer, tokens: Tensor, pad: Tensor | None = None) -> Activations:
    """All activations of a run, sites that never fire left out."""
    absent = model.config.absent_sites()
    paths = [site.path for site in TransformerHooks().sites() if site.path not in absent]
    # per-head inputs exclude hooks inside the norm: they are captured in a run of their own
    inputs = [path for path in paths if path.rsplit(".")[-1] in ("q_in", "k_in", "v_in", "attn_in")]
    rest = [path for path in paths if path not in inputs]
    return Activations({**capture(model, tokens, rest, pad=pad), **capture(model, tokens, inputs, pad=pad)})
