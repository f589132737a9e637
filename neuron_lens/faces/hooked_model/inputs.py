"""Inputs as people have them, texts, ids or a dict with an attention mask, as tokens and padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer.prompts import as_ids

__all__ = ["MODEL_INPUTS", "MULTIMODAL", "as_tokens", "padded"]

# Keys of a batch that the model takes; others are the user's own.
MODEL_INPUTS = ("input_ids", "attention_mask")
MULTIMODAL = ("pixel_values", "image_sizes", "images", "pixel_attention_mask", "image_grid_thw")


def as_tokens(inputs: Any, tokenizer: Any, side: Literal["left", "right"]) -> tuple[Tensor, Tensor | None]:
    """Tokens [batch, pos], and true where a column is padding (None where nothing is).

    inputs: a text, a list of texts or of ids, a tensor [pos] or [batch, pos], or a mapping with `input_ids` and, when rows are
        padded, `attention_mask` (1 for real tokens).

    Raises RequestError for what is none of these, and for images.
    """
    if not isinstance(inputs, Mapping) and not hasattr(inputs, "input_ids"):
        return padded(as_ids(inputs, tokenizer, None)[0], side)
    given = dict(inputs)
    images = [name for name in MULTIMODAL if name in given]
    if images:
        raise RequestError(
            f"the inputs hold {images[0]!r}: multimodal models are not offered; give text only"
        )
    unknown = [name for name in given if name not in MODEL_INPUTS]
    if unknown or "input_ids" not in given:
        raise RequestError(
            f"inputs must hold 'input_ids', and 'attention_mask' when rows are padded; got "
            f"{', '.join(map(str, given)) or 'nothing'}"
        )
    tokens, mask = given["input_ids"], given.get("attention_mask")
    if mask is None and not isinstance(tokens, Tensor):
        return padded(as_ids(tokens, tokenizer, None)[0], side)
    tokens, mask = _tensor("input_ids", tokens), None if mask is None else _tensor("attention_mask", mask)
    tokens = tokens[None] if tokens.dim() == 1 else tokens
    if tokens.dim() != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool or not tokens.numel():
        raise RequestError(
            f"input_ids must be whole numbers [batch, pos]; got {tokens.dtype} {list(tokens.shape)}"
        )
    if mask is None:
        return tokens, None
    mask = mask[None] if mask.dim() == 1 else mask
    if mask.shape != tokens.shape:
        raise RequestError(
            f"attention_mask must be {list(tokens.shape)} like input_ids; got {list(mask.shape)}"
        )
    pad = mask == 0
    return tokens, pad if bool(pad.any()) else None


def _tensor(name: str, given: Any) -> Tensor:
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(
            f"{name} must be a tensor [batch, pos], or equally long lists; got {given!r:.80}"
        ) from None


def padded(rows: list[list[int]], side: Literal["left", "right"]) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as one tensor, with padding at a side."""
    longest = max(map(len, rows))
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    pad = torch.ones(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(len(row))
        tokens[index, where] = torch.tensor(row, dtype=torch.long)
        pad[index, where] = False
    return tokens, pad if bool(pad.any()) else None
