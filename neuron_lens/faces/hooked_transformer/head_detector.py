"""Scores of heads against attention patterns that a text calls for: previous token, duplicate token, induction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.activation_cache import ActivationCache
from neuron_lens.faces.hooked_transformer.model import HookedTransformer

__all__ = [
    "HEAD_NAMES",
    "compute_head_attention_similarity_score",
    "detect_head",
    "detection_pattern_of",
    "get_duplicate_token_head_detection_pattern",
    "get_induction_head_detection_pattern",
    "get_previous_token_head_detection_pattern",
    "get_supported_heads",
]

HEAD_NAMES = ("previous_token_head", "duplicate_token_head", "induction_head")
Measure = Literal["mul", "abs"]
Heads = Sequence[tuple[int, int]] | dict[int, int | Sequence[int]] | None


def detect_head(
    model: HookedTransformer,
    seq: str | Sequence[str],
    detection_pattern: Tensor | str,
    heads: Heads = None,
    cache: ActivationCache | None = None,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    error_measure: Measure = "mul",
) -> Tensor:
    """How well each head's pattern on a text matches a pattern, [layer, head]; of several texts, the mean.

    Args:
        detection_pattern: one of `HEAD_NAMES`, or a lower triangular tensor [pos, pos] for this text.
        heads: only these, as pairs or {layer: heads}; all others score -1.
        cache: of the text, instead of running the model.
        exclude_bos, exclude_current_token: leave out attention to the first token, to the token itself.
        error_measure: "mul" is the share of attention that falls on the pattern; "abs" is 1 − the mean difference.
    """
    if not isinstance(seq, str):
        if isinstance(detection_pattern, Tensor) or cache is not None or not seq:
            raise RequestError("several texts (at least one) need a named pattern and no cache")
        scores = [
            detect_head(
                model,
                text,
                detection_pattern,
                heads,
                exclude_bos=exclude_bos,
                exclude_current_token=exclude_current_token,
                error_measure=error_measure,
            )
            for text in seq
        ]
        return torch.stack(scores).mean(0)
    tokens = model.to_tokens(seq)
    n = tokens.shape[1]
    if n < 2:
        raise RequestError(f"the text has {n} token, too few for a pattern of attention")
    pattern = (
        detection_pattern_of(detection_pattern, tokens[0])
        if isinstance(detection_pattern, str)
        else detection_pattern
    )
    pattern = pattern.to(tokens.device).float()
    if pattern.shape != (n, n) or not torch.equal(pattern, pattern.tril()):
        raise RequestError(
            f"the pattern must be lower triangular [{n}, {n}] for this text; got {list(pattern.shape)}"
        )
    if cache is None:
        with torch.no_grad():
            cache = model.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern")[1]  # type: ignore[assignment]
    assert cache is not None, "just made"
    found = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=torch.float64)
    for layer, head in _pairs(heads, model):
        attention = cache["pattern", layer]
        attention = attention[0, head] if attention.dim() == 4 else attention[head]
        found[layer, head] = compute_head_attention_similarity_score(
            attention.double(),
            pattern.double(),
            exclude_bos=exclude_bos,
            exclude_current_token=exclude_current_token,
            error_measure=error_measure,
        )
    return found.float()


def detection_pattern_of(name: str, tokens: Tensor) -> Tensor:
    """A named pattern for some tokens [pos]. [pos, pos]: query, key; 1 where the head ought to look."""
    if name not in HEAD_NAMES:
        raise RequestError(f"the pattern must be one of {', '.join(HEAD_NAMES)}, or a tensor; got {name!r}")
    n = len(tokens)
    if name == "previous_token_head":
        return torch.diag(torch.ones(n - 1), -1)
    same = (tokens[:, None] == tokens[None, :]).float().tril(-1)
    if name == "duplicate_token_head":
        return same
    # the token after an earlier occurrence: shift right by one key
    shifted = torch.zeros_like(same)
    shifted[:, 1:] = same[:, :-1]
    return shifted.tril()


def get_previous_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """The pattern of "previous_token_head" for ids [pos] or [1, pos]. [pos, pos]"""
    return detection_pattern_of("previous_token_head", tokens.reshape(-1))


def get_duplicate_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """The pattern of "duplicate_token_head" for ids [pos] or [1, pos]. [pos, pos]"""
    return detection_pattern_of("duplicate_token_head", tokens.reshape(-1))


def get_induction_head_detection_pattern(tokens: Tensor) -> Tensor:
    """The pattern of "induction_head" for ids [pos] or [1, pos]. [pos, pos]"""
    return detection_pattern_of("induction_head", tokens.reshape(-1))


def get_supported_heads() -> None:
    """Print the names `detect_head` knows."""
    print(f"Supported heads: {', '.join(HEAD_NAMES)}")


def compute_head_attention_similarity_score(
    attention_pattern: Tensor,
    detection_pattern: Tensor,
    *,
    exclude_bos: bool,
    exclude_current_token: bool,
    error_measure: Measure,
) -> float:
    """The score of one head's pattern [pos, pos], between 0 and 1."""
    if error_measure not in ("mul", "abs"):
        raise RequestError(f"error_measure must be 'mul' or 'abs'; got {error_measure!r}")
    counted = torch.ones_like(attention_pattern)
    if exclude_bos:
        counted[:, 0] = 0
    if exclude_current_token:
        counted.fill_diagonal_(0)
    attention = attention_pattern * counted
    if error_measure == "mul":
        return float((attention * detection_pattern).sum() / attention.sum())
    return 1.0 - float(
        ((attention_pattern - detection_pattern) * counted).abs().mean() * len(detection_pattern)
    )


def _pairs(heads: Heads, model: HookedTransformer) -> list[tuple[int, int]]:
    layers, per_layer = model.cfg.n_layers, model.cfg.n_heads
    if heads is None:
        return [(layer, head) for layer in range(layers) for head in range(per_layer)]
    if isinstance(heads, dict):
        pairs = [
            (layer, h) for layer, some in heads.items() for h in ([some] if isinstance(some, int) else some)
        ]
    else:
        pairs = list(heads)
    wrong = [pair for pair in pairs if not (0 <= pair[0] < layers and 0 <= pair[1] < per_layer)]
    if wrong:
        raise RequestError(f"no such heads: {wrong}; the model has {layers} layers of {per_layer}")
    return pairs
