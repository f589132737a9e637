"""Path patching: the effect of some senders on the metric through their direct paths to some receivers.

The senders' outputs are taken from a source run; what they add to the residual stream differs from the base run by a
difference that reaches the receivers directly (everything between them is held at the base run). The receivers
then read the base stream plus that difference, and everything behind them runs as it does (Goldowsky-Dill et al. 2023,
arXiv 2304.05969; Wang et al. 2022, arXiv 2211.00593).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.apply import capture, to_hooks
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.grid import Grid
from neuron_lens.interventions.kinds import Patch
from neuron_lens.interventions.metrics import Metric
from neuron_lens.interventions.places import Frozen
from neuron_lens.interventions.sweep import sweep
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = [
    "Receiver",
    "Sender",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "path_patch",
]

AnyMetric = Metric | Callable[[Tensor], Any]
STREAM = "resid.torso.pre_attn"


class Sender(Frozen):
    """What writes to the stream: the embedding, a head of a layer, or a layer's MLP."""

    part: Literal["embedding", "head", "mlp"]
    layer: int | None = None
    head: int | None = None

    def written_before(self, layer: int, *, behind_attention: bool) -> bool:
        """Whether what it writes has reached the stream entering a layer, or its MLP."""
        if self.part == "embedding":
            return True
        assert self.layer is not None, "checked when used"
        return self.layer < layer or (self.layer == layer and behind_attention and self.part == "head")


class Receiver(Frozen):
    """What reads the stream: a head's queries, keys or values, a layer's MLP, or the logits."""

    part: Literal["q", "k", "v", "mlp", "logits"]
    layer: int | None = None
    head: int | None = None


def path_patch(
    model: Transformer,
    tokens: Tensor,
    source_tokens: Tensor,
    senders: Sequence[Sender],
    receivers: Sequence[Receiver] | Iterable[Sequence[Receiver]],
    metric: AnyMetric | Mapping[str, AnyMetric],
    **options: Any,
) -> SweepResult:
    """The metric when `senders` reach each set of receivers as in the source run, through direct paths only.

    Args:
        tokens, source_tokens: [batch, pos], of equal shape.
        senders: all of them together.
        receivers: one set of receivers, or several, each a cell of the result.
        options: those of `sweep`.

    Raises:
        RequestError: parts that do not exist, prompts of different shape, receivers that no sender precedes.
    """
    sets = _receiver_sets(receivers)
    _check(model.config, senders, sets)
    if tokens.shape != source_tokens.shape:
        raise RequestError(
            f"the prompts are {list(tokens.shape)} and the source's {list(source_tokens.shape)}; they must align"
        )
    pad = options.get("pad")
    base = capture(model, tokens, _stream_sites(model.config), pad=pad)
    written = _written(model, tokens, source_tokens, senders, base, pad)
    cells = [tuple(_reads(model, one, base, written) for one in receivers) for receivers in sets]
    return sweep(model, tokens, Grid({"cell": tuple(range(len(cells)))}, tuple(cells)), metric, **options)


def _receiver_sets(receivers: Sequence[Receiver] | Iterable[Sequence[Receiver]]) -> list[list[Receiver]]:
    listed: list[Any] = list(receivers)
    if listed and all(isinstance(one, Receiver) for one in listed):
        return [listed]
    return [list(one) for one in listed]


def _stream_sites(config: TransformerConfig) -> list[str]:
    return [STREAM, "resid.torso.post_mlp"] + ([] if config.mlp == "none" else ["resid.torso.mlp_in"])


def _check(config: TransformerConfig, senders: Sequence[Sender], sets: list[list[Receiver]]) -> None:
    if not senders or not sets or not all(sets):
        raise RequestError("path patching needs at least one sender and one receiver")
    parts: list[Sender | Receiver] = [*senders, *(one for receivers in sets for one in receivers)]
    for one in parts:
        whole = one.part in ("embedding", "logits")
        heads = config.n_kv_heads if one.part in ("k", "v") else config.n_heads
        if (one.layer is None) != whole or (one.layer is not None and not 0 <= one.layer < config.n_layers):
            raise RequestError(
                f"{one!r}: {one.part} {'has no layer' if whole else f'needs a layer of {config.n_layers}'}"
            )
        if (one.head is None) == (one.part in ("head", "q", "k", "v")) or not 0 <= (one.head or 0) < heads:
            raise RequestError(f"{one!r}: {one.part} needs a head of {heads}, and only heads have one")
        if one.part == "mlp" and config.mlp == "none":
            raise RequestError(f"{one!r}: the model has no MLP")
    for receivers in sets:
        for receiver in receivers:
            place = config.n_layers if receiver.layer is None else receiver.layer
            behind = receiver.part == "mlp" and not config.parallel
            if not any(sender.written_before(place, behind_attention=behind) for sender in senders):
                raise RequestError(
                    f"{receiver!r}: no sender writes to the stream before it reads; there is no path"
                )


def _written(
    model: Transformer,
    tokens: Tensor,
    source_tokens: Tensor,
    senders: Sequence[Sender],
    base: Activations,
    pad: Tensor | None,
) -> dict[Sender, Tensor]:
    """What each sender adds to the stream in the source run, less what it adds in the base run. [batch, pos, d_model]"""
    differences: dict[Sender, Tensor] = {}
    for sender in senders:
        if sender.part == "embedding":
            both = [
                capture(model, one, "resid.post_emb", pad=pad)["resid.post_emb"]
                for one in (source_tokens, tokens)
            ]
        elif sender.part == "mlp":
            both = [
                capture(model, one, "resid.torso.delta_mlp", layers=sender.layer, pad=pad)[
                    "resid.torso.delta_mlp", sender.layer
                ]
                for one in (source_tokens, tokens)
            ]
        else:
            both = _head_outputs(model, tokens, source_tokens, sender, pad)
        differences[sender] = both[0] - both[1]
    return differences


def _head_outputs(
    model: Transformer, tokens: Tensor, source_tokens: Tensor, sender: Sender, pad: Tensor | None
) -> list[Tensor]:
    """What attention adds with the sender's values from the source run, and without."""
    values = capture(model, source_tokens, "attn.v_out", layers=sender.layer, pad=pad)
    patch = Patch(site="attn.v_out", layers=sender.layer, heads=sender.head, source=values)
    site = "resid.torso.delta_attn"
    return [
        capture(model, tokens, site, layers=sender.layer, hooks=hooks, pad=pad)[site, sender.layer]
        for hooks in (to_hooks(patch, model), None)
    ]


def _reads(
    model: Transformer, receiver: Receiver, base: Activations, written: Mapping[Sender, Tensor]
) -> Intervention:
    """The receiver reads the base stream and the differences of the senders that write before it."""
    config = model.config
    layer = config.n_layers if receiver.layer is None else receiver.layer
    behind = receiver.part == "mlp" and not config.parallel
    reaching = [
        value for sender, value in written.items() if sender.written_before(layer, behind_attention=behind)
    ]
    difference = torch.stack(reaching).sum(0)
    if receiver.part == "logits":
        last, site = config.n_layers - 1, "resid.torso.post_mlp"
        return Patch(site=site, layers=last, source={(site, last): base[site, last] + difference})
    if receiver.part == "mlp":
        site = "resid.torso.mlp_in"
        return Patch(site=site, layers=layer, source={(site, layer): base[site, layer] + difference})
    site = f"attn.{receiver.part}_in"
    heads = config.n_heads if receiver.part == "q" else config.n_kv_heads
    stream = (base[STREAM, layer] + difference)[:, :, None].expand(-1, -1, heads, -1)
    return Patch(site=site, layers=layer, heads=receiver.head, source={(site, layer): stream})


def get_act_patch_direct_path(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_tokens: Tensor,
    metric: AnyMetric,
    src_layer: int,
    src_head: int,
    component: Literal["q", "k", "v"] = "q",
    **options: Any,
) -> Tensor:
    """One head's clean output into each later head's queries, keys or values only. [layer, head]

    Layers up to the source's hold the metric of the corrupted run: no path leads there.
    """
    config = model.config
    heads = config.n_heads if component == "q" else config.n_kv_heads
    later = range(src_layer + 1, config.n_layers)
    sender = Sender(part="head", layer=src_layer, head=src_head)
    if not later:
        _check(config, [sender], [[Receiver(part="logits")]])
    receivers = [
        [Receiver(part=component, layer=layer, head=head)] for layer in later for head in range(heads)
    ]
    if not receivers:  # the last layer has no later heads: only the corrupted run's metric is left
        nothing = TransformerHooks().append_to_path("logits.fwd", _unchanged)
        alone = sweep(model, corrupted_tokens, [nothing], metric, **options)
        return torch.full((config.n_layers, heads), alone.baseline())
    result = path_patch(model, corrupted_tokens, clean_tokens, [sender], receivers, metric, **options)
    table = torch.full((config.n_layers, heads), result.baseline())
    table[src_layer + 1 :] = result.values().view(len(later), heads)
    return table


def _unchanged(x: Tensor) -> None:
    """A hook that does nothing."""


def get_act_patch_direct_path_all_sources(
    model: Transformer,
    corrupted_tokens: Tensor,
    clean_tokens: Tensor,
    metric: AnyMetric,
    component: Literal["q", "k", "v"] = "q",
    **options: Any,
) -> Tensor:
    """`get_act_patch_direct_path` from every head. [source layer, source head, layer, head]"""
    config = model.config
    return torch.stack(
        [
            torch.stack(
                [
                    get_act_patch_direct_path(
                        model, corrupted_tokens, clean_tokens, metric, layer, head, component, **options
                    )
                    for head in range(config.n_heads)
                ]
            )
            for layer in range(config.n_layers)
        ]
    )
