"""Activation patching by its usual names (after TransformerLens's `patching` module), on the sweep engine.

Each function patches slices of a clean run's activations into a corrupted run, one at a time, and gives the metric over
the index axes. They take any mapping of activations: an `Activations` by (site, layer), or a cache that is indexed by
`(short name, layer)` such as `cache["z", 3]`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.declared import axis_size, site_named
from neuron_lens.interventions.grid import Grid, grid
from neuron_lens.interventions.metrics import Metric
from neuron_lens.interventions.patch_setters import (
    SETTER_AXES,
    Setter,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from neuron_lens.interventions.sweep import sweep
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = [
    "SHORT_NAMES",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "needed_activations",
]

# TransformerLens's short names of activations, and the sites they stand for.
SHORT_NAMES: dict[str, str] = {
    "resid_pre": "resid.torso.pre_attn",
    "resid_mid": "resid.torso.post_attn",
    "resid_post": "resid.torso.post_mlp",
    "attn_out": "resid.torso.delta_attn",
    "mlp_out": "resid.torso.delta_mlp",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "rot_q": "attn.rot_q",
    "rot_k": "attn.rot_k",
    "z": "attn.v_out",
    "attn_scores": "attn.qk_logits",
    "pattern": "attn.qk_probs",
    "result": "attn.result",
    "pre": "mlp.pre_act",
    "pre_linear": "mlp.pre_linear",
    "post": "mlp.post_act",
}

AnyMetric = Metric | Callable[[Tensor], Any]


class _Patching(Protocol):
    def __call__(
        self,
        model: Transformer,
        corrupted_tokens: Tensor,
        clean: Mapping[Any, Tensor],
        metric: AnyMetric,
        **options: Any,
    ) -> Tensor: ...


INDEX_AXES = {
    "layer": "layer",
    "pos": "position",
    "dest_pos": "position",
    "src_pos": "key",
    "head": "head",
    "head_index": "head",
}


def _site_of(activation: str) -> str:
    if activation in SHORT_NAMES:
        return SHORT_NAMES[activation]
    if "." in activation:
        return site_named(activation).path
    raise RequestError(f"no activation is called {activation!r}; {did_you_mean(activation, SHORT_NAMES)}")


def _short_of(site: str) -> str | None:
    return next((short for short, path in SHORT_NAMES.items() if path == site), None)


def needed_activations(clean: Mapping[Any, Tensor], site: str, layers: Iterable[int]) -> Activations:
    """A site's activations out of any mapping: by (site, layer), else by (short name, layer) as caches have them.

    Raises RequestError when a layer is missing.
    """
    short, found = _short_of(site), {}
    for layer in layers:
        for key in ((site, layer), (short, layer)):
            try:
                found[site, layer] = clean[key]
                break
            except (KeyError, RequestError):
                continue
        else:
            raise RequestError(
                f"the clean run's activations lack {site}, layer {layer} (or {short!r}); "
                f"record it: capture(model, tokens, {site!r})"
            )
    return Activations(found)


def _patched(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean: Mapping[Any, Tensor],
    metric: AnyMetric | Mapping[str, AnyMetric],
    activation: str,
    axes: tuple[str, ...],
    options: dict[str, Any],
) -> SweepResult:
    """The sweep over all indices of some axes of one activation."""
    site = _site_of(activation)
    config, length = model.config, corrupted_tokens.shape[1]
    source = needed_activations(clean, site, range(config.n_layers))
    for layer in range(config.n_layers):
        same_length(source[site, layer], site, length)
    heads = (
        axis_size(config, next((axis for axis in site_named(site).axes or () if "head" in axis), "one")) or 1
    )
    sizes = {"layer": config.n_layers, "position": length, "head": heads, "key": length}
    fields = {"layer": "layers", "position": "positions", "head": "heads", "key": "keys"}
    places: dict[str, Any] = {fields[axis]: range(sizes[axis]) for axis in axes}
    cells = grid(site, patch_from=source, **places)
    result = sweep(model, corrupted_tokens, cells, metric, **options)
    return _in_order(result, axes)


def same_length(activation: Tensor, site: str, length: int) -> None:
    pos = (site_named(site).axes or ()).index("pos")
    if activation.shape[pos] != length:
        raise RequestError(
            f"the clean run has {activation.shape[pos]} positions and the corrupted one {length}: patching aligns them "
            f"position by position; choose prompts of equal length"
        )


def _in_order(result: SweepResult, axes: tuple[str, ...]) -> SweepResult:
    """The result with its axes in another order."""
    return result if tuple(result.axes) == axes else result.transposed(axes)


def _family(activation: str, axes: tuple[str, ...], shape: str, what: str) -> _Patching:
    def patch(
        model: Transformer,
        corrupted_tokens: Tensor,
        clean: Mapping[Any, Tensor],
        metric: AnyMetric,
        **options: Any,
    ) -> Tensor:
        return _patched(model, corrupted_tokens, clean, metric, activation, axes, options).values()

    patch.__doc__ = f"""Patch {what} from the clean run, one at a time.

    Args:
        corrupted_tokens: [batch, pos]. clean: the clean run's activations. metric: a `Metric`, or a function of logits.
        options: those of `sweep`: pad, logits_at, memory_budget, path, progress.

    Returns:
        the metric for each patch, averaged over rows, {shape}.
    """
    return patch


get_act_patch_resid_pre = _family(
    "resid_pre", ("layer", "position"), "[layer, pos]", "the stream entering a block"
)
get_act_patch_resid_mid = _family(
    "resid_mid", ("layer", "position"), "[layer, pos]", "the stream behind attention"
)
get_act_patch_attn_out = _family("attn_out", ("layer", "position"), "[layer, pos]", "what attention adds")
get_act_patch_mlp_out = _family("mlp_out", ("layer", "position"), "[layer, pos]", "what an MLP adds")

_BY_POS = ("layer", "position", "head")
get_act_patch_attn_head_out_by_pos = _family(
    "z", _BY_POS, "[layer, pos, head]", "a head's mixed values at a position"
)
get_act_patch_attn_head_q_by_pos = _family("q", _BY_POS, "[layer, pos, head]", "a head's query at a position")
get_act_patch_attn_head_k_by_pos = _family(
    "k", _BY_POS, "[layer, pos, kv_head]", "a head's key at a position"
)
get_act_patch_attn_head_v_by_pos = _family(
    "v", _BY_POS, "[layer, pos, kv_head]", "a head's value at a position"
)
get_act_patch_attn_head_pattern_by_pos = _family(
    "pattern", ("layer", "head", "position"), "[layer, head, dest]", "a row of a head's pattern"
)
get_act_patch_attn_head_pattern_dest_src_pos = _family(
    "pattern",
    ("layer", "head", "position", "key"),
    "[layer, head, dest, src]",
    "an entry of a head's pattern",
)

_ALL_POS = ("layer", "head")
get_act_patch_attn_head_out_all_pos = _family("z", _ALL_POS, "[layer, head]", "a head's mixed values")
get_act_patch_attn_head_q_all_pos = _family("q", _ALL_POS, "[layer, head]", "a head's queries")
get_act_patch_attn_head_k_all_pos = _family("k", _ALL_POS, "[layer, kv_head]", "a head's keys")
get_act_patch_attn_head_v_all_pos = _family("v", _ALL_POS, "[layer, kv_head]", "a head's values")
get_act_patch_attn_head_pattern_all_pos = _family("pattern", _ALL_POS, "[layer, head]", "a head's pattern")


def get_act_patch_attn_head_all_pos_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean: Mapping[Any, Tensor],
    metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """Mixed values, queries, keys, values and patterns of each head, all positions at once. [5, layer, head]"""
    _refuse_grouped(model)
    names = ("z", "q", "k", "v", "pattern")
    return torch.stack(
        [_patched(model, corrupted_tokens, clean, metric, name, _ALL_POS, options).values() for name in names]
    )


def get_act_patch_attn_head_by_pos_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean: Mapping[Any, Tensor],
    metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """The same for each position; patterns by destination. [5, layer, pos, head]"""
    _refuse_grouped(model)
    names = ("z", "q", "k", "v", "pattern")
    return torch.stack(
        [_patched(model, corrupted_tokens, clean, metric, name, _BY_POS, options).values() for name in names]
    )


def get_act_patch_block_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean: Mapping[Any, Tensor],
    metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """The stream entering each block, and what attention and the MLP add. [3, layer, pos]"""
    names = ("resid_pre", "attn_out", "mlp_out")
    axes = ("layer", "position")
    return torch.stack(
        [_patched(model, corrupted_tokens, clean, metric, name, axes, options).values() for name in names]
    )


def _refuse_grouped(model: Transformer) -> None:
    config = model.config
    if config.n_kv_heads != config.n_heads:
        raise RequestError(
            f"the model has {config.n_heads} query heads and {config.n_kv_heads} key and value heads, which do not stack; "
            f"call the function of each activation by itself"
        )


def generic_activation_patch(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean: Mapping[Any, Tensor],
    metric: AnyMetric | Mapping[str, AnyMetric],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index: Iterable[Sequence[int]] | None = None,
    **options: Any,
) -> SweepResult:
    """Patch any slices of one activation, one at a time.

    Args:
        patch_setter: `setter(corrupted_activation, index, clean_activation)` writes into the first and returns it. The
            setters of this module are swept fastest; any other joins as a hook.
        activation_name: a short name ("resid_pre", "z", …) or the path of a site.
        index_axis_names: names of the index's entries, the first being "layer": of "layer", "pos", "head" or "head_index",
            "dest_pos", "src_pos". All their combinations are patched.
        index: these indices instead (the rows of a table), each starting with the layer.

    Returns:
        SweepResult: over the index axes, or over the one axis "cell" when `index` was given.

    Raises:
        RequestError: neither or both of index_axis_names and index, unknown names, activations that are missing.
    """
    site, config, length = _site_of(activation_name), model.config, corrupted_tokens.shape[1]
    if (index_axis_names is None) == (index is None):
        raise RequestError("give index_axis_names (all combinations), or index (these rows only)")
    names = list(index_axis_names or ())
    unknown = [name for name in names if name not in INDEX_AXES]
    if unknown or (names and names[0] != "layer"):
        raise RequestError(f"index axes start with 'layer' and are of {', '.join(INDEX_AXES)}; got {names}")
    axes = tuple(INDEX_AXES[name] for name in names)
    if SETTER_AXES.get(patch_setter) == axes and index is None:
        return _patched(model, corrupted_tokens, clean, metric, activation_name, axes, options)
    source = needed_activations(clean, site, range(config.n_layers))
    heads = (
        axis_size(config, next((axis for axis in site_named(site).axes or () if "head" in axis), "one")) or 1
    )
    sizes = {"layer": config.n_layers, "position": length, "head": heads, "key": length}
    rows = [tuple(map(int, row)) for row in index] if index is not None else None
    combinations = (
        rows if rows is not None else list(itertools.product(*(range(sizes[axis]) for axis in axes)))
    )
    labelled: dict[str, tuple[Any, ...]] = {name: tuple(range(sizes[INDEX_AXES[name]])) for name in names}
    if rows is not None:
        labelled = {"cell": tuple(range(len(rows)))}
        wrong = [row for row in rows if not row or not 0 <= row[0] < config.n_layers]
        if wrong or not rows:
            raise RequestError(
                f"each index row starts with a layer of the model's {config.n_layers}; got {wrong[:1] or 'none'}"
            )
    cells = []
    for row in combinations:
        hook = _SetterHook(patch_setter, row, source[site, row[0]])
        cells.append(TransformerHooks().append_to_path(f"{site}.fwd", AtLayers(row[0]).append(hook)))
    return sweep(model, corrupted_tokens, Grid(labelled, tuple(cells)), metric, **options)


class _SetterHook:
    """A setter and its index as a hook."""

    def __init__(self, setter: Setter, index: tuple[int, ...], clean: Tensor) -> None:
        self.setter, self.index, self.clean = setter, index, clean
        self.name = f"patch {index}"

    def __call__(self, x: Tensor) -> Tensor:
        return self.setter(x.clone(), self.index, self.clean.to(x.device, x.dtype))
