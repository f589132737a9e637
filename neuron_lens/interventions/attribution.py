"""Attribution patching: first-order estimates of what patching nodes and edges would do, all from a few passes.

An edge's score is the difference of what its sender writes (other run − this run) times the gradient of the metric
by what its receiver reads (edge attribution patching, Syed et al. 2023, arXiv 2310.10348). Integrated gradients take the
gradient's mean on the way from one run to the other: of the input (EAP-IG, Hanna et al. 2024, arXiv 2403.17806), or
of each layer's writing in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.apply import capture
from neuron_lens.interventions.circuits import (
    EMBEDDING,
    MLP_OUT,
    RESULT,
    Ablation,
    check_additive,
    circuit_metric,
    sender_outputs,
)
from neuron_lens.interventions.gradients import grad_at, traced_run
from neuron_lens.interventions.graph import Circuit, GraphShape
from neuron_lens.interventions.metrics import BoundMetric, Columns, Metric, bind_metrics
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["attribute_edges", "attribution_patch", "exact_edge_effects"]

AnyMetric = Metric | Callable[..., Any]
Method = Literal["gradient", "integrated_inputs", "integrated_activations"]


def attribution_patch(
    model: Transformer,
    tokens: Tensor,
    source: Activations,
    metric: AnyMetric,
    *,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Activations:
    """An estimate of the effect of patching each entry of each source activation into the run of `tokens`.

    (source − activation) · gradient, entry by entry: sum over the axes of whatever is patched together (a head, a
    position, a neuron) for its estimate. One forward and one backward pass (Nanda 2023, attribution patching).

    Args:
        source: activations of the other run at the sites wanted, for instance `capture(model, others, sites)`.

    Returns:
        Activations: estimates, each row's change of its own metric, of the shape of the activations.
    """
    sites = sorted({site for site, _ in source})
    layers = sorted({layer for _, layer in source if layer is not None}) or None
    gradients = grad_at(
        model, tokens, metric, sites, layers=layers, pad=pad, hooks=hooks, logits_at=logits_at
    )
    here = capture(model, tokens, sites, layers=layers, hooks=hooks, pad=pad)
    return Activations({place: (source[place] - here[place]) * gradients[place] for place in source})


def attribute_edges(
    model: Transformer,
    tokens: Tensor,
    ablation: Ablation,
    metric: AnyMetric,
    *,
    method: Method = "gradient",
    steps: int = 5,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Circuit:
    """Scores of all edges: estimates of how the metric changes when one edge alone carries its ablated value.

    Args:
        tokens: [batch, pos]. ablation: what edges carry instead.
        method: "gradient" (EAP: one forward and backward pass); "integrated_inputs" (EAP-IG: one for each step, from the
            input's embeddings to the other prompts'); "integrated_activations" (one for each step and layer part).
        steps: of the integrated methods. hooks: interventions of all runs.

    Returns:
        Circuit: all edges, with scores averaged over rows.

    Raises:
        RequestError: heads do not add to the stream one by one, the ablation does not fit, "integrated_inputs" without other
            prompts row by row, fewer than one step.
    """
    check_additive(model)
    if steps < 1:
        raise RequestError(f"integrated gradients take at least one step, got {steps}")
    (bound,) = bind_metrics(metric, tokens, None, logits_at).values()
    shape = GraphShape.of(model.config)
    live = sender_outputs(model, tokens, hooks)
    other = ablation.outputs(model, tokens).expand_as(live)
    differences = other - live
    run = _Gradients(model, tokens, bound, shape, hooks)
    if method == "gradient":
        return Circuit(shape, _scores(differences, run(None)))
    if method == "integrated_inputs":
        if ablation.kind not in ("patch", "resample"):
            raise RequestError(
                f"integrated_inputs goes to other prompts: an ablation {ablation.kind!r} has none for each row"
            )
        on_the_way = [run((EMBEDDING, None, differences[0] * fraction)) for fraction in _fractions(steps)]
        return Circuit(shape, _scores(differences, torch.stack(on_the_way).mean(0)))
    if method != "integrated_activations":
        raise RequestError(
            f"method {method!r}: expected 'gradient', 'integrated_inputs' or 'integrated_activations'"
        )
    scores = torch.zeros(len(shape.senders), len(shape.receivers))
    for site, layer, senders in _layer_parts(shape):
        moved = differences[senders]
        step = moved[0] if site != RESULT else moved.movedim(0, 2) / model.config.residual_scale
        gradients = torch.stack([run((site, layer, step * fraction)) for fraction in _fractions(steps)]).mean(
            0
        )
        scores[senders] = _scores(moved, gradients)
    return Circuit(shape, scores)


def _fractions(steps: int) -> list[float]:
    """Midpoints of equal parts of the way."""
    return [(step + 0.5) / steps for step in range(steps)]


def _layer_parts(shape: GraphShape) -> Iterable[tuple[str, int | None, slice]]:
    """The senders that write at one moment: site, layer, and their indices."""
    yield EMBEDDING, None, slice(0, 1)
    at = 1
    for layer in range(shape.n_layers):
        yield RESULT, layer, slice(at, at + shape.n_heads)
        at += shape.n_heads
        if shape.mlp:
            yield MLP_OUT, layer, slice(at, at + 1)
            at += 1


def _scores(differences: Tensor, gradients: Tensor) -> Tensor:
    """[sender, batch, pos, d_model] and [receiver, batch, pos, d_model] -> [sender, receiver], averaged over rows."""
    return differences.flatten(1) @ gradients.flatten(1).T / differences.shape[1]


class _Gradients:
    """Gradients of the metric by what each receiver reads, [receiver, batch, pos, d_model], from one pass."""

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        metric: BoundMetric,
        shape: GraphShape,
        hooks: TransformerHooks | None,
    ) -> None:
        self.model, self.tokens, self.metric, self.shape, self.hooks = model, tokens, metric, shape, hooks
        self.sites = ["attn.q_in", "attn.k_in", "attn.v_in", "resid.torso.post_mlp"]
        self.sites += ["resid.torso.mlp_in"] if shape.mlp else []

    def __call__(self, moved: tuple[str, int | None, Tensor] | None) -> Tensor:
        """moved: a site, its layer, and what is added there in this pass."""
        tree = TransformerHooks() if self.hooks is None else self.hooks.copy()
        if moved is not None:
            site, layer, by = moved

            def add(x: Tensor) -> Tensor:
                return x + by

            tree.append_to_path(f"{site}.fwd", add if layer is None else AtLayers(layer).append(add))
        kept, logits = traced_run(
            self.model, self.tokens, self.sites, hooks=tree, logits_at=self.metric.columns
        )
        total = self.metric(logits)
        # a metric that averages over rows itself counts for all of them
        total = total.sum() * (self.tokens.shape[0] if total.numel() == 1 else 1)
        places = [
            place
            for place in kept
            if place[0] != "resid.torso.post_mlp" or place[1] == self.shape.n_layers - 1
        ]
        found = torch.autograd.grad(total, [kept[place] for place in places], allow_unused=True)
        gradients = {
            place: torch.zeros_like(kept[place]) if gradient is None else gradient
            for place, gradient in zip(places, found, strict=True)
        }
        rows = []
        for port in self.shape.receivers:
            if port.layer is None:
                rows.append(gradients["resid.torso.post_mlp", self.shape.n_layers - 1])
            elif port.reads == "mlp":
                rows.append(gradients["resid.torso.mlp_in", port.layer])
            else:
                rows.append(gradients[f"attn.{port.reads}_in", port.layer][:, :, port.head])
        return torch.stack(rows).detach()


def exact_edge_effects(
    model: Transformer,
    tokens: Tensor,
    ablation: Ablation,
    metric: AnyMetric,
    edges: Circuit | None = None,
    *,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Circuit:
    """The exact change of the metric when one edge alone is ablated, for each edge: one pass an edge.

    edges: only those of this circuit; None for all.

    Returns:
        Circuit: those edges, with their effects as scores.
    """
    shape = GraphShape.of(model.config)
    chosen = Circuit(shape) if edges is None else edges
    values = ablation.outputs(model, tokens)
    whole = circuit_metric(model, tokens, Circuit(shape), values, metric, hooks, logits_at).mean()
    scores = torch.zeros(chosen.kept.shape)
    for sender, receiver in chosen.kept.nonzero().tolist():
        kept = shape.possible.clone()
        kept[sender, receiver] = False
        one = circuit_metric(model, tokens, Circuit(shape, None, kept), values, metric, hooks, logits_at)
        scores[sender, receiver] = float(one.mean() - whole)
    return Circuit(shape, scores, chosen.kept)
