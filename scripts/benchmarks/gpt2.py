"""A GPT-2 of random weights, written as transformers saves it, and opened by each library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = [
    "SMALL",
    "TINY",
    "open_ours",
    "open_transformer_lens",
    "open_transformers",
    "tokens_of",
    "write_gpt2",
]

SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 97, "n_positions": 128}


def write_gpt2(sizes: dict[str, int], folder: Path) -> None:
    """Write `config.json` and `model.safetensors`; weights are drawn with a fixed seed."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Any:
        return torch.randn(shape, generator=generator) * 0.05

    d = sizes["n_embd"]
    state = {"wte.weight": weight(sizes["vocab_size"], d), "wpe.weight": weight(sizes["n_positions"], d)}
    for layer in range(sizes["n_layer"]):
        shapes = {
            "attn.c_attn": (d, 3 * d),
            "attn.c_proj": (d, d),
            "mlp.c_fc": (d, 4 * d),
            "mlp.c_proj": (4 * d, d),
        }
        for name, (rows, columns) in shapes.items():
            state[f"h.{layer}.{name}.weight"] = weight(rows, columns)
            state[f"h.{layer}.{name}.bias"] = weight(columns)
        for name in ("ln_1", "ln_2"):
            state[f"h.{layer}.{name}.weight"], state[f"h.{layer}.{name}.bias"] = 1 + weight(d), weight(d)
    state["ln_f.weight"], state["ln_f.bias"] = 1 + weight(d), weight(d)
    save_file(
        {f"transformer.{name}": t for name, t in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None, **sizes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def tokens_of(sizes: dict[str, int], batch: int, length: int) -> Any:
    """Token ids [batch, pos], the same in every environment."""
    import torch

    return (torch.arange(batch * length) * 7919 % sizes["vocab_size"]).reshape(batch, length)


def open_ours(folder: Path) -> Any:
    """The model in neuron_lens."""
    from neuron_lens.transformer import Transformer

    return Transformer.load(str(folder), tokenizer=None).eval()


def open_transformers(folder: Path) -> Any:
    """The model in transformers, with its fused attention."""
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="sdpa").eval()


def open_transformer_lens(folder: Path, kind: type[Any] | None = None) -> Any:
    """The model in transformer-lens, its weights as they are; `kind` stands in for HookedTransformer."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2LMHeadModel

    sizes = json.loads((folder / "config.json").read_text())
    cfg = HookedTransformerConfig(
        n_layers=sizes["n_layer"], d_model=sizes["n_embd"], n_ctx=sizes["n_positions"], n_heads=sizes["n_head"],
        d_head=sizes["n_embd"] // sizes["n_head"], d_vocab=sizes["vocab_size"], act_fn="gelu_new", device="cpu",
    )  # fmt: skip
    model = (kind or HookedTransformer)(cfg)
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    weights = convert_gpt2_weights(GPT2LMHeadModel.from_pretrained(folder), cfg)
    model.load_and_process_state_dict(weights, **dict.fromkeys(steps, False))
    return model.eval()
