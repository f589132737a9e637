"""What generation gives: one token at a time, and the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

__all__ = ["Finish", "GeneratedToken", "Generation"]

Finish = Literal["length", "eos", "stop"]


@dataclass(frozen=True, eq=False)
class GeneratedToken:
    """One new token of one row, as `stream` yields it.

    Attributes:
        row: which prompt it continues.
        step: how many tokens were generated before it in this row.
        id: the token.
        text: what it adds to the row's text; a character that is not complete yet, or what may become a stop
            string, comes with a later token. Empty without a tokenizer.
        finish: why the row ends with this token: "length" (max_new_tokens), "eos" or "stop"; None while it goes on.
        logits: what the model gave for this token, before penalties and filters [d_vocab]; None unless asked
            for.
    """

    row: int
    step: int
    id: int
    text: str
    finish: Finish | None
    logits: Tensor | None


@dataclass(frozen=True, eq=False)
class Generation:
    """What one prompt was continued with.

    Attributes:
        prompt_ids: the prompt, without padding.
        ids: the new tokens, with the eos or stop string they end with.
        text: the new text, without them; None when the model has no tokenizer.
        finish: why it ended: "length", "eos" or "stop".
        seed: what the draws came from; sampling again with it repeats them.
        logits: the model's logits for each new token [step, d_vocab]; None unless asked for.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str | None
    finish: Finish
    seed: int
    logits: Tensor | None = None

    @property
    def all_ids(self) -> list[int]:
        """The prompt and what was generated."""
        return self.prompt_ids + self.ids
