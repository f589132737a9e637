"""From logits to the next token: penalties, temperature, top-k, top-p, choice. Pure functions, no model.

They are applied in this order, each on logits [batch, d_vocab]; a token that is ruled out has the logit -inf.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["TokenChoice", "draw", "keep_top_k", "keep_top_p", "penalise_frequency", "penalise_repetition"]


def penalise_frequency(logits: Tensor, counts: Tensor, penalty: float) -> Tensor:
    """Logits less `penalty` for each time a token was generated (as the OpenAI API does). counts: [batch, d_vocab]"""
    return logits - penalty * counts


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Positive logits of seen tokens divided by `penalty`, negative ones multiplied (CTRL, arXiv 1909.05858).

    seen: true for tokens of the prompt or generated [batch, d_vocab]
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest logits of each row (and those equal to the k-th); the others become -inf."""
    lowest = logits.topk(min(k, logits.shape[-1]), -1).values[..., -1:]
    return logits.masked_fill(logits < lowest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Only the smallest set of likeliest tokens whose probability reaches p (nucleus sampling, arXiv 1904.09751)."""
    ordered, order = logits.sort(stable=True, dim=-1, descending=True)
    probs = ordered.softmax(-1)
    # a token is dropped when those before it reach p already, so the likeliest always stays
    dropped = probs.cumsum(-1) - probs >= p
    return logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token of each row at which cumulative probability passes `uniform` [batch], in [0, 1). Returns ids
    [batch].

    One number for a row decides its token, whatever stands in the other rows.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    threshold = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    # when rounding lifts the threshold to the very end, the last token that is possible is meant
    last_possible = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.minimum((cumulative <= threshold).sum(-1), last_possible)


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen; made of the functions above.

    temperature: divides the logits; 0 takes the likeliest token. top_k, top_p: None keeps all tokens.
    frequency_penalty: 0 for none. repetition_penalty: 1 for none.

    Raises RequestError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        def is_number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        def is_count(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        top_p_fits = self.top_p is None or (is_number(self.top_p) and 0 < self.top_p <= 1)
        repetition_fits = is_number(self.repetition_penalty) and self.repetition_penalty > 0
        checks = [
            (
                is_number(self.temperature) and self.temperature >= 0,
                "temperature",
                "a number from 0 (greedy) on",
            ),
            (self.top_k is None or is_count(self.top_k), "top_k", "a whole number from 1 on, or None"),
            (top_p_fits, "top_p", "in (0, 1], or None"),
            (is_number(self.frequency_penalty), "frequency_penalty", "a number"),
            (repetition_fits, "repetition_penalty", "a number above 0"),
        ]
        wrong = [
            f"{name} must be {fit}; got {getattr(self, name)!r}" for fits, name, fit in checks if not fits
        ]
        if wrong:
            raise RequestError("; ".join(wrong))

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice depends on tokens that came before."""
        return self.frequency_penalty != 0 or self.repetition_penalty != 1

    def filtered(self, logits: Tensor, counts: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
        """The logits tokens are drawn from, [batch, d_vocab]; of temperature 0, those of which the largest
        is taken.

        counts: times each token was generated; seen: whether it stands in the prompt or was generated; both
        [batch, d_vocab], needed when `counts_tokens`.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            assert seen is not None, "a repetition penalty needs to know which tokens were seen"
            logits = penalise_repetition(logits, seen, self.repetition_penalty)
        if self.frequency_penalty != 0:
            assert counts is not None, "a frequency penalty needs the counts of generated tokens"
            logits = penalise_frequency(logits, counts, self.frequency_penalty)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        return logits if self.top_p is None else keep_top_p(logits, self.top_p)

    def choose(
        self, logits: Tensor, uniform: Tensor, counts: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        """The next token of each row, [batch]. uniform: a number in [0, 1) for each row; unused when greedy."""
        filtered = self.filtered(logits, counts, seen)
        return filtered.argmax(-1) if self.temperature == 0 else draw(filtered, uniform)
