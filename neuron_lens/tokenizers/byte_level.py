"""Byte-level BPE as the Hugging Face files write it, turned into tiktoken's ranks where that is exact.

The files name each byte by a printable character (GPT-2's table) and list merges in order; tiktoken merges
any neighbours whose joined bytes are a token, lowest rank first, and the rank is the id. The two agree on
every text exactly when, for each token of several bytes,

1. merging its own bytes the tiktoken way ends in two parts that are a listed merge (or, with
   `ignore_merges`, does not reach the token at all: both then find it only as a whole piece), and
2. those merges are listed in the order of the ids.

For a pair of neighbours in any text was formed inside its own bytes, in the order in which the token's
bytes alone would have formed it; so the pair is the one of (1), both sides see the same candidates, and (2)
makes them choose the same one. `ranks_from_merges` checks this rather than trusting it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from neuron_lens.errors import TokenizerError

__all__ = ["byte_characters", "character_bytes", "ranks_from_merges"]


def _byte_table() -> dict[int, str]:
    """GPT-2's table: printable Latin-1 stands for itself, the other bytes for U+0100 onwards, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {value: chr(value) for value in printable} | {
        value: chr(0x100 + i) for i, value in enumerate(others)
    }


_CHARACTER_OF = _byte_table()
_BYTE_OF = {character: value for value, character in _CHARACTER_OF.items()}


def byte_characters(data: bytes) -> str:
    """The printable characters that stand for the bytes in vocabulary files."""
    return "".join(_CHARACTER_OF[value] for value in data)


def character_bytes(token: str) -> bytes:
    """The bytes a token of a vocabulary file stands for. Raises TokenizerError for other characters."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError as error:
        raise TokenizerError(f"the token {token!r} holds {error}, which stands for no byte") from error


def ranks_from_merges(
    vocab: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    added: Iterable[str],
    *,
    ignore_merges: bool = False,
) -> dict[bytes, int] | None:
    """tiktoken's ranks for a byte-level vocabulary, or None when tiktoken would not reproduce it exactly.

    `vocab` maps tokens to ids and `merges` lists pairs, both in printable characters; tokens in `added` are
    matched as a whole elsewhere, and left out unless a merge makes them. Raises TokenizerError for
    tokens that stand for no bytes.
    """
    merge_order = {pair: order for order, pair in reversed(list(enumerate(merges)))}
    made = {left + right for left, right in merge_order}
    left_out = set(added) - made
    ranks = {character_bytes(token): rank for token, rank in vocab.items() if token not in left_out}
    if any(bytes([value]) not in ranks for value in range(256)):
        return None  # tiktoken needs every byte; a vocabulary without some has an unknown token
    order_of = {
        (character_bytes(left), character_bytes(right)): order for (left, right), order in merge_order.items()
    }
    latest = -1
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _last_parts(token, ranks)
        if len(parts) > 2:
            if not ignore_merges:
                return None  # tiktoken would find it as a whole piece, the merges never make it
            continue
        order = order_of.get((parts[0], parts[1]), -1)
        if order <= latest:
            return None
        latest = order
    return ranks


def _last_parts(token: bytes, ranks: Mapping[bytes, int]) -> Sequence[bytes]:
    """The parts of `token` before the merge that would complete it; more than two if none would."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best, where = None, 0
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1])
            if rank is not None and (best is None or rank < best):
                best, where = rank, i
        if best is None:
            break
        parts[where : where + 2] = [parts[where] + parts[where + 1]]
    return parts
