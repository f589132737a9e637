"""Byte-level BPE through tiktoken.

tiktoken knows ranks and a pattern; this adds what checkpoints need besides: added tokens that are always
matched in a text (the runs of spaces of GPT-NeoX), Unicode normalization, offsets in characters, and roles.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import tiktoken

from neuron_lens.errors import TokenizerError
from neuron_lens.tokenizers.base import Span, Tokenizer

__all__ = ["GPT2_PATTERN", "TiktokenTokenizer", "bytes_tokenizer"]

# GPT-2's rule for what merges may not cross; the ByteLevel pre-tokenizer's default.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class TiktokenTokenizer(Tokenizer):
    """A tokenizer over a `tiktoken.Encoding`.

    `always_special`: tokens of the encoding's special tokens that are matched in every text, whether or not
    special tokens are allowed; they are ordinary added vocabulary and not in `special_tokens`.
    `nfc`: texts are brought to Unicode normal form C first, added tokens excepted.
    """

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        adds_bos: bool = False,
        always_special: frozenset[str] = frozenset(),
        nfc: bool = False,
    ) -> None:
        # No public method lists the added tokens with their ids.
        added = dict(encoding._special_tokens)
        super().__init__(
            name=encoding.name,
            vocab_size=encoding.n_vocab,
            special_tokens={text: token_id for text, token_id in added.items() if text not in always_special},
            bos_id=bos_id,
            eos_id=eos_id,
            pad_id=pad_id,
            adds_bos=adds_bos,
        )
        self.encoding = encoding
        self.nfc = nfc
        self._added = added
        self._always_pattern = _longest_first(always_special)
        self._allowed_pattern = _longest_first(added)

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        try:
            return self.encoding.decode_single_token_bytes(token_id)
        except (KeyError, OverflowError, TypeError) as error:
            raise self._unknown_id(token_id) from error

    def _encode_text(self, text: str, allowed_special: bool) -> list[int]:
        ids: list[int] = []
        for part, _, added in self._parts(text, allowed_special):
            if added is not None:
                ids.append(added)
            else:
                ids += self.encoding.encode_ordinary(unicodedata.normalize("NFC", part) if self.nfc else part)
        return ids

    def _encode_spans(self, text: str, allowed_special: bool) -> tuple[list[int], list[Span]]:
        ids: list[int] = []
        spans: list[Span] = []
        for part, start, added in self._parts(text, allowed_special):
            if added is not None:
                ids.append(added)
                spans.append((start, start + len(part)))
                continue
            normal = unicodedata.normalize("NFC", part) if self.nfc else part
            part_ids = self.encoding.encode_ordinary(normal)
            part_spans = _byte_spans(normal, [len(self.token_bytes(token_id)) for token_id in part_ids])
            if normal != part:
                sources = _normalization_sources(part)
                part_spans = [(sources[first][0], sources[last - 1][1]) for first, last in part_spans]
            ids += part_ids
            spans += [(start + first, start + last) for first, last in part_spans]
        return ids, spans

    def _parts(self, text: str, allowed_special: bool) -> Iterator[tuple[str, int, int | None]]:
        """The text cut at added tokens: each part, its first character, and the id of an added token."""
        pattern = self._allowed_pattern if allowed_special else self._always_pattern
        position = 0
        for match in pattern.finditer(text) if pattern is not None else ():
            if match.start() > position:
                yield text[position : match.start()], position, None
            yield match.group(), match.start(), self._added[match.group()]
            position = match.end()
        if position < len(text):
            yield text[position:], position, None


def bytes_tokenizer() -> TiktokenTokenizer:
    """A tokenizer of 257 tokens: the 256 bytes by value, and `<|endoftext|>` (256), BOS and EOS at once.

    Enough for models with random weights, where only lengths matter. It adds no BOS by itself.
    """
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s:.)",
        mergeable_ranks={bytes([value]): value for value in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    return TiktokenTokenizer(encoding, bos_id=256, eos_id=256)


def _longest_first(tokens: frozenset[str] | dict[str, int]) -> re.Pattern[str] | None:
    """A pattern for the leftmost, then longest token; None when there are none."""
    if "" in tokens:
        raise TokenizerError("a special token is the empty text; remove it from the tokenizer's files")
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None


def _byte_spans(text: str, lengths: list[int]) -> list[Span]:
    """The characters that successive runs of UTF-8 bytes of `text` touch."""
    starts = [0, *accumulate(len(character.encode("utf-8")) for character in text)]
    ends = list(accumulate(lengths))
    return [
        (bisect_right(starts, end - length) - 1, bisect_right(starts, end - 1))
        for end, length in zip(ends, lengths, strict=True)
    ]


def _normalization_sources(text: str) -> list[Span]:
    """For each character of NFC(text), the characters of `text` it came from.

    The text is cut where normalization of the two sides does not interact: before a character with no
    combining class that the segment so far does not compose with (Unicode Standard Annex 15, section 9.1).
    """
    sources: list[Span] = []
    start = 0
    for end in range(1, len(text) + 1):
        segment = text[start:end]
        normal = unicodedata.normalize("NFC", segment)
        if end < len(text):
            following = text[end]
            joined = unicodedata.normalize("NFC", segment + following)
            if unicodedata.combining(following) or joined != normal + unicodedata.normalize("NFC", following):
                continue
        sources += [(start, end)] * len(normal)
        start = end
    return sources
