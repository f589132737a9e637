"""Activation patching by its usual names (after TransformerLens's `patching` module), on the sweep engine.

Each function patches slices of a clean run's activations into a corrupted run, one at a time, and gives the metric over
the index axes; `generic_activation_patch` says what they take and return.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.direct_paths import (
    get_act_patch_direct_path,
    get_act_patch_direct_path_all_sources,
)
from neuron_lens.interventions.generic_patching import (
    AnyMetric,
    generic_activation_patch,
    make_df_from_ranges,
)
from neuron_lens.interventions.patch_setters import (
    Setter,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from neuron_lens.interventions.patch_sources import SHORT_NAMES

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
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]


class _Patching(Protocol):
    def __call__(
        self,
        model: Transformer,
        corrupted_tokens: Tensor,
        clean_cache: Mapping[Any, Tensor],
        patching_metric: AnyMetric | Mapping[str, AnyMetric],
        **options: Any,
    ) -> Any: ...


def _family(activation: str, setter: Setter, axes: tuple[str, ...], shape: str, what: str) -> _Patching:
    def patch(
        model: Transformer,
        corrupted_tokens: Tensor,
        clean_cache: Mapping[Any, Tensor],
        patching_metric: AnyMetric | Mapping[str, AnyMetric],
        **options: Any,
    ) -> Any:
        if {"index_df", "index_axis_names"} & options.keys():
            raise RequestError(
                "this function's index is fixed; call generic_activation_patch for other indices"
            )
        return generic_activation_patch(
            model, corrupted_tokens, clean_cache, patching_metric, setter, activation, axes, **options
        )

    patch.__doc__ = f"""Patch {what} from the clean run, one at a time.

    Args:
        corrupted_tokens: [batch, pos]. clean_cache: the clean run's activations.
        patching_metric: a `Metric`, or a function of logits; or several by name.
        options: return_index_df, reduce and baseline of `generic_activation_patch`; those of `sweep`: pad, logits_at,
            memory_budget, path, progress.

    Returns:
        the metric for each patch, averaged over rows, {shape}; else as `generic_activation_patch` says.
    """
    return patch


_STREAM = layer_pos_patch_setter, ("layer", "pos"), "[layer, pos]"
get_act_patch_resid_pre = _family("resid_pre", *_STREAM, "the stream entering a block")
get_act_patch_resid_mid = _family("resid_mid", *_STREAM, "the stream behind attention")
get_act_patch_attn_out = _family("attn_out", *_STREAM, "what attention adds")
get_act_patch_mlp_out = _family("mlp_out", *_STREAM, "what an MLP adds")

_BY_POS = layer_pos_head_vector_patch_setter, ("layer", "pos", "head")
_HEADS, _KV_HEADS = "[layer, pos, head]", "[layer, pos, kv_head]"
get_act_patch_attn_head_out_by_pos = _family("z", *_BY_POS, _HEADS, "a head's mixed values at a position")
get_act_patch_attn_head_q_by_pos = _family("q", *_BY_POS, _HEADS, "a head's query at a position")
get_act_patch_attn_head_k_by_pos = _family("k", *_BY_POS, _KV_HEADS, "a head's key at a position")
get_act_patch_attn_head_v_by_pos = _family("v", *_BY_POS, _KV_HEADS, "a head's value at a position")
get_act_patch_attn_head_pattern_by_pos = _family(
    "pattern",
    layer_head_pos_pattern_patch_setter,
    ("layer", "head_index", "dest_pos"),
    "[layer, head, dest]",
    "a row of a head's pattern",
)
get_act_patch_attn_head_pattern_dest_src_pos = _family(
    "pattern",
    layer_head_dest_src_pos_pattern_patch_setter,
    ("layer", "head_index", "dest_pos", "src_pos"),
    "[layer, head, dest, src]",
    "an entry of a head's pattern",
)

_ALL_POS = layer_head_vector_patch_setter, ("layer", "head")
get_act_patch_attn_head_out_all_pos = _family("z", *_ALL_POS, "[layer, head]", "a head's mixed values")
get_act_patch_attn_head_q_all_pos = _family("q", *_ALL_POS, "[layer, head]", "a head's queries")
get_act_patch_attn_head_k_all_pos = _family("k", *_ALL_POS, "[layer, kv_head]", "a head's keys")
get_act_patch_attn_head_v_all_pos = _family("v", *_ALL_POS, "[layer, kv_head]", "a head's values")
get_act_patch_attn_head_pattern_all_pos = _family(
    "pattern",
    layer_head_pattern_patch_setter,
    ("layer", "head_index"),
    "[layer, head]",
    "a head's pattern",
)


def get_act_patch_attn_head_all_pos_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """Mixed values, queries, keys, values and patterns of each head, all positions at once. [5, layer, head]"""
    _refuse_grouped(model)
    functions = (
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_pattern_all_pos,
    )
    return _stacked(functions, (model, corrupted_tokens, clean_cache, patching_metric), options)


def get_act_patch_attn_head_by_pos_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """The same for each position; patterns by destination. [5, layer, pos, head]"""
    _refuse_grouped(model)
    functions = (
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_v_by_pos,
        _pattern_by_pos_first,
    )
    return _stacked(functions, (model, corrupted_tokens, clean_cache, patching_metric), options)


def _pattern_by_pos_first(*arguments: Any, **options: Any) -> Tensor:
    """Patterns by destination, [layer, pos, head] as the others are."""
    table: Tensor = get_act_patch_attn_head_pattern_by_pos(*arguments, **options)
    return table.transpose(1, 2)


def get_act_patch_block_every(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor],
    patching_metric: AnyMetric,
    **options: Any,
) -> Tensor:
    """The stream entering each block, and what attention and the MLP add. [3, layer, pos]"""
    functions = get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out
    return _stacked(functions, (model, corrupted_tokens, clean_cache, patching_metric), options)


def _stacked(
    functions: tuple[Callable[..., Any], ...], arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> Tensor:
    """The tables of several functions, one above the other."""
    beside = [name for name in ("return_index_df", "baseline") if options.get(name)]
    beside += ["reduce='none'"] if options.get("reduce") == "none" else []
    if beside or isinstance(arguments[3], Mapping):
        raise RequestError(
            f"stacks hold one number a patch, without {beside[0] if beside else 'several metrics'}; "
            "call the function of each activation by itself"
        )
    return torch.stack([function(*arguments, **options) for function in functions])


def _refuse_grouped(model: Transformer) -> None:
    config = model.config
    if config.n_kv_heads != config.n_heads:
        raise RequestError(
            f"the model has {config.n_heads} query heads and {config.n_kv_heads} key and value heads, which do not stack; "
            f"call the function of each activation by itself"
        )
