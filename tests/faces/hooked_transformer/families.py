"""Small random Hugging Face models of five families; made in either environment from the same configuration."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def make(family: str) -> Any:
    """A model of a family with weights large enough for every part to matter."""
    import torch
    import transformers as t

    torch.manual_seed(7)
    eager = {"attn_implementation": "eager"}
    if family == "gpt2":
        config: Any = t.GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=32, **eager)
        model: Any = t.GPT2LMHeadModel(config)
    elif family == "neox":
        config = t.GPTNeoXConfig(
            **SIZES, max_position_embeddings=32, rotary_pct=0.25, hidden_act="gelu", **eager
        )
        model = t.GPTNeoXForCausalLM(config)
    elif family == "llama":
        config = t.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32, **eager)
        model = t.LlamaForCausalLM(config)
    elif family == "mixtral":
        config = t.MixtralConfig(
            **SIZES, num_key_value_heads=2, max_position_embeddings=32, num_local_experts=4, num_experts_per_tok=2,
            sliding_window=None, rms_norm_eps=1e-6, **eager,
        )  # fmt: skip
        model = t.MixtralForCausalLM(config)
    else:
        config = t.Gemma2Config(
            **SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=32, sliding_window=4,
            query_pre_attn_scalar=8, final_logit_softcapping=30.0, attn_logit_softcapping=50.0, **eager,
        )  # fmt: skip
        model = t.Gemma2ForCausalLM(config)
    model = model.float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if "norm" in name or "ln_" in name else 0.15 * noise)
    return model


TOKENS = [[5, 17, 33, 2, 48, 9, 21, 33, 40, 1], [11, 3, 3, 57, 8, 30, 22, 19, 44, 6]]
