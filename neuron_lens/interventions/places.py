"""Where an intervention acts: positions in the several ways people name them, and the tensor an edit is given.

Positions are absolute (0 is a row's first real token), counted from the end (negative), a span, the tokens of a
text, or of their own for each row. They become one boolean mask [batch, pos].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtPositions, AtSteps, FwdBwdHooks, Run, Site
from neuron_lens.shapes import Axis

if TYPE_CHECKING:
    from neuron_lens.tokenizers import Tokenizer

__all__ = [
    "At",
    "Frozen",
    "PerRow",
    "Positions",
    "Span",
    "TokenText",
    "keys_meant",
    "located",
    "position_mask",
]


class Frozen(BaseModel):
    """A closed, immutable model whose errors are ours."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise RequestError(f"{type(self).__name__}: {validation_text(error)}") from None


def validation_text(error: ValidationError) -> str:
    """What pydantic found wrong, in one line."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'fields'}: {e['msg'].removeprefix('Value error, ')} (given {e['input']!r:.80})"
        for e in error.errors(include_url=False)
    )


class Span(Frozen):
    """Positions from `start` up to, not including, `stop`; negatives count from the end of the prompt."""

    start: int | None = None
    stop: int | None = None


class TokenText(Frozen):
    """The tokens that spell a text. `which`: the only occurrence (an error when there are more), or which of them.

    `part` says which of the tokens of an occurrence: all, or only the first or last.
    """

    text: str
    which: Literal["only", "first", "last", "all"] = "only"
    part: Literal["all", "first", "last"] = "all"


class PerRow(Frozen):
    """Positions of their own for each row of the batch."""

    positions: tuple[tuple[int, ...], ...]


Positions = tuple[int, ...] | Span | TokenText | PerRow


def read_positions(given: Any) -> Any:
    """Shorthands to the canonical forms: an int, a list, a range, a slice, a text, a long tensor [batch] or [batch, k]."""
    if isinstance(given, bool):
        raise ValueError("positions are whole numbers")
    if isinstance(given, int):
        return (given,)
    if isinstance(given, str):
        return TokenText(text=given)
    if isinstance(given, slice):
        if given.step not in (None, 1):
            return tuple(range(given.start or 0, given.stop, given.step)) if given.stop is not None else given
        return Span(start=given.start, stop=given.stop)
    if isinstance(given, Tensor):
        return PerRow(positions=tuple(map(tuple, given.reshape(given.shape[0], -1).tolist())))
    return tuple(given) if isinstance(given, list | range) else given


def located(spec: Positions, tokens: Tensor, pad: Tensor | None, tokenizer: Tokenizer | None) -> Positions:
    """`spec` with texts replaced by the positions they have in `tokens` [batch, pos].

    Raises RequestError when the text is not in a row, is there more than once with which="only", or no tokenizer is known.
    """
    if not isinstance(spec, TokenText):
        return spec
    if tokenizer is None:
        raise RequestError(
            f"positions by text ({spec.text!r}) need a tokenizer: set model.tokenizer, or give numbers"
        )
    rows = []
    for row in range(tokens.shape[0]):
        ids = tokens[row] if pad is None else tokens[row][~pad[row]]
        rows.append(_find(spec, ids.tolist(), tokenizer, row))
    return PerRow(positions=tuple(rows))


def _find(spec: TokenText, ids: list[int], tokenizer: Tokenizer, row: int) -> tuple[int, ...]:
    """Positions in one row, by the bytes of its tokens, so that split characters are found too."""
    pieces = [tokenizer.token_bytes(token) for token in ids]
    ends, total = [], 0
    for piece in pieces:
        total += len(piece)
        ends.append(total)
    text, wanted = b"".join(pieces), spec.text.encode()
    hits, at = [], text.find(wanted) if wanted else -1
    while at >= 0:
        hits.append(at)
        at = text.find(wanted, at + 1)
    shown = " ".join(repr(piece.decode("utf-8", "replace")) for piece in pieces)
    if not hits:
        raise RequestError(
            f"row {row}: the text {spec.text!r} is not in the prompt, whose tokens are {shown:.300}"
        )
    if spec.which == "only" and len(hits) > 1:
        raise RequestError(
            f"row {row}: the text {spec.text!r} occurs {len(hits)} times; use TokenText(text, which='first', 'last' or 'all')"
        )
    chosen = hits if spec.which == "all" else [hits[-1 if spec.which == "last" else 0]]
    found: list[int] = []
    for hit in chosen:
        span = [i for i, end in enumerate(ends) if end > hit and end - len(pieces[i]) < hit + len(wanted)]
        found += {"all": span, "first": span[:1], "last": span[-1:]}[spec.part]
    return tuple(sorted(set(found)))


def position_mask(
    positions: Positions | None, steps: tuple[int, ...] | None, run: Run, device: torch.device
) -> Tensor:
    """Which columns of a pass are meant, [batch, pos] bool. Padding never is.

    Raises HookError when no row has any of the positions (outside generation), RequestError for texts, which need `located`.
    """
    if isinstance(positions, TokenText):
        raise RequestError(
            f"positions by text ({positions.text!r}) are found in tokens: pass them, to_hooks(…, model, tokens=tokens)"
        )
    selected = run.positions(device) >= 0
    conditions: list[AtPositions | AtSteps] = [] if steps is None else [AtSteps(steps)]
    if positions is not None:
        conditions.append(AtPositions(_for_tree(positions, run)))
    for condition in conditions:
        chosen = FwdBwdHooks(("batch", "pos"), path="positions").append_fwd(condition.append(torch.ones_like))
        selected = selected & chosen(torch.zeros_like(selected), run=run)
    return selected


def _for_tree(positions: Positions, run: Run) -> Any:
    """Positions as the tree's own combinator takes them."""
    if isinstance(positions, Span):
        return slice(positions.start, positions.stop)
    if isinstance(positions, PerRow):
        if len(positions.positions) != run.batch:
            raise RequestError(
                f"positions for {len(positions.positions)} rows were given, but the batch has {run.batch}"
            )
        longest = max(map(len, positions.positions))
        return torch.tensor([row + row[-1:] * (longest - len(row)) for row in positions.positions])
    return list(positions) if not isinstance(positions, TokenText) else None


def keys_meant(named: tuple[int, ...], at: Tensor, ends: int | Tensor) -> Tensor:
    """Where each named key stands, [batch, keys named, key_pos] bool.

    at: absolute position of each key [batch, key_pos], -1 where padding. ends: what negative names count from, one int
    or [batch].
    """
    keys = torch.tensor(named, device=at.device).expand(at.shape[0], -1)
    if not isinstance(ends, Tensor):
        ends = torch.full((at.shape[0],), ends, device=at.device)
    absolute = torch.where(keys < 0, keys + ends[:, None], keys)
    # a name before the first token meets no key; -1, which marks padding, must not either
    return (at[:, None, :] == absolute[:, :, None]) & (at >= 0)[:, None, :]


@dataclass(frozen=True)
class At:
    """What an edit is told of the tensor it changes.

    Attributes:
        site: path and axes of the site. Dimensions are counted from the end: more may stand before them.
        layer: layer, or None outside the blocks.
        start: column of the source run that the tensor's first column aligns with.
        ends: real tokens of the prompt, from which negative positions count: one int, or [batch] when rows differ.
        positions: absolute position of each column [batch, pos], -1 where padding; None without padding.
        keys: absolute position of each column from the prompt's first on, -1 where padding [batch, at least key_pos];
            None when they are 0, 1, 2, …
        meant: which part of the tensor the edit is for, bool, broadcasts to it; None for all of it.
        kept: what another place of the same run held, for a patch that takes it from there.
        autoencoders: by name, for edits of latents.
    """

    site: Site
    layer: int | None
    start: int = 0
    ends: int | Tensor | None = None
    positions: Tensor | None = None
    keys: Tensor | None = None
    meant: Tensor | None = None
    kept: Tensor | None = None
    autoencoders: Any = None

    def dim(self, axis: Axis) -> int:
        """A site's axis, counted from the end."""
        assert self.site.axes is not None, "sites of the tree know their axes"
        return self.site.dim(axis) - len(self.site.axes)
