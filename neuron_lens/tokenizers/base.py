"""The interface every tokenizer has here, and the policies they share.

The beginning-of-sequence token (BOS) follows the tokenizer's own policy unless the caller says otherwise, and
is never doubled. Special tokens written in a text are text, unless the caller allows them. Nothing is cut,
padded or cleaned up silently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from neuron_lens.errors import TokenizerError

__all__ = ["Span", "Tokenizer"]

Span = tuple[int, int]  # first character of a token and one past its last one


class Tokenizer(ABC):
    """Text to token ids and back.

    Attributes:
        name: What it was made from, for messages.
        special_tokens: The text of each special token and its id.
        bos_id, eos_id, pad_id: Ids of the special tokens with a role, or None.
        adds_bos: The tokenizer's own policy: whether `encode` starts with `bos_id` by default.
        vocab_size: One more than the largest id. A model's embedding may be longer (padded), never shorter.
        chat_template: The Jinja text its checkpoint writes chats with, or None.
    """

    def __init__(
        self,
        *,
        name: str,
        vocab_size: int,
        special_tokens: dict[str, int],
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
    ) -> None:
        if adds_bos and bos_id is None:
            raise TokenizerError(
                f"the tokenizer {name} is to add a BOS token and has none; set adds_bos to false"
            )
        self.name = name
        self.vocab_size = vocab_size
        self.special_tokens = dict(sorted(special_tokens.items(), key=lambda item: item[1]))
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.adds_bos = adds_bos
        self.chat_template: str | None = None

    def __repr__(self) -> str:
        roles = ", ".join(
            f"{role}={getattr(self, role)}" for role in ("bos_id", "eos_id", "pad_id", "adds_bos")
        )
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size}, {roles})"

    def encode(self, text: str, *, bos: bool | None = None, allowed_special: bool = False) -> list[int]:
        """The token ids of `text`.

        `bos`: put the BOS token first; None follows `adds_bos`. It is not put before a text that already
        starts with it (which takes `allowed_special`). `allowed_special`: special tokens written in the text
        become their ids instead of being text.

        Raises TokenizerError for anything but a string of valid Unicode, and for `bos=True` without a BOS.
        """
        return self._with_bos(self._encode_text(_checked_text(text), allowed_special), bos)

    def offsets(
        self, text: str, *, bos: bool | None = None, allowed_special: bool = False
    ) -> tuple[list[int], list[Span]]:
        """The ids `encode` gives, and for each the characters of `text` it covers, as (start, end).

        Tokens that share a character (bytes of one emoji) all span it; an added BOS spans (0, 0).
        """
        ids, spans = self._encode_spans(_checked_text(text), allowed_special)
        with_bos = self._with_bos(ids, bos)
        return with_bos, [(0, 0)] * (len(with_bos) - len(ids)) + spans

    def token_str(self, token_id: int) -> str:
        """A readable form of one token. Lossy: bytes that are no UTF-8 of their own become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """The readable form of each token; see `token_str`."""
        return [self.token_str(token_id) for token_id in ids]

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included. Raises TokenizerError for an unknown id."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for. Raises TokenizerError for an id that does not exist."""

    @abstractmethod
    def _encode_text(self, text: str, allowed_special: bool) -> list[int]:
        """The ids of a checked text, without any added BOS."""

    @abstractmethod
    def _encode_spans(self, text: str, allowed_special: bool) -> tuple[list[int], list[Span]]:
        """The same ids, with the characters each covers."""

    def _with_bos(self, ids: list[int], bos: bool | None) -> list[int]:
        if not (self.adds_bos if bos is None else bos):
            return ids
        if self.bos_id is None:
            raise TokenizerError(f"bos=True was asked of the tokenizer {self.name}, which has no BOS token")
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _unknown_id(self, token_id: object) -> TokenizerError:
        return TokenizerError(
            f"the tokenizer {self.name} has no token {token_id!r}: ids go from 0 to {self.vocab_size - 1}"
            + ("" if isinstance(token_id, int) else ", as plain integers")
        )


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise TokenizerError(f"expected a text to tokenize, got {type(text).__name__}: {text!r:.80}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"the text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, "
            "which no token stands for; decode the text with errors='replace' first"
        ) from error
    return text
