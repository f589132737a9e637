"""`generic_activation_patch`: slices of a clean run's activation patched into the corrupted run, one after another.

After TransformerLens's function of that name, on the sweep engine. The clean run is any mapping of activations: an
`Activations` by (site, layer), or a cache that is indexed by `(short name, layer)` such as `cache["z", 3]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.declared import HEAD_AXES, axis_size, site_named
from neuron_lens.interventions.grid import Grid, grid
from neuron_lens.interventions.metrics import Metric, bind_metrics
from neuron_lens.interventions.patch_setters import SETTER_AXES, Setter
from neuron_lens.interventions.patch_sources import needed_activations, same_length, site_of
from neuron_lens.interventions.patching_result import PatchingResult, index_frame
from neuron_lens.interventions.sweep import sweep
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    import pandas

    from neuron_lens.transformer import Transformer

__all__ = ["AnyMetric", "Reduce", "generic_activation_patch", "make_df_from_ranges"]

AnyMetric = Metric | Callable[[Tensor], Any]
Reduce = Literal["scalar", "mean", "none"]

# Names of an index's entries, and the axes of grids they run over.
INDEX_AXES = {
    "layer": "layer",
    "pos": "position",
    "dest_pos": "position",
    "src_pos": "key",
    "head": "head",
    "head_index": "head",
}
FIELDS = {"layer": "layers", "position": "positions", "head": "heads", "key": "keys"}


def generic_activation_patch(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric | Mapping[str, AnyMetric],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pandas.DataFrame | Iterable[Sequence[int]] | None = None,
    return_index_df: bool = False,
    reduce: Reduce = "scalar",
    baseline: bool = False,
    **options: Any,
) -> Any:
    """Patch any slices of one activation, one at a time.

    Args:
        corrupted_tokens: [batch, pos]. clean_cache: the clean run's activations.
        patching_metric: a `Metric`, or a function of logits; or several by name.
        patch_setter: `setter(corrupted_activation, index, clean_activation)` writes into the first and returns it. Those of
            `patch_setters` are swept fastest; any other joins as a hook.
        activation_name: a short name ("resid_pre", "z", …) or the path of a site.
        index_axis_names: names of the index's entries, the first being "layer": of "layer", "pos", "head" or "head_index",
            "dest_pos", "src_pos". All their combinations are patched.
        index_df: these indices instead: the rows of a data frame, or rows alone, each starting with the layer.
        return_index_df: also return the indices as a data frame; needs pandas.
        reduce: "scalar": one number a patch (a metric that gives one for each row is averaged). "mean": the same, from a
            metric that must give one for each row. "none": keep each row's number.
        baseline: keep the metric of the corrupted run without a patch beside them.
        options: those of `sweep`: pad, logits_at, memory_budget, path, progress.

    Returns:
        the metric over the index axes, or over the one axis of the rows when `index_df` was given: a tensor, or a
        `PatchingResult` with reduce="none", baseline=True or several metrics; with return_index_df a pair of it and a
        pandas.DataFrame.

    Raises:
        RequestError: neither or both of index_axis_names and index_df, unknown names, activations that are missing,
            prompts of different length, an index out of range, a metric that does not fit `reduce`.
    """
    if reduce not in get_args(Reduce):
        raise RequestError(f"reduce {reduce!r}: expected one of {', '.join(map(repr, get_args(Reduce)))}")
    site, config, length = site_of(activation_name), model.config, corrupted_tokens.shape[1]
    heads = [axis_size(config, axis) or 1 for axis in site_named(site).axes or () if axis in HEAD_AXES]
    sizes = {"layer": config.n_layers, "position": length, "head": (*heads, 1)[0], "key": length}
    names, rows, axes = _index(index_axis_names, index_df, sizes)
    source = needed_activations(clean_cache, site, sorted({row[0] for row in rows}))
    for layer in {row[0] for row in rows}:
        same_length(source[site, layer], site, length)
    cells = _cells(site, source, patch_setter, names, rows, axes, sizes)
    swept = sweep(model, corrupted_tokens, cells, patching_metric, **options)
    if axes is not None and set(swept.axes) == set(axes):
        swept = swept.transposed(axes)
    _check_rows(swept, reduce, corrupted_tokens.shape[0])
    result: Any
    if reduce == "none" or baseline or isinstance(patching_metric, Mapping):
        unpatched = _unpatched(model, corrupted_tokens, patching_metric, options)
        result = PatchingResult(swept, unpatched, (rows, names))
    else:
        result = swept.values()
    return (result, index_frame(rows, names)) if return_index_df else result


def _cells(
    site: str,
    source: Activations,
    setter: Setter,
    names: Sequence[str],
    rows: Sequence[tuple[int, ...]],
    axes: tuple[str, ...] | None,
    sizes: Mapping[str, int],
) -> Grid:
    """A cell for each index: declared patches where the setter is a known one for these axes, else hooks."""
    if axes is not None and SETTER_AXES.get(setter) == axes:
        places: dict[str, Any] = {FIELDS[axis]: range(sizes[axis]) for axis in axes}
        return grid(site, patch_from=source, **places)
    labels: dict[str, tuple[Any, ...]] = {"cell": tuple(range(len(rows)))}
    if axes is not None:
        labels = {name: tuple(range(sizes[axis])) for name, axis in zip(names, axes, strict=True)}
    return Grid(labels, tuple(_setter_hooks(site, source, setter, row) for row in rows))


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pandas.DataFrame:
    """All combinations of indices below some limits, the last column fastest, as a data frame. Needs pandas.

    Raises RequestError when there are not as many names as limits.
    """
    if len(column_max_ranges) != len(column_names):
        raise RequestError(f"{len(column_max_ranges)} ranges were given for {len(column_names)} columns")
    return index_frame(list(itertools.product(*map(range, column_max_ranges))), column_names)


def _index(
    index_axis_names: Sequence[str] | None, index_df: Any, sizes: Mapping[str, int]
) -> tuple[list[str], list[tuple[int, ...]], tuple[str, ...] | None]:
    """Names of the index's entries, its rows, and the axes they run over; None where rows were given."""
    if (index_axis_names is None) == (index_df is None):
        raise RequestError("give index_axis_names (all combinations), or index_df (these rows only)")
    if index_axis_names is not None:
        names = list(index_axis_names)
        unknown = [name for name in names if name not in INDEX_AXES]
        if unknown or names[:1] != ["layer"] or len(set(names)) != len(names):
            raise RequestError(
                f"index axes start with 'layer' and are of {', '.join(INDEX_AXES)}, each once; got {names}"
            )
        axes = tuple(INDEX_AXES[name] for name in names)
        return names, list(itertools.product(*(range(sizes[axis]) for axis in axes))), axes
    is_frame = hasattr(index_df, "itertuples")
    given = index_df.itertuples(index=False, name=None) if is_frame else index_df
    rows = [tuple(map(int, row)) for row in given]
    width = len(rows[0]) if rows else 0
    wrong = [row for row in rows if len(row) != width or not row or not 0 <= row[0] < sizes["layer"]]
    if wrong or not rows:
        raise RequestError(
            f"each index row starts with a layer of the model's {sizes['layer']} and all are of one length; "
            f"got {wrong[0] if wrong else 'no rows'}"
        )
    names = [str(name) for name in index_df.columns] if is_frame else [f"index_{i}" for i in range(width)]
    names[0] = names[0] if is_frame else "layer"
    _check_known_columns(names, rows, sizes)
    return names, rows, None


def _check_known_columns(names: list[str], rows: list[tuple[int, ...]], sizes: Mapping[str, int]) -> None:
    """Columns whose meaning is known hold indices that exist."""
    if "layer" in names[1:]:
        raise RequestError(f"the first column of index_df is the layer; got {names}")
    for column, name in enumerate(names):
        size = sizes.get(INDEX_AXES.get(name, ""))
        beyond = [row for row in rows if size is not None and not -size <= row[column] < size]
        if beyond:
            raise RequestError(
                f"index {beyond[0]}: {name} {beyond[0][column]} does not exist: there are {size}"
            )


def _check_rows(swept: SweepResult, reduce: Reduce, rows: int) -> None:
    for metric in swept.metrics:
        if reduce != "scalar" and swept.per_example(metric).shape[-1] != rows:
            raise RequestError(
                f"reduce={reduce!r} needs a number for each of the {rows} rows; the metric {metric!r} gives one for all"
            )


def _unpatched(
    model: Transformer,
    tokens: Tensor,
    metric: AnyMetric | Mapping[str, AnyMetric],
    options: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Each metric of the corrupted run, [batch] or [1]."""
    pad = options.get("pad")
    bound = bind_metrics(metric, tokens, pad, options.get("logits_at"))
    with torch.no_grad():
        logits = model(tokens, pad=pad)
    found = {}
    for name, one in bound.items():
        read = logits
        if one.columns is not None:
            read = logits.gather(1, one.columns[:, :, None].expand(-1, -1, logits.shape[-1]))
        found[name] = one(read).float()
    return found


def _setter_hooks(site: str, source: Activations, setter: Setter, index: tuple[int, ...]) -> TransformerHooks:
    hook = _SetterHook(setter, index, source[site, index[0]])
    return TransformerHooks().append_to_path(f"{site}.fwd", AtLayers(index[0]).append(hook))


class _SetterHook:
    """A setter and its index as a hook."""

    def __init__(self, setter: Setter, index: tuple[int, ...], clean: Tensor) -> None:
        self.setter, self.index, self.clean = setter, index, clean
        self.name = f"patch {index}"

    def __call__(self, x: Tensor) -> Tensor:
        return self.setter(x.clone(), self.index, self.clean.to(x.device, x.dtype))
