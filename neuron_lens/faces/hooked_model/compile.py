"""From requests to declared interventions: names become sites, heads and positions of every row. No arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens import interventions as engine
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.compile_attention import compiled_pattern
from neuron_lens.faces.hooked_model.fields import Place
from neuron_lens.faces.hooked_model.positions import ResolvedPositions, resolve_positions
from neuron_lens.faces.hooked_model.requests import Batch, Intervention, requests_of

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["compiled"]


def compiled(requests: Iterable[Any], model: Transformer, batch: Batch) -> list[engine.Intervention]:
    """The declared interventions of requests, in their order. Declared ones pass as they are.

    Raises RequestError for what is neither, and for what does not fit the model or the prompts.
    """
    declared: list[engine.Intervention] = []
    for request in requests_of(requests):
        if isinstance(request, engine.Intervention):
            declared.append(request)
            continue
        _check_place(request, model)
        if request.place.field.kind == "pattern":
            declared += compiled_pattern(request, model, batch)
        else:
            declared += _compiled_stream(request, model, batch)
    for intervention in declared:
        intervention.check(model.config)
    return declared


def _check_place(request: Intervention, model: Transformer) -> None:
    place, config = request.place, model.config
    heads = config.n_kv_heads if place.field.kind == "kv_head" else config.n_heads
    for what, given, size in (("layer", place.layer, config.n_layers), ("head", place.head, heads)):
        if given is not None and given >= size:
            raise RequestError(
                f"{request.activation}: {what} {given} does not exist: there are {size}, from 0"
            )


def _compiled_stream(request: Intervention, model: Transformer, batch: Batch) -> list[engine.Intervention]:
    place, field = request.place, request.place.field
    where = resolve_positions(list(request.token_positions), batch.tokens, batch.pad, **batch.options())
    at: dict[str, Any] = {"site": field.site, "positions": _per_row(where)}
    if place.layer is not None:
        at["layers"] = place.layer
    if place.head is not None:
        at["heads"] = _site_head(place, model)
    does = request.does
    if does == "zero":
        return [engine.Zero(**at)]
    if does == "scale":
        return [engine.Scale(**at, factor=request.multiplication_value)]
    if does == "resample":
        return _resampled(request, model, batch, where, at)
    if does == "mean":
        source = _filled(_mean(request, model), request, model, batch, where)
        return [engine.MeanAblate(**at, source=source)]
    value = torch.as_tensor(request.patching_values, dtype=model.embed.weight.dtype)
    if value.dim() <= 1:
        vector = _split_heads(value, place, model) if value.dim() else value
        if does == "add":
            return [engine.Add(**at, vector=vector)]
        return [engine.Set(**at, value=vector)]
    value = value[None] if value.dim() == 2 else value
    source = _filled(_whole_site(value, place, model), request, model, batch, where)
    return [engine.AddRecorded(**at, source=source) if does == "add" else engine.Patch(**at, source=source)]


def _per_row(where: ResolvedPositions) -> engine.PerRow:
    """The positions of all groups, row by row."""
    rows = range(where.columns.shape[0])
    return engine.PerRow(
        positions=tuple(tuple(p for group in where.positions for p in group[row]) for row in rows)
    )


def _site_head(place: Place, model: Transformer) -> int:
    """A head's index at its site: query heads read the key/value head of their group."""
    assert place.head is not None, "asked for places with a head"
    shared = place.field.site in ("attn.k", "attn.v") and place.field.kind != "kv_head"
    return place.head // (model.config.n_heads // model.config.n_kv_heads) if shared else place.head


def _split_heads(value: Tensor, place: Place, model: Transformer) -> Tensor:
    """Packed heads [..., heads · d_head] as [..., head, d_head]; other values as they are."""
    if place.field.kind != "packed":
        return value
    if value.shape[-1] % model.config.d_head:
        raise RequestError(
            f"{place.field.key}: the width {value.shape[-1]} is no multiple of d_head {model.config.d_head}"
        )
    return value.unflatten(-1, (-1, model.config.d_head))


def _whole_site(value: Tensor, place: Place, model: Transformer) -> Tensor:
    """Values of a key [n, positions, width] with the axes of its site [n, positions, ...]; other heads are 0 and not used."""
    if value.dim() != 3:
        raise RequestError(
            f"{place.field.key}: values are [batch or 1, positions, width]; got {list(value.shape)}"
        )
    if place.head is None:
        return _split_heads(value, place, model)
    config = model.config
    heads = config.n_kv_heads if place.field.site in ("attn.k", "attn.v") else config.n_heads
    whole = value.new_zeros(*value.shape[:2], heads, value.shape[2])
    whole[:, :, _site_head(place, model)] = value
    return whole


def _filled(
    value: Tensor, request: Intervention, model: Transformer, batch: Batch, where: ResolvedPositions
) -> engine.Activations:
    """A source [batch or 1, pos, ...] that holds values [batch or 1, selected, ...] at their columns."""
    rows, selected = where.columns.shape
    if value.shape[0] not in (1, rows) or value.shape[1] != selected:
        raise RequestError(
            f"{request.activation}: values for {value.shape[0]} rows and {value.shape[1]} positions were given; expected 1 or "
            f"{rows} rows, and the {selected} positions of {list(request.token_positions)}"
        )
    value = value.to(where.columns.device)
    full = value.new_zeros(rows, batch.tokens.shape[1], *value.shape[2:])
    at_row, at_selected = where.mask.nonzero(as_tuple=True)
    full[at_row, where.columns[at_row, at_selected]] = value.expand(rows, *value.shape[1:])[
        at_row, at_selected
    ]
    return engine.Activations({(request.place.field.site, request.place.layer): full})


def _recorded(request: Intervention, key: str) -> Tensor:
    """The source's tensor of a key. Raises RequestError when it is ragged or absent."""
    if key not in request.source:
        raise RequestError(f"{request.activation}: the source has no {key!r}; extract it there")
    value = request.source[key]
    if not isinstance(value, Tensor):
        raise RequestError(
            f"{request.activation}: the source is ragged; extract it at equally many positions in each row"
        )
    return value


def _mean(request: Intervention, model: Transformer) -> Tensor:
    """The mean of the source's examples with the axes of the site, [1, positions, ...]."""
    site = (request.place.field.site, request.place.layer)
    if f"avg_{request.activation}" in request.source:
        return _whole_site(_recorded(request, f"avg_{request.activation}"), request.place, model)
    whole = _whole_site(_recorded(request, request.activation), request.place, model)
    return engine.mean_activations(engine.Activations({site: whole}), over_positions=False)[site]


def _resampled(
    request: Intervention, model: Transformer, batch: Batch, where: ResolvedPositions, at: dict[str, Any]
) -> list[engine.Intervention]:
    """One intervention for each set of columns: the source's examples stand at the columns of the rows they go to."""
    value = _whole_site(_recorded(request, request.activation), request.place, model)
    if value.shape[1] != where.columns.shape[1]:
        raise RequestError(
            f"{request.activation}: the source has {value.shape[1]} positions, {list(request.token_positions)} has "
            f"{where.columns.shape[1]}"
        )
    rows_at: dict[tuple[int, ...], list[int]] = {}
    for row, columns in enumerate(where.columns.tolist()):
        rows_at.setdefault(tuple(columns), []).append(row)
    made: list[engine.Intervention] = []
    for columns, rows in rows_at.items():
        full = value.new_zeros(value.shape[0], batch.tokens.shape[1], *value.shape[2:])
        full[:, list(columns)] = value
        source = engine.Activations({(request.place.field.site, request.place.layer): full})
        made.append(engine.ResampleAblate(**at, rows=tuple(rows), source=source, seed=request.seed))
    return made
