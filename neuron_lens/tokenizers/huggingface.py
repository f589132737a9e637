"""Tokenizers of the `tokenizers` library (extra `hf`).

Those are SentencePiece-like BPE, Unigram, WordPiece, and byte-level BPE that tiktoken cannot reproduce.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from neuron_lens.errors import TokenizerError
from neuron_lens.tokenizers.base import Span, Tokenizer
from neuron_lens.tokenizers.byte_level import character_bytes

__all__ = ["HuggingFaceTokenizer"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer over a `tokenizers.Tokenizer`, which is copied and never changed.

    Its post-processor is not run: the BOS token is this interface's to add, and nothing is added at the end.
    Truncation and padding set on the given object are left out: nothing is cut silently.
    """

    def __init__(
        self,
        backend: Any,
        *,
        name: str,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
    ) -> None:
        description = backend.to_str()
        added = backend.get_added_tokens_decoder()
        super().__init__(
            name=name,
            vocab_size=max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
            special_tokens={token.content: token_id for token_id, token in added.items() if token.special},
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            adds_bos=adds_bos,
        )
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._plain = _fresh_copy(type(backend), description)
        # The switch is state of the backend, so texts with and without special tokens have one each.
        self._plain.encode_special_tokens = True
        self._allowing = _fresh_copy(type(backend), description)
        self._allowing.encode_special_tokens = False
        decoders = _types(json.loads(description).get("decoder"))
        self._byte_level = "ByteLevel" in decoders
        self._byte_fallback = "ByteFallback" in decoders

    def decode(self, ids: Sequence[int]) -> str:
        for token_id in ids:
            self._token(token_id)
        return str(self._allowing.decode(list(ids), skip_special_tokens=False))

    def token_bytes(self, token_id: int) -> bytes:
        token = self._token(token_id)
        if token_id in self._added:
            return token.encode("utf-8")
        if self._byte_level:
            return character_bytes(token)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode("utf-8")

    def _token(self, token_id: int) -> str:
        try:
            token = self._plain.id_to_token(token_id)
        except (TypeError, OverflowError) as error:
            raise self._unknown_id(token_id) from error
        if token is None:
            raise self._unknown_id(token_id)
        return str(token)

    def _encode_text(self, text: str, allowed_special: bool) -> list[int]:
        return list(self._encoding(text, allowed_special).ids)

    def _encode_spans(self, text: str, allowed_special: bool) -> tuple[list[int], list[Span]]:
        encoding = self._encoding(text, allowed_special)
        return list(encoding.ids), [(start, end) for start, end in encoding.offsets]

    def _encoding(self, text: str, allowed_special: bool) -> Any:
        backend = self._allowing if allowed_special else self._plain
        return backend.encode(text, add_special_tokens=False)


def _fresh_copy(kind: Any, description: str) -> Any:
    try:
        copy = kind.from_str(description)
    except Exception as error:  # the library raises plain Exception for a description it cannot read
        raise TokenizerError(f"the tokenizer cannot be copied: {error}") from error
    copy.no_truncation()
    copy.no_padding()
    return copy


def _types(part: Any) -> set[str]:
    """The types of a tokenizer.json part and of those nested in it."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_types, part.values()))
