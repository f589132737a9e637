"""Run inside the environment of easyroutine, never by pytest: `python easyroutine_peer.py FOLDER`.

Writes random Llama checkpoints in FOLDER/<name>/, of equal and grouped heads, and what easyroutine's HookedModel extracts
of each, with and without interventions, in FOLDER/<name>.safetensors under `prompt/request/key`.

easyroutine opens only models whose names it knows, so each checkpoint stands under such a name, relative to the working folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from easyroutine.interpretability import ExtractionConfig, HookedModel, models
from easyroutine.interpretability.hooked_model import HookedModelConfig
from easyroutine.interpretability.interventions import Intervention
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

NAME = "hf-internal-testing/tiny-random-LlamaForCausalLM"
HEADS = {"equal": (4, 4), "grouped": (8, 2)}
PROMPTS = {"long": [3, 9, 1, 14, 7, 20, 2], "short": [5, 11, 8, 2, 6]}
FIELDS = [
    *("embed", "resid_in", "resid_out", "attn_in", "attn_out", "mlp_out", "resid_in_post_layernorm"),
    *("queries", "keys", "values", "head_queries", "head_out", "head_values_projected"),
    *("attn_pattern", "last_layernorm"),
]
# name -> activation, type, positions, factor
REQUESTS: dict[str, tuple[str, str, list[Any], float]] = {
    "stream": ("resid_out_0", "full", ["last"], 0.0),
    "attention": ("attn_out_1", "full", [2], 0.0),
    "mlp": ("mlp_out_1", "full", ["all"], 0.0),
    "keys": ("keys_L1", "full", [1], 0.0),
    "columns": ("pattern_L1H2", "columns", [1, 2], 0.0),
    "halved": ("pattern_L1H2", "columns", [1], 0.5),
}


class Tokens:
    """What easyroutine asks of a tokenizer: a text for each id."""

    @classmethod
    def from_pretrained(cls, *given: Any, **options: Any) -> Tokens:
        return cls()

    def decode(self, ids: Any, **options: Any) -> str:
        return f"<{int(ids)}>"

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> list[str]:
        return [f"<{int(i)}>" for i in ids]


def checkpoint(folder: Path, heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=heads,
        num_key_value_heads=kv_heads, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6) if weight.dim() > 1 else weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)


def flat(cache: Any, under: str, found: dict[str, torch.Tensor]) -> None:
    cache.cpu()
    for key, value in cache.items():
        if isinstance(value, torch.Tensor):
            found[f"{under}/{key}"] = value.detach().contiguous().clone()
        elif key == "last_layernorm":
            found.update({f"{under}/{key}.{name}": x.contiguous().clone() for name, x in value.items()})


def extracted(model: HookedModel, config: ExtractionConfig) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for prompt, ids in PROMPTS.items():
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        asked: dict[str, tuple[list[Any], list[Any]]] = {
            "plain": (["all"], []),
            "spans": (["last", (1, 3), 0], []),
        }
        for request, (activation, kind, positions, factor) in REQUESTS.items():
            edit = Intervention(
                type=kind, activation=activation, token_positions=positions, multiplication_value=factor
            )
            asked[request] = (["all", *(p for p in positions if p != "all")], [edit])
        for request, (where, edits) in asked.items():
            cache = model.forward(
                given, target_token_positions=where, extraction_config=config, interventions=edits
            )
            flat(cache, f"{prompt}/{request}", found)
    return found


def main() -> None:
    models.LlamaTokenizer = Tokens
    folder = Path(sys.argv[1]).resolve()
    config = ExtractionConfig(**{f"extract_{field}": True for field in FIELDS})
    for name, heads in HEADS.items():
        (folder / name).mkdir()
        os.chdir(folder / name)
        checkpoint(Path(NAME), *heads)
        model = HookedModel(HookedModelConfig(model_name=NAME, device_map="cpu", torch_dtype=torch.float32))
        save_file(extracted(model, config), folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
