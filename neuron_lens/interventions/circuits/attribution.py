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
from neuron_lens.interventions.circuits.run import circuit_metric
from neuron_lens.interventions.circuits.senders import sender_outputs
from neuron_lens.interventions.circuits.units import UnitHooks, open_units
from neuron_lens.interventions.gradients import traced_run
from neuron_lens.interventions.metrics import BoundMetric, Columns, Metric, bind_metrics

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["attribute_edges", "exact_edge_effects"]

AnyMetric = Metric | Callable[..., Any]
Method = Literal["gradient", "integrated_inputs", "integrated_activations"]
METHODS = "gradient", "integrated_inputs", "integrated_activations"
# The stream entering block 0, and where each kind of sender writes.
EMBEDDING, ATTENTION, MLP, BLOCK = (
    "resid.post_emb",
    "resid.torso.delta_attn",
    "resid.torso.delta_mlp",
    "resid.torso.post_mlp",
)


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
        self.sites += ["resid.torso.mlp_in"] if shape.mlp else []

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
        total = self.metric(logits)
        # a metric that averages over rows itself counts for all of them
        total = total.sum() * (self.tokens.shape[0] if total.numel() == 1 else 1)
        read = {place: x for place, x in kept.items() if place[0] != BLOCK}
        read[BLOCK, None] = kept[BLOCK, self.shape.n_layers - 1]
        every: dict[Any, Tensor] = {**read, **streams}
        found = torch.autograd.grad(total, list(every.values()), allow_unused=True)
        gradients = {
            place: torch.zeros_like(every[place]) if gradient is None else gradient
            for place, gradient in zip(every, found, strict=True)
        }
        return torch.stack([self._of(gradients, index) for index in range(len(self.shape.receivers))])

    def _of(self, gradients: Mapping[Any, Tensor], index: int) -> Tensor:
        """The gradient by what one receiver reads, [batch, pos, d_model]."""
        port = self.shape.receivers[index]
        if port.layer is None:
            return gradients[BLOCK, None]
        if port.reads == "mlp":
            return gradients["resid.torso.mlp_in", port.layer]
        if port.head is not None:
            return gradients[f"attn.{port.reads}_in", port.layer][:, :, port.head]
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
    """The exact change of the metric when one edge alone is ablated, for each edge: one pass an edge.

    edges: only those of this circuit, which also says which units are nodes; None for all edges without units. Other
    arguments as of `attribute_edges`.

    Returns:
        Circuit: those edges, with their effects as scores.
    """
    chosen = Circuit(GraphShape.of(model.config)) if edges is None else edges
    shape = chosen.shape
    values = ablation.outputs(model, tokens, shape=shape, autoencoders=autoencoders, pad=pad)

    def mean(kept: Tensor) -> float:
        one = Circuit(shape, None, kept)
        return float(
            circuit_metric(model, tokens, one, values, metric, hooks, logits_at, pad, autoencoders).mean()
        )

    possible = shape.possible
    whole = mean(possible)
    scores = torch.zeros(chosen.kept.shape)
    for sender, receiver in chosen.kept.nonzero().tolist():
        kept = possible.clone()
        kept[sender, receiver] = False
        scores[sender, receiver] = mean(kept) - whole
    return Circuit(shape, scores, chosen.kept)
