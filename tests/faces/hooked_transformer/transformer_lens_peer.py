"""Runs in the environment of transformer-lens: python transformer_lens_peer.py FAMILY FOLDER OUT.safetensors

Loads the Hugging Face model of FOLDER into transformer_lens's HookedTransformer, raw and processed, and writes down
everything that is compared.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compared import everything
from families import TOKENS
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained import weight_conversions as convert
from transformers import AutoModelForCausalLM

COMMON = {
    "n_layers": 3,
    "d_model": 32,
    "d_head": 8,
    "n_heads": 4,
    "n_ctx": 32,
    "d_vocab": 60,
    "device": "cpu",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"d_mlp": 128, "act_fn": "gelu_new", "eps": 1e-5, "normalization_type": "LN"},
    "neox": {
        "d_mlp": 64, "act_fn": "gelu", "eps": 1e-5, "normalization_type": "LN", "positional_embedding_type": "rotary",
        "rotary_dim": 2, "rotary_base": 10000, "parallel_attn_mlp": True, "rotary_adjacent_pairs": False,
    },
    "llama": {
        "d_mlp": 64, "act_fn": "silu", "eps": 1e-6, "normalization_type": "RMS", "positional_embedding_type": "rotary",
        "rotary_dim": 8, "rotary_base": 10000, "gated_mlp": True, "n_key_value_heads": 2, "final_rms": True,
        "rotary_adjacent_pairs": False, "original_architecture": "LlamaForCausalLM",
    },
    "mixtral": {
        "d_mlp": 64, "act_fn": "silu", "eps": 1e-6, "normalization_type": "RMS", "positional_embedding_type": "rotary",
        "rotary_dim": 8, "rotary_base": 1000000, "gated_mlp": True, "n_key_value_heads": 2, "final_rms": True,
        "rotary_adjacent_pairs": False, "num_experts": 4, "experts_per_token": 2, "norm_topk_prob": True,
        "original_architecture": "MixtralForCausalLM",
    },
    "gemma2": {
        "d_mlp": 64, "act_fn": "gelu_pytorch_tanh", "eps": 1e-6, "normalization_type": "RMS", "final_rms": True,
        "positional_embedding_type": "rotary", "rotary_dim": 8, "rotary_base": 10000, "gated_mlp": True,
        "n_key_value_heads": 2, "attn_scale": 8**0.5, "use_attn_scale": True, "use_local_attn": True, "window_size": 4,
        "attn_types": ["local", "global", "local"], "attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0,
        "use_normalization_before_and_after": True, "original_architecture": "Gemma2ForCausalLM",
    },
}  # fmt: skip
CONVERTERS = {"gpt2": "gpt2", "neox": "neox", "llama": "llama", "mixtral": "mixtral", "gemma2": "gemma"}


def build(family: str, folder: str, processed: bool) -> Any:
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    cfg = HookedTransformerConfig.from_dict({**COMMON, **CONFIGS[family]})
    state = getattr(convert, f"convert_{CONVERTERS[family]}_weights")(hf_model, cfg)
    model = HookedTransformer(cfg)
    layer_norm = cfg.normalization_type == "LN"
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed and layer_norm,
        center_unembed=processed and family != "gemma2",
        fold_value_biases=processed,
    )
    return model.eval()


def main() -> None:
    family, folder, out = sys.argv[1:]
    tokens = torch.tensor(TOKENS)
    found: dict[str, torch.Tensor] = {}
    for kind in ("raw", "processed"):
        model = build(family, folder, kind == "processed")
        found |= {f"{kind}/{name}": value for name, value in everything(model, tokens).items()}
    save_file(found, out)


if __name__ == "__main__":
    main()
