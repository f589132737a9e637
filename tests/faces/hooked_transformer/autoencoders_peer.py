"""Runs in the environment of SAELens: python autoencoders_peer.py FOLDER

FOLDER holds model.safetensors (a classic state dict), config.json, and a folder for each autoencoder; for each
NAME, with and without the error term, NAME.True.safetensors and NAME.False.safetensors are written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

TOKENS = [[5, 17, 33, 2, 48, 9], [11, 3, 3, 57, 8, 30]]
# a point, and what is done to it: only positions from 2 on, one unit
EDITED = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"]


def edit(x: torch.Tensor, hook: Any) -> torch.Tensor:
    x = x.clone()
    x[:, 2:, ..., 1] += 1.5
    return x


def everything(model: Any, sae: Any, at: str, use_error_term: bool) -> dict[str, torch.Tensor]:
    """What is compared, through the interface both libraries have. at: the hook point the autoencoder writes."""
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        found = {"plain": model(tokens)}
        logits, cache = model.run_with_cache_with_saes(tokens, saes=sae, use_error_term=use_error_term)
        found |= {
            "logits": logits,
            "run": model.run_with_saes(tokens, saes=[sae], use_error_term=use_error_term),
        }
        found |= {f"cache/{name}": value for name, value in cache.items() if name != at}
        for point in EDITED:
            with model.saes(sae, use_error_term=use_error_term):
                hooks = [(f"{at}.{point}", edit)]
                found[f"edit/{point}"] = model.run_with_hooks(tokens, fwd_hooks=hooks)
        excluding = {"use_error_term": use_error_term, "exclude_special_tokens": [3, 5, 9]}
        logits, cache = model.run_with_cache_with_saes(tokens, saes=sae, **excluding)
        found["excluding/logits"] = logits
        found |= {f"excluding/{name}": cache[name] for name in cache if "hook_sae" in name}
        found["again"] = model(tokens)
    kept: dict[str, torch.Tensor] = {}

    def keep(gradient: torch.Tensor, hook: Any) -> None:
        kept[f"gradient/{hook.name}"] = gradient.clone()

    names = ["hook_embed", f"{at}.hook_sae_acts_post", f"{at}.hook_sae_output"]
    model.add_sae(sae, use_error_term=use_error_term)
    with model.hooks(bwd_hooks=[(name, keep) for name in names]):
        model(tokens)[:, -1, 3].sum().backward()
    model.reset_saes()
    return {name: value.detach().clone().contiguous() for name, value in (found | kept).items()}


def main(folder: Path) -> None:
    from sae_lens import SAE, HookedSAETransformer
    from safetensors.torch import load_file, save_file
    from transformer_lens import HookedTransformerConfig

    config = json.loads((folder / "config.json").read_text())
    cases = config.pop("cases")
    model = HookedSAETransformer(HookedTransformerConfig(**config, device="cpu")).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    for name, at in cases.items():
        for use_error_term in (True, False):
            sae = SAE.load_from_disk(folder / name, device="cpu")
            found = everything(model, sae, at, use_error_term)
            save_file(found, folder / f"{name}.{use_error_term}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
