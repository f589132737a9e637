"""Runs circuit-tracer's replacement model: python circuit_tracer_peer.py ours|theirs FOLDER OUT.safetensors

"ours" runs it on neuron_lens in the place of transformer_lens, "theirs" on transformer_lens itself, where that is
installed. FOLDER keeps the weights, so that both have the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["ours"]:
    from neuron_lens.compat import install_as_transformer_lens

    install_as_transformer_lens()
elif sys.argv[1:2] == ["theirs"]:
    # transformer_lens 3.9 needs a newer hub library than circuit-tracer was written for
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False

import torch

SIZES = {"d_model": 16, "n_ctx": 32, "d_head": 8, "d_vocab": 40, "device": "cpu", "seed": 0}
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "gpt2": (
        {"n_layers": 3, "act_fn": "gelu", "normalization_type": "LNPre", "original_architecture": "GPT2LMHeadModel"},
        "mlp.hook_in", "mlp.hook_out",
    ),
    "stream": (
        {"n_layers": 2, "act_fn": "gelu", "normalization_type": "LNPre", "original_architecture": "GPT2LMHeadModel"},
        "hook_resid_mid", "hook_mlp_out",
    ),
    "gemma2": (
        {
            "n_layers": 2, "act_fn": "silu", "gated_mlp": True, "normalization_type": "RMS", "final_rms": True,
            "positional_embedding_type": "rotary", "rotary_dim": 8, "n_key_value_heads": 1,
            "use_normalization_before_and_after": True, "output_logits_soft_cap": 30.0,
            "original_architecture": "Gemma2ForCausalLM",
        },
        "ln2.hook_normalized", "hook_mlp_out",
    ),
}  # fmt: skip


def tokenizer(folder: Path) -> Any:
    """A tokenizer of words; from a folder, because transformer_lens reads tokenizers again by their name."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<bos>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 40)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.save_pretrained(folder / "tokenizer")
    return PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def replacement_model(case: str, folder: Path) -> Any:
    from circuit_tracer.replacement_model.replacement_model_transformerlens import (
        TransformerLensReplacementModel,
    )
    from circuit_tracer.transcoder import TranscoderSet
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder
    from safetensors.torch import load_file, save_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    fields, reads, writes = CASES[case]
    cfg = HookedTransformerConfig(**SIZES, **fields)
    weights = folder / f"{case}.safetensors"
    generator = torch.Generator().manual_seed(5)
    if not weights.exists():
        state = HookedTransformer(cfg).state_dict()
        drawn = {
            name: 0.3 * torch.randn(tensor.shape, generator=generator) + (1.0 if name.endswith(".w") else 0.0)
            for name, tensor in state.items()
            # b_in of a gated MLP stands elsewhere in transformer_lens: behind the product
            if tensor.is_floating_point()
            and not (cfg.gated_mlp and name.endswith("b_in"))
            and not name.endswith(("IGNORE", "rotary_sin", "rotary_cos"))
        }
        save_file(drawn, weights)
    transcoders = {}
    generator.manual_seed(6)
    for layer in range(cfg.n_layers):
        one = SingleLayerTranscoder(
            16, 24, torch.nn.functional.relu, layer, dtype=torch.float32, device=torch.device("cpu")
        )
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        transcoders[layer] = one
    # the weights first: circuit-tracer wraps parts, which renames them
    real = TransformerLensReplacementModel(cfg, tokenizer=tokenizer(folder))
    real.load_state_dict(load_file(weights), strict=False)
    real.cfg.tokenizer_name = "words"
    real._configure_replacement_model(TranscoderSet(transcoders, reads, writes))
    return real


def everything(case: str, folder: Path) -> dict[str, torch.Tensor]:
    from circuit_tracer import attribute

    model = replacement_model(case, folder)
    prompt = "w3 w5 w9 w7 w20"
    graph = attribute(prompt, model, max_n_logits=3, batch_size=16)
    tokens = graph.input_tokens
    found = {"adjacency": graph.adjacency_matrix, "tokens": tokens}
    found["logits"], found["features"] = model.get_activations(tokens)
    layers = range(model.cfg.n_layers)
    for name, constrained in (("free", None), ("frozen", layers)):
        for attention in (True, False):
            changed, features = model.feature_intervention(
                tokens, [(0, 2, 5, 3.0)], constrained_layers=constrained, freeze_attention=attention
            )
            found |= {f"{name}/{attention}/logits": changed, f"{name}/{attention}/features": features}
    _, logits, features = model.feature_intervention_generate(
        "w3 w5 w9", [(0, slice(1, None), 5, 3.0)], max_new_tokens=3, do_sample=False, verbose=False
    )
    found |= {"generated/logits": logits, "generated/features": features}
    return {f"{case}/{name}": value.detach().clone().contiguous() for name, value in found.items()}


def main(folder: Path, out: str) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({name: value for case in CASES for name, value in everything(case, folder).items()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3])
