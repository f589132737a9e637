"""Which tokens a request means: the grammar of positions, resolved for every row of a batch by itself.

A position is absolute: 0 is a row's first real token, wherever the padding stands; negative ones count from the row's
end. A request that selects nothing in some row is an error that names the row. Knows tokens, and no model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.image_markers import image_positions
from neuron_lens.interventions import PerRow, TokenText
from neuron_lens.interventions.places import located

__all__ = ["GRAMMAR", "ResolvedPositions", "resolve_positions", "resolve_query_position"]

GRAMMAR = (
    "'last', 'last-k', 'first', 'position-k', 'all', 'all-text', 'special', 'inputs-partition-k', 'random-text[-n]', "
    "'random-inputs-partition-k[-n]', 'all-image', 'start-image', 'end-image', 'last-image', 'random-image[-n]', an int, "
    "a span (start, end), a list of ints, or TokenText(text=…)"
)
_NAMES = (
    "last",
    "first",
    "all",
    "all-text",
    "special",
    "all-image",
    "start-image",
    "end-image",
    "last-image",
    "random-text",
    "random-image",
    "inputs-partition-0",
    "random-inputs-partition-0",
    "position-0",
)
Name = Any  # a request as given: str, int, tuple, list or TokenText


@dataclass(frozen=True, eq=False)
class ResolvedPositions:
    """The positions that groups of a request mean in every row.

    Attributes:
        names: the groups as requested.
        positions: absolute positions of each group in each row, [group][row].
        columns: column of each selected position [batch, selected], the groups one after another; a row that has fewer
            than others repeats its last real column.
        mask: false where a row has fewer positions than others [batch, selected].
        starts: column of each row's position 0 [batch].
    """

    names: tuple[Name, ...]
    positions: tuple[tuple[tuple[int, ...], ...], ...]
    columns: Tensor
    mask: Tensor
    starts: Tensor

    @property
    def rectangular(self) -> bool:
        """True when every group has as many positions in every row."""
        return bool(self.mask.all())

    @property
    def groups(self) -> list[list[int]]:
        """Indices along `columns` of each group."""
        starts, at = [], 0
        for rows in self.positions:
            width = max(map(len, rows))
            starts.append(list(range(at, at + width)))
            at += width
        return starts

    def mapping_index(self, *, averaged: bool = False) -> dict[Any, Any]:
        """Where each group lies along dimension 1 of what is extracted."""
        if averaged:
            return {**{hashable(name): [i] for i, name in enumerate(self.names)}, "info": "avg"}
        return dict(zip(map(hashable, self.names), self.groups, strict=True))

    def row_mapping(self, row: int) -> dict[Any, list[int]]:
        """The same for one row by itself, whose selected positions stand one after another."""
        mapping: dict[Any, list[int]] = {}
        at = 0
        for name, rows in zip(self.names, self.positions, strict=True):
            mapping[hashable(name)] = list(range(at, at + len(rows[row])))
            at += len(rows[row])
        return mapping

    def token_dict(self) -> dict[Any, list[list[int]]]:
        """Absolute positions of each group, for each row."""
        return {
            hashable(name): [list(row) for row in rows]
            for name, rows in zip(self.names, self.positions, strict=True)
        }

    def require_rectangular(self) -> None:
        """Raises RequestError naming the group and two rows that differ in their number of positions."""
        for name, rows in zip(self.names, self.positions, strict=True):
            for row, positions in enumerate(rows):
                if len(positions) != len(rows[0]):
                    raise RequestError(
                        f"{name!r} selects {len(rows[0])} positions in row 0 and {len(positions)} in row {row}; pass "
                        f"ragged=True to get a list with one tensor for each row, or avg=True and "
                        f"save_logits=False for one mean for each group"
                    )


def resolve_positions(
    request: Sequence[Name],
    tokens: Tensor,
    pad: Tensor | None = None,
    *,
    pivot_positions: Sequence[Any] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> ResolvedPositions:
    """Resolve a list of groups in every row.

    Args:
        request: the groups: names of the grammar (with or without a leading @), ints, spans (start, end) with end
            excluded and None for an open end, lists of ints, `TokenText`.
        tokens: [batch, pos]. pad: true where a column is padding.
        pivot_positions: where `inputs-partition-k` cuts: a list for all rows, or one such list a row, each entry a position, a
            name of the grammar with @ (its first position), or token text (its first occurrence).
        tokenizer: needed for texts, special tokens and image markers.
        seed: of the random names; a row's draw depends on the seed, the name and its own tokens only.

    Raises:
        RequestError: a group that is unknown, given twice, outside a row, or selects nothing in some row.
    """
    if isinstance(request, str | int | TokenText) or not isinstance(request, list | tuple) or not request:
        raise RequestError(
            f"target_token_positions must be a list with at least one group, such as ['last']; got {request!r}"
        )
    names = tuple(request)
    seen = [hashable(name) for name in names]
    twice = next((name for i, name in enumerate(seen) if name in seen[:i]), None)
    if twice is not None:
        raise RequestError(f"the group {twice!r} is requested twice: name it once")
    rows = _rows(tokens, pad, pivot_positions, tokenizer, seed)
    positions = tuple(tuple(_resolved(name, row) for row in rows) for name in names)
    return _with_columns(names, positions, tokens, pad)


def resolve_query_position(
    request: Name, tokens: Tensor, pad: Tensor | None, **options: Any
) -> ResolvedPositions:
    """One group as queries name it: a text that begins with @ is a name of the grammar, other text is token text.

    A text that occurs several times in a row means its first occurrence.
    """
    if isinstance(request, str) and not request.startswith("@"):
        request = TokenText(text=request, which="first")
    return resolve_positions([request], tokens, pad, **options)


def hashable(name: Name) -> Any:
    """A group as a key of `mapping_index`: texts, ints and spans as they are, lists as tuples behind the word."""
    if isinstance(name, list):
        return f"positions {','.join(map(str, name))}"
    if isinstance(name, TokenText):
        return f"text {name.text!r}"
    return (name.start, name.stop) if isinstance(name, slice) else name


@dataclass(frozen=True)
class _Row:
    """One row's real tokens and what names may refer to."""

    index: int
    ids: tuple[int, ...]
    pivots: tuple[Any, ...] | None
    tokenizer: Any
    seed: int

    def fail(self, name: Name, why: str) -> RequestError:
        return RequestError(f"position {name!r}, row {self.index}: {why}")


def _rows(
    tokens: Tensor, pad: Tensor | None, pivots: Sequence[Any] | None, tokenizer: Any, seed: int
) -> list[_Row]:
    batch = tokens.shape[0]
    per_row: list[tuple[Any, ...] | None] = [None] * batch
    if pivots is not None:
        given = pivots.tolist() if isinstance(pivots, Tensor) else pivots
        if isinstance(given, str) or not isinstance(given, list | tuple):
            raise RequestError(f"pivot_positions must be a list of positions; got {given!r:.80}")
        given = [entry.tolist() if isinstance(entry, Tensor) else entry for entry in given]
        nested = bool(given) and all(isinstance(entry, list | tuple) for entry in given)
        if nested and len(given) != batch:
            raise RequestError(f"pivot_positions for {len(given)} rows were given, but the batch has {batch}")
        per_row = [tuple(given[row] if nested else given) for row in range(batch)]
    rows = []
    for index in range(batch):
        ids = tokens[index] if pad is None else tokens[index][~pad[index]]
        rows.append(_Row(index, tuple(ids.tolist()), per_row[index], tokenizer, seed))
        if not rows[-1].ids:
            raise RequestError(f"row {index} has no tokens")
    return rows


def _resolved(name: Name, row: _Row) -> tuple[int, ...]:
    """Absolute positions of one group in one row, at least one."""
    if isinstance(name, str):
        found = _named(name.removeprefix("@"), row, name)
    elif isinstance(name, bool):
        raise RequestError(f"{name!r} is no position; known: {GRAMMAR}")
    elif isinstance(name, int):
        found = [_inside(name, row, name)]
    elif isinstance(name, list):
        found = [_inside(position, row, name) for position in name]
    elif isinstance(name, tuple | slice):
        found = _span(name, row)
    elif isinstance(name, TokenText):
        where = located(name, torch.tensor([row.ids]), None, _tokenizer(row, name))
        found = list(where.positions[0]) if isinstance(where, PerRow) else []
    else:
        raise RequestError(f"{name!r} is no position; known: {GRAMMAR}")
    if not found:
        raise row.fail(name, f"selects nothing in a row of {len(row.ids)} tokens")
    return tuple(found)


def _inside(position: Any, row: _Row, name: Name) -> int:
    size = len(row.ids)
    if not isinstance(position, int) or isinstance(position, bool):
        raise row.fail(name, f"{position!r} is not a whole number")
    if not -size <= position < size:
        raise row.fail(name, f"the row has {size} tokens, positions {-size} to {size - 1}")
    return position % size


def _span(name: Any, row: _Row) -> list[int]:
    ends = (name.start, name.stop) if isinstance(name, slice) else name
    if len(ends) != 2 or any(isinstance(e, bool) or not isinstance(e, int | None) for e in ends):
        raise row.fail(
            name, "a span is (start, end), two whole numbers with the end excluded, or None for an open end"
        )
    size = len(row.ids)
    start, end = (None if e is None else e + size if e < 0 else e for e in ends)
    low, high = 0 if start is None else start, size if end is None else end
    if not 0 <= low < high <= size:
        raise row.fail(name, f"spans {low} to {high} (excluded), which is no part of {size} tokens")
    return list(range(low, high))


def _named(name: str, row: _Row, given: str) -> list[int]:
    """The positions of a name of the grammar; may be empty."""
    size = len(row.ids)
    if name == "first":
        return [0]
    if name in ("all", "last"):
        return list(range(size)) if name == "all" else [size - 1]
    if name in ("special", "all-text", "all-image", "start-image", "end-image", "last-image"):
        return _marked(name, row, given)
    if match := re.fullmatch(r"last-(\d+)", name):
        return [_inside(-int(match[1]) if int(match[1]) else size, row, given)]
    if match := re.fullmatch(r"position-(\d+)", name):
        return [_inside(int(match[1]), row, given)]
    if match := re.fullmatch(r"(?:inputs-partition|position-group)-(\d+)", name):
        return _partition(int(match[1]), row, given)
    if match := re.fullmatch(r"random-(text|image)(?:-(\d+))?", name):
        return _drawn(_marked(f"all-{match[1]}", row, given), match[2], row, given)
    if match := re.fullmatch(r"random-(?:inputs-partition|position-group)-(\d+)(?:-(\d+))?", name):
        return _drawn(_partition(int(match[1]), row, given), match[2], row, given)
    raise RequestError(f"{given!r} is no position: {did_you_mean(name, _NAMES)} Known: {GRAMMAR}")


def _marked(name: str, row: _Row, given: str) -> list[int]:
    """Positions that special tokens define."""
    if name == "all-text":
        if row.tokenizer is None:
            return list(range(len(row.ids)))
        images = set(image_positions("all-image", row.ids, row.tokenizer) or ())
        return [position for position in range(len(row.ids)) if position not in images]
    tokenizer = _tokenizer(row, given)
    if name == "special":
        special = set(tokenizer.special_tokens.values())
        return [position for position, token in enumerate(row.ids) if token in special]
    found = image_positions(name, row.ids, tokenizer)
    if found is None:
        raise RequestError(f"{given!r}: the tokenizer {tokenizer.name} defines no image markers")
    return found


def _partition(piece: int, row: _Row, given: str) -> list[int]:
    if row.pivots is None:
        if piece:
            raise row.fail(
                given, "there is only partition 0: give pivot_positions (or split_positions) to cut at"
            )
        return list(range(len(row.ids)))
    cuts = sorted(_pivot(pivot, row) for pivot in row.pivots)
    edges = [0, *cuts, len(row.ids)]
    if piece >= len(edges) - 1:
        raise row.fail(
            given, f"the pivots {list(row.pivots)} cut the row into {len(edges) - 1} partitions, from 0"
        )
    return list(range(edges[piece], edges[piece + 1]))


def _pivot(pivot: Any, row: _Row) -> int:
    """The position a pivot names."""
    if isinstance(pivot, str) and not pivot.startswith("@"):
        pivot = TokenText(text=pivot, which="first")
    if isinstance(pivot, bool) or not isinstance(pivot, int | str | TokenText):
        raise row.fail(
            "pivot_positions", f"{pivot!r} is neither a whole number, a name with @, nor token text"
        )
    return _resolved(pivot, row)[0]


def _drawn(pool: list[int], count: str | None, row: _Row, given: str) -> list[int]:
    wanted = 1 if count is None else int(count)
    if not 1 <= wanted <= len(pool):
        raise row.fail(given, f"cannot draw {wanted} of {len(pool)} positions")
    # seeded by text, which python hashes alike everywhere: a row draws in a batch what it draws alone
    return sorted(random.Random(f"{row.seed}/{given.removeprefix('@')}/{row.ids}").sample(pool, wanted))


def _tokenizer(row: _Row, name: Name) -> Any:
    if row.tokenizer is None:
        raise RequestError(f"position {name!r} needs a tokenizer, and the model has none; give numbers")
    return row.tokenizer


def _with_columns(
    names: tuple[Name, ...],
    positions: tuple[tuple[tuple[int, ...], ...], ...],
    tokens: Tensor,
    pad: Tensor | None,
) -> ResolvedPositions:
    batch = tokens.shape[0]
    starts = [0] * batch
    if pad is not None:  # real tokens stand together, so the first real column is all there is to know
        starts = (~pad).long().argmax(-1).tolist()
    lengths = [tokens.shape[1]] * batch if pad is None else (~pad).sum(-1).tolist()
    columns: list[list[int]] = [[] for _ in range(batch)]
    mask: list[list[bool]] = [[] for _ in range(batch)]
    for rows in positions:
        width = max(map(len, rows))
        for row, found in enumerate(rows):
            missing = width - len(found)
            columns[row] += [starts[row] + p for p in found] + [starts[row] + lengths[row] - 1] * missing
            mask[row] += [True] * len(found) + [False] * missing
    device = tokens.device
    return ResolvedPositions(
        names,
        positions,
        torch.tensor(columns, device=device),
        torch.tensor(mask, device=device),
        torch.tensor(starts, device=device),
    )
