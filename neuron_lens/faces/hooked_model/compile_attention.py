"""Requests at attention patterns and scores as declared interventions. The causal mask is never undone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens import interventions as engine
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.pattern_values import PatternValues
from neuron_lens.faces.hooked_model.positions import ResolvedPositions, resolve_positions
from neuron_lens.faces.hooked_model.requests import Batch, Intervention

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["compiled_pattern"]

Chosen = tuple[int, ...] | None  # absolute positions in the order of the request; None for all


def compiled_pattern(request: Intervention, model: Transformer, batch: Batch) -> list[engine.Intervention]:
    """One declared intervention for each set of rows that means the same queries and keys.

    What is written or added stands at the prompt's own queries and keys; what is cut or scaled goes on while generating.
    """
    meant = _meant_by_row(request, batch)
    if request.does in ("zero", "scale"):
        return [_cut_or_scaled(request, at, keys) for at, keys in _places(request, meant)]
    return _written(request, model, batch, meant)


def acts_before(request: Intervention) -> bool:
    """Whether a request acts at the scores, before the softmax."""
    return request.type.endswith("_pre_softmax") or request.place.name == "extract_attn_scores"


def _meant_by_row(request: Intervention, batch: Batch) -> list[tuple[Chosen, Chosen]]:
    """The queries and keys meant in each row."""

    def of(groups: Any) -> list[Chosen]:
        listed = list(groups) if isinstance(groups, list | tuple) and not _is_span(groups) else [groups]
        where = resolve_positions(listed, batch.tokens, batch.pad, **batch.options())
        return [_of_row(where, row) for row in range(batch.tokens.shape[0])]

    everything: list[Chosen] = [None] * batch.tokens.shape[0]
    groups = request.token_positions
    queries, keys = everything, everything
    kind = request.type.removesuffix("_pre_softmax")
    if kind == "grid":
        queries, keys = of(groups[0]), of(groups[1])
    elif kind == "columns":
        keys = of(groups)
    elif kind in ("rows", "keep_self"):
        queries = of(groups)
    return list(zip(queries, keys, strict=True))


def _of_row(where: ResolvedPositions, row: int) -> tuple[int, ...]:
    return tuple(position for group in where.positions for position in group[row])


def _is_span(groups: Any) -> bool:
    return isinstance(groups, tuple) and len(groups) == 2 and all(isinstance(e, int | None) for e in groups)


def _places(request: Intervention, meant: list[tuple[Chosen, Chosen]]) -> list[tuple[dict[str, Any], Chosen]]:
    """Where each set of rows is edited, and its keys."""
    alike: dict[tuple[Chosen, Chosen], list[int]] = {}
    for row, (queries, keys) in enumerate(meant):
        alike.setdefault((_unique(queries), _unique(keys)), []).append(row)
    places = []
    for (queries, keys), rows in alike.items():
        at = {**_head(request), "positions": queries}
        places.append((at if len(alike) == 1 else {**at, "rows": tuple(rows)}, keys))
    return places


def _unique(chosen: Chosen) -> Chosen:
    return None if chosen is None else tuple(sorted(set(chosen)))


def _head(request: Intervention) -> dict[str, Any]:
    return {"layers": request.place.layer, "heads": request.place.head}


def _cut_or_scaled(request: Intervention, at: dict[str, Any], keys: Chosen) -> engine.Intervention:
    before = acts_before(request)
    site = "attn.qk_logits" if before else "attn.qk_probs"
    if request.type == "keep_self":
        if request.does != "zero":
            raise RequestError(f"{request.activation}: keep_self cuts all other keys; it goes with zero")
        return engine.AttentionKnockout(**at, keep_self=True)
    if request.does == "scale":
        factor = request.multiplication_value
        if before and factor < 0:
            raise RequestError(
                f"{request.activation}: a negative factor before the softmax would turn masked scores (-inf) into the largest; "
                f"use a positive one, or scale the pattern after the softmax"
            )
        return engine.Scale(site=site, **at, keys=keys, factor=factor)
    if before or keys is not None or request.apply_softmax:
        return engine.AttentionKnockout(
            **at,
            keys=keys,
            when="before" if before else "after",
            renormalise=before or request.apply_softmax,
        )
    return engine.Zero(site=site, **at)


def _written(
    request: Intervention, model: Transformer, batch: Batch, meant: list[tuple[Chosen, Chosen]]
) -> list[engine.Intervention]:
    """Values written, added or drawn: laid out at the columns of the rows they go to, the same keys together."""
    if request.type == "keep_self":
        raise RequestError(f"{request.activation}: keep_self cuts all other keys; it goes with zero")
    before = acts_before(request)
    values = PatternValues.of(request, before=before)
    layout = _Layout(batch)
    cells = [
        (layout.all_of(row) if queries is None else queries, layout.all_of(row) if keys is None else keys)
        for row, (queries, keys) in enumerate(meant)
    ]
    alike: dict[Any, list[int]] = {}
    for row, (queries, keys) in enumerate(cells):
        # a draw of other examples is made for rows that lie alike; all else is laid out row by row
        lying = (queries, keys, layout.starts[row]) if request.does == "resample" else ()
        alike.setdefault((_unique(keys), lying), []).append(row)
    site = "attn.qk_logits" if before else "attn.qk_probs"
    made: list[engine.Intervention] = []
    for (keys, _), rows in alike.items():
        source = layout.laid_out(values, cells, rows, per_row=request.does != "resample")
        at: dict[str, Any] = {
            **_head(request),
            "site": site,
            "keys": keys,
            "positions": engine.PerRow(positions=tuple(queries for queries, _ in cells)),
            "source": engine.Activations({(site, request.place.layer): source}),
        }
        if len(alike) > 1:
            at["rows"] = tuple(rows)
        if request.does == "resample":
            made.append(engine.ResampleAblate(**at, seed=request.seed))
        else:
            made.append(engine.AddRecorded(**at) if request.does == "add" else engine.Patch(**at))
    return made


class _Layout:
    """Where the real tokens of each row stand."""

    def __init__(self, batch: Batch) -> None:
        rows, self.columns = batch.tokens.shape
        self.starts, self.lengths = [0] * rows, [self.columns] * rows
        if batch.pad is not None:
            self.starts = (~batch.pad).long().argmax(-1).tolist()
            self.lengths = (~batch.pad).sum(-1).tolist()

    def all_of(self, row: int) -> tuple[int, ...]:
        """Every position of a row."""
        return tuple(range(self.lengths[row]))

    def laid_out(
        self,
        values: PatternValues,
        cells: list[tuple[tuple[int, ...], tuple[int, ...]]],
        rows: list[int],
        *,
        per_row: bool,
    ) -> Tensor:
        """Values of some rows at the columns of a pass: [batch, 1, pos, key_pos], or [example, 1, pos, key_pos]."""
        longest = max(self.lengths)
        if not per_row:
            queries, keys = cells[rows[0]]
            examples = [values.at(i, queries, keys, longest, rows[0]) for i in range(values.examples)]
            whole = torch.zeros(len(examples), 1, self.columns, self.columns)
            whole[:, 0, *self._grid(rows[0], queries, keys)] = torch.stack(examples)
            return whole
        if values.examples not in (1, len(cells)):
            raise RequestError(
                f"{values.label}: values for {values.examples} rows were given; expected 1, or {len(cells)} rows"
            )
        whole = torch.zeros(len(cells), 1, self.columns, self.columns)
        for row in rows:
            queries, keys = cells[row]
            example = 0 if values.examples == 1 else row
            whole[row, 0, *self._grid(row, queries, keys)] = values.at(example, queries, keys, longest, row)
        return whole

    def _grid(self, row: int, queries: tuple[int, ...], keys: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        start = self.starts[row]
        return torch.tensor(queries)[:, None] + start, torch.tensor(keys)[None, :] + start
