"""Tiny checkpoints in the published formats, with the published key names, and their formulas in numpy.

The formulas are written out again here, in float64 and one position at a time, so that a test compares two
independent computations.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

D, S = 6, 16  # width, latents

Arrays = dict[str, np.ndarray]


def random_arrays(seed: int = 0, d_in: int = D, d_latent: int = S, d_out: int | None = None) -> Arrays:
    """Weights under canonical names and orientations, float32, with biases and thresholds that matter."""
    rng = np.random.default_rng(seed)
    d_out = d_out or d_in

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "W_enc": normal(d_in, d_latent),
        "b_enc": 0.3 * normal(d_latent),
        "W_dec": normal(d_latent, d_out),
        "b_dec": normal(d_out),
        "threshold": np.abs(normal(d_latent)) + 0.05,
        "b_gate": 0.5 * normal(d_latent),
        "b_mag": 0.5 * normal(d_latent),
        "r_mag": 0.5 * normal(d_latent),
        "W_skip": normal(d_in, d_out),  # x @ W_skip
    }


def inputs(seed: int = 1, *shape: int) -> torch.Tensor:
    """Activations [*shape or (5, 6)], away from zero mean."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (5, D)), generator=generator) * 2 + 0.5


def tensor(array: np.ndarray) -> torch.Tensor:
    """A contiguous float32 tensor (safetensors refuses views)."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).clone()


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_safetensors(path: Path, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor(array) for name, array in arrays.items()}, path)


def write_pickle(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}
    torch.save(ready, path)


def close(ours: torch.Tensor, reference: np.ndarray) -> None:
    """Equal at float32 rounding."""
    torch.testing.assert_close(ours.detach().double(), torch.from_numpy(reference), rtol=1e-4, atol=1e-4)


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def topk(h: np.ndarray, k: int, rank_by: np.ndarray | None = None) -> np.ndarray:
    """relu of the k largest of each row, by `rank_by`."""
    out = np.zeros_like(h)
    for row in range(len(h)):
        for latent in np.argsort((h if rank_by is None else rank_by)[row])[-k:]:
            out[row, latent] = max(h[row, latent], 0)
    return out


def affine(x: torch.Tensor, a: Arrays, b_pre: np.ndarray | float = 0.0) -> np.ndarray:
    """(x − b_pre) @ W_enc + b_enc in float64."""
    return (x.double().numpy() - b_pre) @ a["W_enc"].astype(float) + a["b_enc"]


def decoded(latents: np.ndarray, a: Arrays) -> np.ndarray:
    """latents @ W_dec + b_dec in float64."""
    return latents @ a["W_dec"].astype(float) + a["b_dec"]


def saelens_cfg(architecture: str, **fields: Any) -> dict[str, Any]:
    """A version 6 config."""
    metadata = {
        "sae_lens_version": "6.5.1",
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_head_index": None,
        "context_size": 128,
        "prepend_bos": True,
    }
    metadata.update(fields.pop("metadata", {}))
    return {
        "architecture": architecture,
        "d_in": D,
        "d_sae": S,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
        **fields,
    }


def write_saelens(folder: Path, arrays: Arrays, names: list[str], cfg: dict[str, Any]) -> Path:
    """A SAELens folder with the arrays of these names; W_skip is stored transposed, as they do."""
    stored = {name: arrays[name].T if name == "W_skip" else arrays[name] for name in names}
    write_safetensors(folder / "sae_weights.safetensors", stored)
    write_json(folder / "cfg.json", cfg)
    return folder


STANDARD = ["W_enc", "b_enc", "W_dec", "b_dec"]
