"""Ablation and patching queries as tables: dicts, lists of dicts, or data frames, turned into `Intervention`s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.fields import named_place
from neuron_lens.faces.hooked_model.positions import hashable
from neuron_lens.faces.hooked_model.requests import Intervention
from neuron_lens.interventions import TokenText

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["ablations", "patches", "query_group", "query_rows"]

# Type of an older ablation query -> the intervention: what it acts at, its type, its positions (None: elem-to-ablate).
OLDER_ABLATIONS: dict[str, tuple[str, str, Any]] = {
    "std": ("pattern_L{}H{}", "columns", None),
    "full-head": ("pattern_L{}H{}", "full", ("all",)),
    "keep-self-attn": ("pattern_L{}H{}", "keep_self", None),
    "block-img-txt": ("pattern_L{}H{}", "grid", (["all-text"], ["all-image"])),
    "block-img-img": ("pattern_L{}H{}", "grid", (["all-image"], ["all-image"])),
    "flash-attn": ("head_values_L{}H{}", "full", None),
}
# Types that named a pixtral model's image tokens, or what never worked.
REFUSED_ABLATIONS = {
    "block-img-txt-wout-special-pixtral": "use an activation pattern_L{}H{} with type 'grid' and the positions you mean",
    "flash-block-img-txt": "use 'block-img-txt': patterns are always there",
    "flash-block-img-img": "use 'block-img-img': patterns are always there",
    "mean": "use an activation (head_z_L{}H{}) with operation 'mean' and a source",
}
ABLATION_COLUMNS = (
    "activation",
    "layers",
    "heads",
    "type",
    "token_positions",
    "operation",
    "value",
    "factor",
    "source",
    "seed",
    "apply_softmax",
)
OLDER_COLUMNS = ("type", "head-layer-couple", "elem-to-ablate")
PATCH_COLUMNS = {
    "patching_elem": "patching_elem",
    "pos_token_to_patch": "patching_elem",
    "layers_to_patch": "layers_to_patch",
    "layer": "layers_to_patch",
    "activation_type": "activation_type",
    "patching_activations": "patching_activations",
    "base_activation_index": "base_activation_index",
}


def query_rows(given: Any, what: str) -> list[dict[str, Any]]:
    """Queries as a list of dicts. Raises RequestError for anything else, and for an empty table."""
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        given = given.to_dict("records")
    rows = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, list | tuple) else None
    if not rows or any(not isinstance(row, Mapping) for row in rows):
        raise RequestError(
            f"{what} must be a dict, a list of dicts or a data frame, with at least one row; got {given!r:.80}"
        )
    # a data frame fills what a row leaves out with NaN
    return [{str(k): v for k, v in row.items() if not _missing(v)} for row in rows]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def ablations(given: Any, model: Transformer) -> list[Intervention]:
    """The interventions of ablation queries.

    A query names what it acts at: `activation`, a key (`head_out_L3H5`) or a key with `{}` for the layer and the head
    (`head_out_L{}H{}`), filled from `layers` and `heads` (an int, a list, or "all"); then `token_positions`
    (default all), `operation` (default zero), `value`, `factor`, `source`, `seed`, `type`, `apply_softmax`, as
    in `Intervention`. The older form has `type` (std, full-head, keep-self-attn, block-img-txt, block-img-img,
    flash-attn), `head-layer-couple` ((head, layer) pairs, or ["all"]) and `elem-to-ablate` ("@name" of the
    grammar, or token text).

    Raises RequestError naming the query and the column that is missing, unknown or wrong.
    """
    made: list[Intervention] = []
    for number, row in enumerate(query_rows(given, "ablation_queries")):
        if "head-layer-couple" in row or "elem-to-ablate" in row:
            made += _older_ablations(number, row, model)
        else:
            made += _ablations(number, row, model)
    return made


def _ablations(number: int, row: dict[str, Any], model: Transformer) -> list[Intervention]:
    where = f"ablation query {number}"
    _check_columns(where, row, ABLATION_COLUMNS, needed=("activation",))
    fields = {
        "type": row.get("type", "full"),
        "operation": row.get("operation", "zero" if "value" not in row and "source" not in row else "auto"),
        "patching_values": row.get("value"),
        "multiplication_value": row.get("factor", 0.0),
        "source": row.get("source"),
        "seed": row.get("seed", 0),
        "apply_softmax": row.get("apply_softmax", False),
    }
    if "token_positions" in row:
        given = row["token_positions"]
        fields["token_positions"] = given if isinstance(given, list | tuple) else [given]
    return [_made(where, activation=key, **fields) for key in _keys(where, row, model)]


def _made(where: str, **fields: Any) -> Intervention:
    """An intervention. What is wrong with it is said of the query."""
    try:
        return Intervention(**fields)
    except RequestError as error:
        raise RequestError(f"{where}: {str(error).removeprefix('Intervention: ')}") from None


def _keys(where: str, row: dict[str, Any], model: Transformer) -> list[str]:
    """The keys a query names: its activation, with layers and heads filled in."""
    template, holes = row["activation"], str(row["activation"]).count("{}")
    if not isinstance(template, str) or holes > 2:
        raise RequestError(
            f"{where}: activation must be a key, or one with {{}} for layer and head; got {template!r}"
        )
    for column, wanted in (("layers", holes >= 1), ("heads", holes == 2)):
        if wanted != (column in row):
            raise RequestError(
                f"{where}: the activation {template!r} {'needs' if wanted else 'has no place for'} the column {column!r}"
            )
    if not holes:
        return [template]
    layers = indices_of(where, "layers", row["layers"], model.config.n_layers)
    heads = indices_of(where, "heads", row["heads"], _heads_of(template, model)) if holes == 2 else [None]
    return [
        template.format(*([layer] if head is None else [layer, head])) for layer in layers for head in heads
    ]


def indices_of(where: str, column: str, given: Any, count: int) -> list[int]:
    if isinstance(given, str) and given == "all":
        return list(range(count))
    listed = list(given) if isinstance(given, list | tuple | range) else [given]
    whole = [int(i) if isinstance(i, float) and i.is_integer() else i for i in listed]
    if not whole or any(
        isinstance(i, bool) or not hasattr(i, "__index__") or not 0 <= i < count for i in whole
    ):
        raise RequestError(
            f"{where}: {column} must be 'all' or whole numbers from 0 to {count - 1}; got {given!r}"
        )
    return [int(i) for i in whole]


def _older_ablations(number: int, row: dict[str, Any], model: Transformer) -> list[Intervention]:
    where = f"ablation query {number}"
    _check_columns(where, row, OLDER_COLUMNS, needed=("type", "head-layer-couple"))
    if row["type"] not in OLDER_ABLATIONS:
        instead = REFUSED_ABLATIONS.get(row["type"]) or did_you_mean(str(row["type"]), OLDER_ABLATIONS)
        raise RequestError(f"{where}: type {row['type']!r} is unknown; {instead}")
    template, kind, positions = OLDER_ABLATIONS[row["type"]]
    if positions is None:
        _check_columns(where, row, OLDER_COLUMNS, needed=("elem-to-ablate",))
        positions = [query_group(where, row["elem-to-ablate"])]
    couples = row["head-layer-couple"]
    if couples in ("all", ["all"]):
        couples = [
            (head, layer) for layer in range(model.config.n_layers) for head in range(model.config.n_heads)
        ]
    made = []
    for couple in couples if isinstance(couples, list | tuple) else [couples]:
        if not isinstance(couple, list | tuple) or len(couple) != 2:
            raise RequestError(
                f"{where}: head-layer-couple is a list of (head, layer) pairs or ['all']; got {couples!r}"
            )
        head, layer = couple
        key = template.format(layer, head)
        made.append(_made(where, activation=key, type=kind, token_positions=positions))
    return made


def query_group(where: str, given: Any) -> Any:
    """A query's position: "@name" of the grammar, other text as token text (its first occurrence), numbers as they are."""
    if isinstance(given, str) and not given.startswith("@"):
        return TokenText(text=given, which="first")
    if isinstance(given, str):
        return given.removeprefix("@")
    if isinstance(given, bool) or not isinstance(given, int | tuple | list | TokenText):
        raise RequestError(f"{where}: a position is '@name', a token text, a number or a span; got {given!r}")
    return given


def patches(given: Any, model: Transformer, activations: ActivationCache | None = None) -> list[Intervention]:
    """The interventions of patching queries: positions written with what another run had there.

    Columns: `patching_elem` or `pos_token_to_patch` ("@name", or token text); `layers_to_patch` or `layer` (an int, a list,
    "all"); `activation_type`, a key with {} for the layer (`resid_in_{}`) and a second for the head; `patching_activations`, a
    cache that was extracted at the same position; `base_activation_index`, one example of it for all rows.

    Args:
        activations: used where a query has no cache of its own.

    Raises RequestError naming the query and the column that is missing, unknown or wrong.
    """
    made: list[Intervention] = []
    for number, row in enumerate(query_rows(given, "patching_queries")):
        where = f"patching query {number}"
        _check_columns(where, row, tuple(PATCH_COLUMNS), needed=())
        query = {PATCH_COLUMNS[name]: value for name, value in row.items()}
        _check_columns(
            where, query, tuple(query), needed=("patching_elem", "layers_to_patch", "activation_type")
        )
        cache = query.get("patching_activations", activations)
        if not isinstance(cache, ActivationCache):
            raise RequestError(
                f"{where}: patching_activations must be a cache, as forward gives it; got {cache!r:.60}"
            )
        group = query_group(where, query["patching_elem"])
        for key in _patch_keys(where, query, model):
            values = _values_at(where, cache, key, group, query.get("base_activation_index"))
            made.append(_made(where, activation=key, token_positions=[group], patching_values=values))
    return made


def _patch_keys(where: str, query: dict[str, Any], model: Transformer) -> list[str]:
    template = query["activation_type"]
    holes = str(template).count("{}")
    if not isinstance(template, str) or holes not in (1, 2):
        raise RequestError(
            f"{where}: activation_type must be a key with {{}} for the layer, such as 'resid_in_{{}}'; got {template!r}"
        )
    try:
        field = named_place(template.replace("{}", "0")).field
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None
    if field.kind in ("pattern", "projected"):
        raise RequestError(
            f"{where}: {template} is not patched position by position; pass interventions=[Intervention(activation=…, "
            f"patching_values=…)], at the head's own vector or with type 'grid' at its pattern"
        )
    layers = indices_of(where, "layers_to_patch", query["layers_to_patch"], model.config.n_layers)
    if holes == 1:
        return [template.format(layer) for layer in layers]
    return [template.format(layer, head) for layer in layers for head in range(_heads_of(template, model))]


def _heads_of(template: str, model: Transformer) -> int:
    return model.config.n_kv_heads if template.startswith("kv_head") else model.config.n_heads


def _values_at(where: str, cache: ActivationCache, key: str, group: Any, example: Any) -> Tensor:
    """What the cache has at the group's positions, [batch, positions, width]."""
    if key not in cache:
        raise RequestError(f"{where}: patching_activations has no {key!r}; extract it there")
    index = cache["mapping_index"]
    if isinstance(index, list) or "info" in index:
        raise RequestError(
            f"{where}: patching_activations must hold single positions, neither averaged nor ragged"
        )
    name = hashable(group)
    known = name if name in index else f"@{name}"
    if known not in index:
        raise RequestError(
            f"{where}: patching_activations was not extracted at {name!r}; it has {', '.join(map(repr, index))}"
        )
    values: Tensor = cache[key][:, index[known]]
    if example is None:
        return values
    (chosen,) = indices_of(where, "base_activation_index", example, values.shape[0])[:1]
    return values[chosen : chosen + 1]


def _check_columns(where: str, row: Mapping[str, Any], known: Iterable[str], needed: Iterable[str]) -> None:
    names = list(known)
    unknown = [name for name in row if name not in names]
    if unknown:
        raise RequestError(f"{where} has an unknown column {unknown[0]!r}; {did_you_mean(unknown[0], names)}")
    missing = [name for name in needed if name not in row]
    if missing:
        raise RequestError(f"{where} lacks the column {missing[0]!r}; it has {', '.join(row) or 'none'}")
