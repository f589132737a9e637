"""Attention knock-out: some queries may not look at some keys (Geva et al. 2023, arXiv 2304.14767)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.places import At

__all__ = ["AttentionKnockout"]


class AttentionKnockout(Intervention):
    """Cut attention from queries to keys; the causal mask stays as it is.

    positions: the queries (rows of the pattern); None for all.
    keys: the keys (columns of the pattern), absolute positions or counted from the end; None for all.
    cells: pairs (query, key) instead of positions and keys.
    keep_self: a query may always look at itself, whatever keys says.
    when: "before" the softmax (what is left is renormalised by it), or "after" it.
    renormalise: after the softmax, what is left is divided by its sum; False leaves it as it is.
    """

    kind: Literal["attention_knockout"] = "attention_knockout"
    site: Literal["attn.qk_logits", "attn.qk_probs"] = "attn.qk_logits"
    cells: tuple[tuple[int, int], ...] | None = None
    keep_self: bool = False
    when: Literal["before", "after"] = "before"
    renormalise: bool = True

    def __init__(self, **fields: Any) -> None:
        if "site" not in fields:
            fields["site"] = "attn.qk_probs" if fields.get("when") == "after" else "attn.qk_logits"
        super().__init__(**fields)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.when == "after") != (self.site == "attn.qk_probs"):
            raise ValueError(
                "when='before' acts at attn.qk_logits and when='after' at attn.qk_probs; give one of them only"
            )
        if self.cells is not None and (self.keys is not None or self.positions is not None):
            raise ValueError("give cells, or positions and keys")
        if self.cells is not None and (
            not self.cells or any(key > query >= 0 for query, key in self.cells if key >= 0)
        ):
            raise ValueError("cells are pairs (query, key) with the key not after the query, at least one")
        if self.cells is None and self.keys is None and not self.keep_self:
            raise ValueError("all keys of a query cannot be cut: name keys or cells, or set keep_self=True")
        if self.when == "before" and not self.renormalise:
            raise ValueError("the softmax renormalises: renormalise=False needs when='after'")
        return self

    def selects_keys(self) -> bool:
        return False

    def depends_on_place(self) -> bool:
        return True

    def changed(self, x: Tensor, at: At) -> Tensor:
        cut = self._cut(x, at)
        if self.when == "before":
            logits = x.masked_fill(cut, -torch.inf)
            # a query with nothing left would give NaN: the first position always loses all when key 0 is cut
            emptied = logits.isneginf().all(-1, keepdim=True) & ~x.isneginf().all(-1, keepdim=True)
            if bool((emptied if at.meant is None else emptied & at.meant).any()):
                raise RequestError(
                    f"{self.label()}: a query is left with nothing to look at, and a softmax cannot give that; use "
                    f"when='after', renormalise=False, keep_self=True, or leave out the first queries"
                )
            return torch.where(emptied, x, logits)
        left = x.masked_fill(cut, 0.0)
        if not self.renormalise:
            return left
        total = left.sum(-1, keepdim=True)
        before = x.sum(-1, keepdim=True)
        return torch.where(total > 0, left * (before / total.clamp_min(torch.finfo(x.dtype).tiny)), left)

    def _cut(self, x: Tensor, at: At) -> Tensor:
        """Which entries are cut, [pos, key_pos] bool, with padding [batch, 1, pos, key_pos]."""
        query, key = self._positions(x, at)
        if self.cells is not None:
            cut = torch.zeros((), dtype=torch.bool, device=x.device)
            for q, k in self.cells:
                cut = cut | ((query == _absolute(q, at)) & (key == _absolute(k, at)))
        elif self.keys is not None:
            cut = torch.zeros((), dtype=torch.bool, device=x.device)
            for k in self.keys:
                cut = cut | (key == _absolute(k, at))
        else:
            cut = torch.ones((), dtype=torch.bool, device=x.device)
        return cut & (query != key) if self.keep_self else cut

    def _positions(self, x: Tensor, at: At) -> tuple[Tensor, Tensor]:
        """Absolute positions of queries [.., pos, 1] and keys [.., 1, key_pos]; different negatives where padding."""
        if at.positions is not None:
            assert at.keys is not None, "padded rows come with the positions of their keys"
            # -1 would be named by a negative key of a row too short for it; padding looks at itself alone
            query = torch.where(at.positions < 0, _PADDING, at.positions)
            keys = at.keys[:, : x.shape[-1]]
            return query[:, None, :, None], torch.where(keys < 0, _PADDING, keys)[:, None, None, :]
        query = torch.arange(at.start, at.start + x.shape[-2], device=x.device)[:, None]
        return query, torch.arange(x.shape[-1], device=x.device)[None, :]


_PADDING = -(2**31)  # no position that anybody can name


def _absolute(position: int, at: At) -> int | Tensor:
    """A position counted from 0: one int, or for each row one, shaped to compare with [batch, 1, pos, key_pos]."""
    if position >= 0:
        return position
    assert at.ends is not None, "every pass knows where its prompts end"
    return position + (at.ends[:, None, None, None] if isinstance(at.ends, Tensor) else at.ends)
