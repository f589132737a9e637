"""A tokenizer of ours under the attribute names people's code uses (`bos_token_id`, `batch_decode`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from neuron_lens.tokenizers import Tokenizer

__all__ = ["TokenizerView"]


class TokenizerView:
    """What `model.tokenizer` is when no object of another library was given. Everything else is the tokenizer's own."""

    def __init__(self, inner: Tokenizer) -> None:
        self.inner = inner

    @property
    def bos_token_id(self) -> int | None:
        """Id of the BOS token."""
        return self.inner.bos_id

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token."""
        return self.inner.eos_id

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self.inner.pad_id

    @property
    def bos_token(self) -> str | None:
        """Text of the BOS token."""
        return self._text(self.inner.bos_id)

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-text token."""
        return self._text(self.inner.eos_id)

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token."""
        return self._text(self.inner.pad_id)

    def _text(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.inner.decode([token_id])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; with the BOS token where the tokenizer's own policy puts one."""
        return self.inner.encode(text, bos=None if add_special_tokens else False, allowed_special=True)

    def decode(self, token_ids: int | Iterable[int] | Tensor) -> str:
        """Text of an id or of ids."""
        ids = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        return self.inner.decode([ids] if isinstance(ids, int) else list(ids))

    def batch_decode(self, rows: Iterable[Any]) -> list[str]:
        """Text of each row of ids."""
        return [self.decode(row) for row in rows]

    def __len__(self) -> int:
        return self.inner.vocab_size

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return repr(self.inner)
