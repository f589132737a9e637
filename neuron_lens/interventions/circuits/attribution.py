"""Edge attribution: estimates of what ablating each edge would do, all from a few passes; and the exact effects.

An edge's score is the difference of what its sender writes (ablated − this run) times the gradient of the metric
by what its receiver reads (edge attribution patching, EAP; Syed et al. 2023, arXiv 2310.10348). Integrated gradients take
the gradient's mean on the way from one run to the other: of the input (EAP-IG, Hanna et al. 2024, arXiv 2403.17806), or
of each layer's writing in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder
from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.circuits.ablation import Ablation
from neuron_lens.interventions.circuits.circuit import Circuit
from neuron_lens.interventions.circuits.nodes import GraphShape, Units
from neuron_lens.interventions.circuits.reads import (
    MLP_IN,
    READ_AT_SITES,
    STREAM_OUT,
    ReadsMore,
    read_site,
)
from neuron_lens.interventions.circuits.run import circuit_metric
from neuron_lens.interventions.circuits.senders import sender_outputs
from neuron_lens.interventions.circuits.units import UnitHooks, open_units
from neuron_lens.interventions.gradients import differentiable, traced_run
from neuron_lens.interventions.metrics import BoundMetric, Columns, Metric, bind_metrics
from neuron_lens.interventions.sweep import sweep

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["attribute_edges", "exact_edge_effects"]

AnyMetric = Metric | Callable[..., Any]
Method = Literal["gradient", "integrated_inputs", "integrated_activations"]
METHODS = "gradient", "integrated_inputs", "integrated_activations"
# The stream entering block 0, and where each kind of sender writes.
EMBEDDING, ATTENTION, MLP = "resid.post_emb", "resid.torso.delta_attn", "resid.torso.delta_mlp"
BLOCK = STREAM_OUT


def attribute_edges(
    model: Transformer,
    tokens: Tensor,
    ablation: Ablation,
    metric: AnyMetric,
    *,
    method: Method = "gradient",
    steps: int = 5,
    units: Iterable[Units] = (),
    autoencoders: Mapping[str, Autoencoder] | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Circuit:
    """Scores of all edges: estimates of how the metric changes when one edge alone carries its ablated value.

    Args:
        tokens: [batch, pos]. ablation: what edges carry instead. pad: true where a column is padding [batch, pos].
        method: "gradient" (EAP: one forward and backward pass); "integrated_inputs" (EAP-IG: one for each step, from the
            input's embeddings to the other prompts'); "integrated_activations" (one for each step and layer part).
        steps: of the integrated methods. hooks: interventions of the prompts' runs.
        units: neurons and latents that are nodes of their own. autoencoders: those of the latents, by name.

    Returns:
        Circuit: all edges, with scores averaged over rows.

    Raises:
        RequestError: units that do not exist, an ablation that does not fit, "integrated_inputs" without other prompts
            row by row, fewer than one step.
    """
    if steps < 1:
        raise RequestError(f"integrated gradients take at least one step, got {steps}")
    if method not in METHODS:
        raise RequestError(f"method {method!r}: expected one of {', '.join(map(repr, METHODS))}")
    if method == "integrated_inputs" and ablation.kind not in ("patch", "resample"):
        raise RequestError(
            f"integrated_inputs goes to other prompts: an ablation {ablation.kind!r} has none for each row"
        )
    (bound,) = bind_metrics(metric, tokens, pad, logits_at).values()
    shape = GraphShape.of(model.config, units)
    live = sender_outputs(model, tokens, hooks, shape=shape, autoencoders=autoencoders, pad=pad)
    other = ablation.outputs(model, tokens, shape=shape, autoencoders=autoencoders, pad=pad)
    differences = other.expand_as(live) - live
    if pad is not None:
        differences = differences.masked_fill(pad[:, :, None], 0.0)
    run = _Gradients(model, tokens, bound, shape, autoencoders, pad, hooks)
    if method == "gradient":
        return Circuit(shape, _scores(differences, run(None)))
    if method == "integrated_inputs":
        on_the_way = (run((EMBEDDING, None, differences[0] * fraction)) for fraction in _fractions(steps))
        return Circuit(shape, _scores(differences, _mean(on_the_way, steps)))
    scores = torch.zeros(len(shape.senders), len(shape.receivers))
    for site, layer, senders in _layer_parts(shape):
        step = differences[senders].sum(0)
        gradients = _mean((run((site, layer, step * fraction)) for fraction in _fractions(steps)), steps)
        scores[senders] = _scores(differences[senders], gradients)
    return Circuit(shape, scores)


def _fractions(steps: int) -> list[float]:
    """Midpoints of equal parts of the way."""
    return [(step + 0.5) / steps for step in range(steps)]


def _mean(tensors: Iterable[Tensor], count: int) -> Tensor:
    total: Tensor | None = None
    for tensor in tensors:
        total = tensor if total is None else total.add_(tensor)
    assert total is not None, "there is at least one step"
    return total / count


def _layer_parts(shape: GraphShape) -> Iterable[tuple[str, int | None, slice]]:
    """The senders that write at one moment: site, layer, and their indices."""
    yield EMBEDDING, None, slice(0, 1)
    for layer in range(shape.n_layers):
        start, stop = shape.senders_of_layer(layer), shape.senders_of_layer(layer + 1)
        heads = start + shape.n_heads
        behind = shape.units_at(layer, "block")
        mlp = stop - (len(behind.nodes()) if behind else 0)
        yield ATTENTION, layer, slice(start, heads)
        if mlp > heads:
            yield MLP, layer, slice(heads, mlp)
        if stop > mlp:
            yield BLOCK, layer, slice(mlp, stop)


def _scores(differences: Tensor, gradients: Tensor) -> Tensor:
    """[sender, batch, pos, d_model] and [receiver, batch, pos, d_model] -> [sender, receiver], averaged over rows."""
    return (differences.flatten(1) @ gradients.flatten(1).T / differences.shape[1]).float().cpu()


class _Gradients:
    """Gradients of the metric by what each receiver reads, [receiver, batch, pos, d_model], from one pass."""

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        metric: BoundMetric,
        shape: GraphShape,
        autoencoders: Mapping[str, Autoencoder] | None,
        pad: Tensor | None,
        hooks: TransformerHooks | None,
    ) -> None:
        self.model, self.tokens, self.metric, self.shape = model, tokens, metric, shape
        self.pad, self.hooks = pad, hooks
        self.units = open_units(model, shape, autoencoders)
        self.sites = ["attn.q_in", "attn.k_in", "attn.v_in", BLOCK]
        self.sites += [MLP_IN] if shape.mlp else []

    def __call__(self, moved: tuple[str, int | None, Tensor] | None) -> Tensor:
        """moved: a site, its layer, and what is added there in this pass."""
        tree = TransformerHooks() if self.hooks is None else self.hooks.copy()
        streams: dict[Any, Tensor] = {}

        def own(units: Units, x: Tensor) -> Tensor:
            copies = x[:, :, None].expand(-1, -1, len(units.nodes()), -1).clone()
            streams[units.layer, units.place] = copies if copies.requires_grad else copies.requires_grad_()
            return copies

        UnitHooks(self.units, tree, own)
        if moved is not None:
            site, layer, by = moved

            def add(x: Tensor) -> Tensor:
                return x + by

            tree.append_to_path(f"{site}.fwd2", add if layer is None else AtLayers(layer).append(add))
        kept, logits = traced_run(
            self.model, self.tokens, self.sites, pad=self.pad, hooks=tree, logits_at=self.metric.columns
        )
        values = differentiable(self.metric, logits)
        # a metric that averages over rows itself counts for all of them
        weight = values.new_full(values.shape, self.tokens.shape[0] if values.numel() == 1 else 1)
        last = self.shape.n_layers - 1
        read = {place: x for place, x in kept.items() if place[0] != BLOCK or place[1] == last}
        every: dict[Any, Tensor] = {**read, **streams}
        found = torch.autograd.grad(values, list(every.values()), weight, allow_unused=True)
        gradients = {
            place: torch.zeros_like(every[place]) if gradient is None else gradient
            for place, gradient in zip(every, found, strict=True)
        }
        return torch.stack([self._of(gradients, index) for index in range(len(self.shape.receivers))])

    def _of(self, gradients: Mapping[Any, Tensor], index: int) -> Tensor:
        """The gradient by what one receiver reads, [batch, pos, d_model]."""
        port = self.shape.receivers[index]
        if port.reads in READ_AT_SITES:
            found = gradients[read_site(port.reads, port.layer, self.shape.n_layers)]
            return found if port.head is None else found[:, :, port.head]
        for units in self.shape.units:
            if port in units.ports():
                return gradients[units.layer, units.place][:, :, units.ports().index(port)]
        raise AssertionError(f"no units read with {port!r}")


def exact_edge_effects(
    model: Transformer,
    tokens: Tensor,
    ablation: Ablation,
    metric: AnyMetric,
    edges: Circuit | None = None,
    *,
    autoencoders: Mapping[str, Autoencoder] | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Circuit:
    """The exact change of the metric when one edge alone is ablated, for each edge.

    One pass an edge, many of them batched together: until an edge's receiver reads, the run is that of the prompts, so its
    sender's difference is added to what the receiver reads. Edges into units and the MLPs they are part of take a pass each.

    edges: only those of this circuit, which also says which units are nodes; None for all edges without units. Other
    arguments, errors: as of `attribute_edges`.

    Returns:
        Circuit: those edges, with their effects as scores, averaged over rows.
    """
    chosen = Circuit(GraphShape.of(model.config)) if edges is None else edges
    shape = chosen.shape
    ablated = ablation.outputs(model, tokens, shape=shape, autoencoders=autoencoders, pad=pad)
    live = sender_outputs(model, tokens, hooks, shape=shape, autoencoders=autoencoders, pad=pad)
    scores = torch.zeros(chosen.kept.shape)
    unedited = TransformerHooks() if hooks is None else hooks
    places, cells = [], [unedited.copy().append_to_path("logits.fwd", _unchanged)]
    alone = []
    for sender, receiver in chosen.kept.nonzero().tolist():
        port = shape.receivers[receiver]
        in_units_part = port.reads == "mlp" and shape.units_at(port.layer or 0, "mlp") is not None
        if in_units_part or port.reads not in READ_AT_SITES:
            alone.append((sender, receiver))
            continue
        difference = ablated[sender] - live[sender]
        more = ReadsMore(difference, None if port.head is None else [port.head])
        site, layer = read_site(port.reads, port.layer, shape.n_layers)
        cells.append(unedited.copy().append_to_path(f"{site}.fwd", AtLayers(layer).append(more)))
        places.append((sender, receiver))
    values = sweep(model, tokens, cells, metric, pad=pad, logits_at=logits_at).values()
    for place, value in zip(places, values[1:].tolist(), strict=True):
        scores[place] = value - float(values[0])
    for sender, receiver in alone:
        kept = shape.possible
        kept[sender, receiver] = False
        circuit = Circuit(shape, None, kept)
        cut = circuit_metric(model, tokens, circuit, ablated, metric, hooks, logits_at, pad, autoencoders)
        scores[sender, receiver] = float(cut.mean() - values[0])
    return Circuit(shape, scores, chosen.kept)


def _unchanged(x: Tensor) -> None:
    """A hook that leaves everything as it is."""
