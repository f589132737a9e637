"""A `tokenizer.json` of the byte-level BPE kind, turned into a tiktoken tokenizer where that is exact.

Converted: a BPE model whose merges agree with its ids (see byte_level), a ByteLevel pre-tokenizer alone or
after one Split, no normalizer or NFC, added tokens matched literally. Everything else raises `NotExact` with
the reason, and the `tokenizers` library does it: add_prefix_space, other normalizers, several pre-tokenizing
steps, dropout, patterns whose meaning differs between the two regular-expression engines, added tokens
that take the spaces around them.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import tiktoken

from neuron_lens.errors import TokenizerError
from neuron_lens.tokenizers.byte_level import ranks_from_merges
from neuron_lens.tokenizers.tiktoken import GPT2_PATTERN, TiktokenTokenizer

__all__ = ["NotExact", "Roles", "tiktoken_from_description"]

# Oniguruma (the library's engine) and tiktoken's differ on line anchors, possessive counts and some escapes.
_DIALECTS_DIFFER = re.compile(r"\{[\d,]+\}\+|\$|(?<!\[)\^|\\[hHRXAzZGbBK]")


class NotExact(Exception):
    """tiktoken would not give the same ids for every text; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The special tokens with a role, as ids, and the BOS policy."""

    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    adds_bos: bool = False


def tiktoken_from_description(description: dict[str, Any], roles: Roles, name: str) -> TiktokenTokenizer:
    """The tokenizer a parsed `tokenizer.json` describes. Raises NotExact, or TokenizerError."""
    model = description["model"]
    _require(model.get("type", "BPE") == "BPE", f"its model is {model.get('type')}, not BPE")
    _require(not model.get("dropout"), "its merges have dropout")
    for field in ("continuing_subword_prefix", "end_of_word_suffix"):
        _require(not model.get(field), f"its model has a {field}")
    pattern = _pattern(_steps(description.get("pre_tokenizer"), "pretokenizers"))
    normalizers = _steps(description.get("normalizer"), "normalizers")
    _require(all(step["type"] == "NFC" for step in normalizers), f"it normalizes by {normalizers!r:.80}")
    added = description.get("added_tokens") or []
    _check_added(added, nfc=bool(normalizers))
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    ranks = ranks_from_merges(
        model["vocab"],
        [(left, right) for left, right in merges],
        [token["content"] for token in added],
        ignore_merges=bool(model.get("ignore_merges")),
    )
    if ranks is None:
        raise NotExact("its merges are not in the order of its ids, or not every token comes from a merge")
    try:
        encoding = tiktoken.Encoding(
            name,
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens={token["content"]: token["id"] for token in added},
        )
    except ValueError as error:
        raise NotExact(f"tiktoken does not read its pattern {pattern!r}") from error
    return TiktokenTokenizer(
        encoding,
        bos_id=roles.bos_id,
        eos_id=roles.eos_id,
        pad_id=roles.pad_id,
        adds_bos=roles.adds_bos,
        always_special=frozenset(token["content"] for token in added if not token.get("special")),
        nfc=bool(normalizers),
    )


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise NotExact(otherwise)


def _steps(part: dict[str, Any] | None, field: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return list(part[field]) if part["type"] == "Sequence" else [part]


def _pattern(steps: list[dict[str, Any]]) -> str:
    """The pattern that cuts a text into the pieces merges stay inside of."""
    kinds = [step["type"] for step in steps]
    _require(kinds in (["ByteLevel"], ["Split", "ByteLevel"]), f"its pre-tokenizers are {kinds}")
    byte_level = steps[-1]
    _require(not byte_level.get("add_prefix_space"), "it puts a space before the text (add_prefix_space)")
    if len(steps) == 1:
        return GPT2_PATTERN if byte_level.get("use_regex", True) else r"(?s:.+)"
    _require(not byte_level.get("use_regex", True), "it cuts the text twice")
    split = steps[0]
    given = split["pattern"]
    pattern = str(given["Regex"]) if "Regex" in given else re.escape(str(given["String"]))
    _require(not _DIALECTS_DIFFER.search(pattern), f"the engines differ on its pattern {pattern!r}")
    manner = (split["behavior"], bool(split.get("invert")))
    if manner == ("Removed", True):
        return pattern  # only what matches is kept, which is what tiktoken does
    _require(manner == ("Isolated", False), f"it splits by {manner}")
    # What lies between two matches is a piece too; tiktoken would drop it.
    return rf"{pattern}|(?s:(?!{pattern}).)+"


def _check_added(added: list[dict[str, Any]], nfc: bool) -> None:
    """Refuse added tokens that are matched by more than their text, or that compete across kinds."""
    kinds: dict[tuple[bool, bool], list[str]] = defaultdict(list)
    for token in added:
        content = token["content"]
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        _require(not flags, f"its added token {content!r} has {' and '.join(flags)}")
        if not content:
            raise TokenizerError("an added token is the empty text; remove it from the tokenizer's files")
        normalized = bool(token.get("normalized")) and nfc
        # A space composes with nothing, so runs of them are found before or after normalizing alike.
        _require(
            not normalized or content.isspace(), f"its added token {content!r} is matched after normalizing"
        )
        kinds[bool(token.get("special")), normalized].append(content)
    for first, second in itertools.permutations(kinds.values(), 2):
        starts = {token[:end] for token in first for end in range(1, len(token) + 1)}
        ends = {token[start:] for token in second for start in range(len(token))}
        _require(starts.isdisjoint(ends), "its special and ordinary added tokens overlap")
        _require(not any(a in b for a in first for b in second), "its added tokens contain each other")
