"""Running a circuit: the model with all edges outside it ablated, exactly, in one pass.

Each receiver reads the stream less what the senders of ablated edges wrote to it, plus what they would have written under
the ablation: x − Σ (live − ablated).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.graph import Circuit, GraphShape
from neuron_lens.interventions.metrics import Columns, Metric, bind_metrics

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Ablation", "CircuitScore", "circuit_hooks", "run_circuit", "score_circuit", "sender_outputs"]

RESULT, MLP_OUT, EMBEDDING = "attn.result", "resid.torso.delta_mlp", "resid.post_emb"


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablated sender is taken to have written.

    kind: "zero"; "mean" over `tokens` and their positions; "patch", from `tokens`, row by row; "resample", from rows of
        `tokens` drawn at random with `seed`.
    tokens: other prompts [batch, pos]; for "patch" and "resample" of the length of those that are run.
    """

    kind: Literal["zero", "mean", "patch", "resample"]
    tokens: Tensor | None = None
    seed: int = 0

    def outputs(self, model: Transformer, tokens: Tensor) -> Tensor:
        """Each sender's output under the ablation, [sender, batch or 1, pos or 1, d_model].

        Raises RequestError when the ablation's prompts are missing or do not fit.
        """
        if self.kind == "zero":
            shape = (len(GraphShape.of(model.config).senders), 1, 1, model.config.d_model)
            return torch.zeros(shape, dtype=model.embed.weight.dtype)
        if self.tokens is None:
            raise RequestError(f"the ablation {self.kind!r} takes its values from other prompts: give tokens")
        if self.kind == "mean":
            return sender_outputs(model, self.tokens).mean((1, 2), keepdim=True)
        if self.tokens.shape[1] != tokens.shape[1] or (
            self.kind == "patch" and len(self.tokens) != len(tokens)
        ):
            raise RequestError(
                f"the ablation's prompts are {list(self.tokens.shape)} and those that are run "
                f"{list(tokens.shape)}; they must align"
            )
        written = sender_outputs(model, self.tokens)
        if self.kind == "patch":
            return written
        generator = torch.Generator().manual_seed(self.seed)
        return written[:, torch.randint(len(self.tokens), (len(tokens),), generator=generator)]


def check_additive(model: Transformer) -> None:
    """Raises RequestError when heads do not add to the stream one by one, so that a graph of edges means nothing."""
    if model.config.norm_place != "pre" and model.config.norm != "none":
        raise RequestError(
            "this model has norms behind its sublayers: what a head adds depends on the others, and edges do not add up"
        )
    if model.config.n_layers == 0:
        raise RequestError("a model without layers has no edges to speak of")


def sender_outputs(model: Transformer, tokens: Tensor, hooks: TransformerHooks | None = None) -> Tensor:
    """What each sender writes to the stream, without attention's shared bias. [sender, batch, pos, d_model]"""
    check_additive(model)
    with torch.no_grad():
        live = LiveSenders(model, hooks)
        model(tokens, hooks=live.tree, logits_at=-1)
    return torch.cat(live.written)


class LiveSenders:
    """Keeps what each sender writes as the pass goes on: `written` is a list of [some senders, batch, pos, d_model]."""

    def __init__(self, model: Transformer, hooks: TransformerHooks | None = None) -> None:
        self.scale = model.config.residual_scale
        self.written: list[Tensor] = []
        self.tree = TransformerHooks() if hooks is None else hooks.copy()
        self.tree.append_to_path(f"{EMBEDDING}.fwd2", self._one)
        self.tree.append_to_path(f"{RESULT}.fwd2", self._heads)
        if model.config.mlp != "none":
            self.tree.append_to_path(f"{MLP_OUT}.fwd2", self._one)

    def _one(self, x: Tensor) -> None:
        self.written.append(x[None])

    def _heads(self, x: Tensor) -> None:
        self.written.append(x.movedim(2, 0) * self.scale)


def circuit_hooks(
    model: Transformer, circuit: Circuit, ablated: Tensor, hooks: TransformerHooks | None = None
) -> TransformerHooks:
    """Hooks under which every edge outside a circuit carries its ablated value.

    Args:
        ablated: what each sender would have written, [sender, batch or 1, pos or 1, d_model].
        hooks: further hooks, which act first.

    Raises:
        RequestError: the circuit is of another graph, or the model's parts do not add up.
    """
    check_additive(model)
    if circuit.shape != GraphShape.of(model.config):
        raise RequestError(
            f"the circuit is of a graph of {circuit.shape!r}, the model's is {GraphShape.of(model.config)!r}"
        )
    live = LiveSenders(model, hooks)
    cut = (circuit.shape.possible & ~circuit.kept).to(ablated.dtype)
    places: dict[tuple[str, int], list[int]] = {}
    last = model.config.n_layers - 1
    for index, port in enumerate(circuit.shape.receivers):
        if port.layer is None:
            places["resid.torso.post_mlp", last] = [index]
        else:
            site = "resid.torso.mlp_in" if port.reads == "mlp" else f"attn.{port.reads}_in"
            places.setdefault((site, port.layer), []).append(index)
    for (site, layer), indices in places.items():
        reader = _Reader(live, cut[:, indices], ablated, per_head=site.startswith("attn."))
        live.tree.append_to_path(f"{site}.fwd", AtLayers(layer).append(reader))
    return live.tree


class _Reader:
    """What some receivers of one site read: the stream, with cut edges replaced."""

    def __init__(self, live: LiveSenders, cut: Tensor, ablated: Tensor, *, per_head: bool) -> None:
        self.live, self.cut, self.ablated, self.per_head = live, cut, ablated, per_head

    def __call__(self, x: Tensor) -> Tensor | None:
        if not bool(self.cut.any()):
            return None
        written = torch.cat(self.live.written)
        count = len(written)
        cut = self.cut[:count].to(x.device)
        used = cut.any(1).nonzero()[:, 0]
        difference = written[used] - self.ablated.to(x.device)[used]
        if self.per_head:
            return x - torch.einsum("sbpd,sh->bphd", difference, cut[used])
        return x - torch.einsum("sbpd,s->bpd", difference, cut[used, 0])


@dataclass(frozen=True)
class CircuitScore:
    """How much of the model's behaviour a circuit holds; metrics averaged over rows.

    whole: of the model. empty: with every edge ablated. circuit: with the edges outside the circuit ablated.
    without: with the circuit's own edges ablated.
    """

    whole: float
    empty: float
    circuit: float
    without: float

    @property
    def faithfulness(self) -> float:
        """(circuit − empty) / (whole − empty): 1 when the circuit alone does what the model does."""
        return self._share(self.circuit)

    @property
    def completeness(self) -> float:
        """1 − (without − empty) / (whole − empty): 1 when nothing of it is left without the circuit."""
        return 1 - self._share(self.without)

    def _share(self, value: float) -> float:
        if self.whole == self.empty:
            raise RequestError(
                "the metric is the same with every edge ablated: there is no behaviour to share out"
            )
        return (value - self.empty) / (self.whole - self.empty)


def run_circuit(
    model: Transformer,
    tokens: Tensor,
    circuit: Circuit,
    ablation: Ablation,
    metric: Metric | Callable[..., Any],
    *,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Tensor:
    """The metric with all edges outside a circuit ablated, [batch], in one exact pass."""
    return circuit_metric(model, tokens, circuit, ablation.outputs(model, tokens), metric, hooks, logits_at)


def score_circuit(
    model: Transformer,
    tokens: Tensor,
    circuit: Circuit,
    ablation: Ablation,
    metric: Metric | Callable[..., Any],
    *,
    logits_at: Columns = None,
) -> CircuitScore:
    """Faithfulness and completeness of a circuit. Four passes and those that the ablation's values take."""
    values = ablation.outputs(model, tokens)
    every = Circuit(circuit.shape)

    def mean(chosen: Circuit) -> float:
        return float(circuit_metric(model, tokens, chosen, values, metric, None, logits_at).mean())

    return CircuitScore(mean(every), mean(every.complement()), mean(circuit), mean(circuit.complement()))


def circuit_metric(
    model: Transformer,
    tokens: Tensor,
    circuit: Circuit,
    ablated: Tensor,
    metric: Metric | Callable[..., Any],
    hooks: TransformerHooks | None,
    logits_at: Columns,
) -> Tensor:
    """The metric with edges outside the circuit at given values `ablated` of their senders, [batch]."""
    (bound,) = bind_metrics(metric, tokens, None, logits_at).values()
    with torch.no_grad():
        tree = circuit_hooks(model, circuit, ablated, hooks)
        return bound(model(tokens, hooks=tree, logits_at=bound.columns))
