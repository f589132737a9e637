"""Direct path patching by its usual name: one head's output into later heads' queries, keys or values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.metrics import Metric, bind_metrics
from neuron_lens.interventions.patch_sources import needed_activations, same_length
from neuron_lens.interventions.path_patching import (
    Receiver,
    Sender,
    check_senders,
    head_difference,
    patch_paths,
    sender_differences,
)

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"]

AnyMetric = Metric | Callable[[Tensor], Any]
Component = Literal["q", "k", "v"]
V_OUT = "attn.v_out"


def get_act_patch_direct_path(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor] | Tensor,
    patching_metric: AnyMetric,
    src_layer: int,
    src_head: int,
    component: Component = "q",
    **options: Any,
) -> Tensor:
    """One head's clean output into each later head's queries, keys or values only. [layer, head or kv_head]

    Layers up to the source's hold the metric of the corrupted run: no path leads there.

    Args:
        corrupted_tokens: [batch, pos]. clean_cache: the clean run's activations, which hold "z" of the source's layer; or the
            clean tokens [batch, pos].
        options: those of `sweep`.

    Raises:
        RequestError: a head that does not exist, another component, prompts of different length.
    """
    config = model.config
    if component not in ("q", "k", "v"):
        raise RequestError(f"component {component!r}: expected 'q', 'k' or 'v'")
    sender = Sender(part="head", layer=src_layer, head=src_head)
    heads = config.n_heads if component == "q" else config.n_kv_heads
    later = range(src_layer + 1, config.n_layers)
    with_heads = [
        [Receiver(part=component, layer=layer, head=head)] for layer in later for head in range(heads)
    ]
    differences = {sender: _difference(model, corrupted_tokens, clean_cache, sender, options.get("pad"))}
    if not with_heads:  # the last layer has no later heads: only the corrupted run's metric is left
        return torch.full(
            (config.n_layers, heads), _baseline(model, corrupted_tokens, patching_metric, options)
        )
    result = patch_paths(model, corrupted_tokens, differences, with_heads, patching_metric, **options)
    table = torch.full((config.n_layers, heads), result.baseline())
    table[src_layer + 1 :] = result.values().view(len(later), heads)
    return table


def _difference(
    model: Transformer,
    tokens: Tensor,
    clean: Mapping[Any, Tensor] | Tensor,
    sender: Sender,
    pad: Tensor | None,
) -> Tensor:
    """What the head adds in the clean run less what it adds in the corrupted one. [batch, pos, d_model]"""
    if isinstance(clean, Tensor):
        return sender_differences(model, tokens, clean, [sender], pad)[sender]
    check_senders(model.config, [sender])
    source = needed_activations(clean, V_OUT, [sender.layer or 0])
    same_length(source[V_OUT, sender.layer], V_OUT, tokens.shape[1])
    return head_difference(model, tokens, source, sender, pad)


def _baseline(model: Transformer, tokens: Tensor, metric: AnyMetric, options: Mapping[str, Any]) -> float:
    """The metric of the corrupted run, averaged over rows."""
    pad = options.get("pad")
    (bound,) = bind_metrics(metric, tokens, pad, options.get("logits_at")).values()
    with torch.no_grad():
        return float(bound(model(tokens, pad=pad, logits_at=bound.columns)).mean())


def get_act_patch_direct_path_all_sources(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_cache: Mapping[Any, Tensor] | Tensor,
    patching_metric: AnyMetric,
    component: Component = "q",
    **options: Any,
) -> Tensor:
    """`get_act_patch_direct_path` from every head. [source layer, source head, layer, head or kv_head]"""
    config = model.config
    tables = [
        get_act_patch_direct_path(
            model, corrupted_tokens, clean_cache, patching_metric, layer, head, component, **options
        )
        for layer in range(config.n_layers)
        for head in range(config.n_heads)
    ]
    return torch.stack(tables).unflatten(0, (config.n_layers, config.n_heads))
