"""Requests at attention patterns and scores as declared interventions. The causal mask is never undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens import interventions as engine
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.positions import resolve_positions
from neuron_lens.faces.hooked_model.requests import Batch, Intervention

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["compiled_pattern"]

Chosen = tuple[int, ...] | None  # absolute positions; None for all


def compiled_pattern(request: Intervention, model: Transformer, batch: Batch) -> list[engine.Intervention]:
    """One declared intervention for each set of rows that means the same queries and keys."""
    made: list[engine.Intervention] = []
    for (queries, keys), rows in _by_row(request, batch).items():
        at: dict[str, Any] = {
            "layers": request.place.layer,
            "heads": request.place.head,
            "positions": queries,
        }
        if len(rows) < batch.tokens.shape[0]:
            at["rows"] = tuple(rows)
        made.append(_edit(request, model, batch, at, keys))
    return made


def _by_row(request: Intervention, batch: Batch) -> dict[tuple[Chosen, Chosen], list[int]]:
    """The queries and keys meant, and the rows that mean them."""

    def of(groups: Any) -> list[Chosen]:
        listed = list(groups) if isinstance(groups, list | tuple) and not _is_span(groups) else [groups]
        where = resolve_positions(listed, batch.tokens, batch.pad, **batch.options())
        rows = range(batch.tokens.shape[0])
        return [tuple(sorted({p for group in where.positions for p in group[row]})) for row in rows]

    count = batch.tokens.shape[0]
    everything: list[Chosen] = [None] * count
    kind = request.type.removesuffix("_pre_softmax")
    groups = request.token_positions
    if kind == "grid":
        queries, keys = of(groups[0]), of(groups[1])
    elif kind == "columns":
        queries, keys = everything, of(groups)
    elif kind in ("rows", "keep_self"):
        queries, keys = of(groups), everything
    else:
        queries, keys = everything, everything
    found: dict[tuple[Chosen, Chosen], list[int]] = {}
    for row in range(count):
        found.setdefault((queries[row], keys[row]), []).append(row)
    return found


def _is_span(groups: Any) -> bool:
    return isinstance(groups, tuple) and len(groups) == 2 and all(isinstance(e, int | None) for e in groups)


def _edit(
    request: Intervention, model: Transformer, batch: Batch, at: dict[str, Any], keys: Chosen
) -> engine.Intervention:
    before = request.type.endswith("_pre_softmax") or request.place.name == "extract_attn_scores"
    site = "attn.qk_logits" if before else "attn.qk_probs"
    if request.type == "keep_self":
        if request.does != "zero":
            raise RequestError(f"{request.activation}: keep_self cuts all other keys; it goes with zero")
        return engine.AttentionKnockout(**at, keep_self=True)
    if request.does == "zero":
        if before or keys is not None or request.apply_softmax:
            return engine.AttentionKnockout(
                **at,
                keys=keys,
                when="before" if before else "after",
                renormalise=before or request.apply_softmax,
            )
        return engine.Zero(site=site, **at)
    if request.does == "scale":
        factor = request.multiplication_value
        if before and factor < 0:
            raise RequestError(
                f"{request.activation}: a negative factor before the softmax would turn masked scores (-inf) into the largest; "
                f"use a positive one, or scale the pattern after the softmax"
            )
        return engine.Scale(site=site, **at, keys=keys, factor=factor)
    if before or request.does == "resample" or request.does == "add":
        raise RequestError(
            f"{request.activation}: {request.does!r} is not offered {'before the softmax' if before else 'here'}"
        )
    return engine.Patch(
        site=site, **at, keys=keys, source=_pattern_source(request, model, batch, at["positions"], keys)
    )


def _pattern_source(
    request: Intervention, model: Transformer, batch: Batch, queries: Chosen, keys: Chosen
) -> engine.Activations:
    """The pattern to write, whole: [batch or 1, head, pos, key_pos]."""
    length, place = batch.tokens.shape[1], request.place
    if batch.pad is not None:
        raise RequestError(
            f"{request.activation}: writing a pattern needs rows of equal length, without padding"
        )
    value = _pattern_value(request, length)
    rows = torch.arange(length) if queries is None else torch.tensor(queries)
    columns = torch.arange(length) if keys is None else torch.tensor(keys)
    if value.shape[1:] == (rows.numel(), columns.numel()):
        whole = value.new_zeros(value.shape[0], length, length)
        whole[:, rows[:, None], columns[None, :]] = value
    elif value.shape[1:] == (length, length):
        whole = value
    else:
        raise RequestError(
            f"{request.activation}: a pattern of {rows.numel()} queries and {columns.numel()} keys, or of all {length}, was "
            f"expected; got {list(value.shape)}"
        )
    if bool(whole.triu(1).any()):
        raise RequestError(
            f"{request.activation}: the pattern to write lets a query see later keys; make those 0"
        )
    source = whole.new_zeros(whole.shape[0], model.config.n_heads, length, length)
    source[:, place.head] = whole
    return engine.Activations({("attn.qk_probs", place.layer): source})


def _pattern_value(request: Intervention, length: int) -> Tensor:
    if request.does == "mean":
        key = f"avg_{request.activation}"
        if key not in request.source:
            raise RequestError(
                f"{request.activation}: the source has no {key!r}; extract it with avg_over_example=True"
            )
        return torch.as_tensor(request.source[key])
    value = torch.as_tensor(request.patching_values, dtype=torch.float32)
    if value.dim() == 0:
        value = value.expand(length, length).tril()
    return value[None] if value.dim() == 2 else value
