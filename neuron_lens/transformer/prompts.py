"""Prompts as people have them: texts, lists of ids, tensors. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["Prompts", "as_ids"]

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor] | Tensor


def as_ids(prompts: Prompts, tokenizer: Any, bos: bool | None) -> tuple[list[list[int]], bool]:
    """Prompts as lists of ids, and whether there is only the one.

    tokenizer: encodes texts; None when there is none. bos: put BOS first; None follows the tokenizer's
        policy.

    Raises RequestError for what is no prompt, for an empty one, and for a text without a tokenizer.
    """
    if isinstance(prompts, str) or (isinstance(prompts, Tensor) and prompts.dim() == 1):
        return [_one_as_ids(prompts, tokenizer, bos)], True
    if isinstance(prompts, Tensor):
        if prompts.dim() != 2 or not _holds_whole_numbers(prompts):
            raise RequestError(
                f"prompt ids must be whole numbers [pos] or [batch, pos]; got {_shown(prompts)}"
            )
        prompts = list(prompts)
    if not isinstance(prompts, list | tuple) or not prompts:
        raise RequestError(
            f"expected at least one prompt: a text, ids, or a list of these; got {_shown(prompts)}"
        )
    if all(isinstance(entry, int) for entry in prompts):
        return [_one_as_ids(prompts, tokenizer, bos)], True
    return [_one_as_ids(prompt, tokenizer, bos) for prompt in prompts], False


def _one_as_ids(prompt: Any, tokenizer: Any, bos: bool | None) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError(
                f"the model has no tokenizer for the prompt {prompt[:40]!r}: give ids, or set model.tokenizer"
            )
        ids: list[int] = tokenizer.encode(prompt, bos=bos)
    elif isinstance(prompt, Tensor) and prompt.dim() == 1 and _holds_whole_numbers(prompt):
        ids = prompt.tolist()
    elif isinstance(prompt, list | tuple) and all(
        isinstance(i, int) and not isinstance(i, bool) for i in prompt
    ):
        ids = list(prompt)
    else:
        raise RequestError(f"a prompt must be a text or a list of whole numbers; got {_shown(prompt)}")
    if not ids:
        raise RequestError(
            f"the prompt is empty: {_shown(prompt)} has no tokens; generation needs at least one"
        )
    return ids


def _holds_whole_numbers(ids: Tensor) -> bool:
    return not ids.is_floating_point() and ids.dtype is not torch.bool


def _shown(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
