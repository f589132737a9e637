"""Running a circuit: the model with all edges outside it ablated, exactly, in one pass.

Each receiver reads the stream less what the senders of ablated edges wrote to it, plus what they would have written under
the ablation: x − Σ (live − ablated).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder
from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.circuits.ablation import Ablation
from neuron_lens.interventions.circuits.circuit import Circuit
from neuron_lens.interventions.circuits.nodes import GraphShape, Units
from neuron_lens.interventions.circuits.reads import READ_AT_SITES, read_site
from neuron_lens.interventions.circuits.senders import LiveSenders
from neuron_lens.interventions.metrics import Columns, Metric, bind_metrics

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["CircuitScore", "circuit_hooks", "circuit_metric", "run_circuit", "score_circuit"]


def circuit_hooks(
    model: Transformer,
    circuit: Circuit,
    ablated: Tensor,
    hooks: TransformerHooks | None = None,
    *,
    autoencoders: Mapping[str, Autoencoder] | None = None,
) -> TransformerHooks:
    """Hooks under which every edge outside a circuit carries its ablated value. For one pass at a time.

    Args:
        ablated: what each sender would have written, [sender, batch or 1, pos or 1, d_model].
        hooks: further hooks, which act first. autoencoders: those whose latents are nodes, by name.

    Raises:
        RequestError: the circuit is of another model's graph, or an autoencoder is missing.
    """
    shape = circuit.shape
    if shape != GraphShape.of(model.config, shape.units):
        raise RequestError(
            f"the circuit is of a graph of {shape!r}, the model's is {GraphShape.of(model.config)!r}"
        )
    cut = (shape.possible & ~circuit.kept).to(ablated.dtype)
    places: dict[tuple[str, int], list[int]] = {}
    streams: dict[tuple[int, str], _Reader] = {}
    for index, port in enumerate(shape.receivers):
        if port.reads in READ_AT_SITES:
            place = read_site(port.reads, port.layer, model.config.n_layers)
            places.setdefault(place, []).append(index)

    def copies(units: Units, x: Tensor) -> Tensor | None:
        return streams[units.layer, units.place](x)

    live = LiveSenders(model, shape, hooks, autoencoders, copies)
    names = [port.name for port in shape.receivers]
    for units in shape.units:
        columns = [names.index(node.name) for node in units.nodes()]
        # units of an MLP need streams of their own as soon as the rest of it has another
        rest = [names.index(f"mlp {units.layer}")] if units.place == "mlp" else []
        streams[units.layer, units.place] = _Reader(
            live, cut[:, columns], ablated, many=True, always=bool(cut[:, rest].any())
        )
    for (site, layer), indices in places.items():
        reader = _Reader(live, cut[:, indices], ablated, many=site.startswith("attn."))
        if reader.any_cut:
            live.tree.append_to_path(f"{site}.fwd", AtLayers(layer).append(reader))
    return live.tree


class _Reader:
    """What some receivers of one site read: the stream, with cut edges replaced.

    many: receivers have streams of their own, x is [batch, pos, d_model] or [batch, pos, receiver, d_model], and the
    result the latter. always: give them even where nothing is cut.
    """

    def __init__(
        self, live: LiveSenders, cut: Tensor, ablated: Tensor, *, many: bool, always: bool = False
    ) -> None:
        self.live, self.cut, self.ablated, self.many = live, cut, ablated, many
        self.any_cut, self.always = bool(cut.any()), always

    def __call__(self, x: Tensor) -> Tensor | None:
        streams = x[:, :, None] if self.many and x.dim() == 3 else x
        if not self.any_cut:
            return streams.expand(-1, -1, self.cut.shape[1], -1) if self.always else None
        written = torch.cat(self.live.written)
        cut = self.cut[: len(written)].to(x.device)
        used = cut.any(1).nonzero()[:, 0]
        difference = written[used] - self.ablated.to(x.device)[used]
        if self.many:
            return streams - torch.einsum("sbpd,sr->bprd", difference, cut[used])
        return streams - torch.einsum("sbpd,s->bpd", difference, cut[used, 0])


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
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    autoencoders: Mapping[str, Autoencoder] | None = None,
    logits_at: Columns = None,
) -> Tensor:
    """The metric with all edges outside a circuit ablated, [batch], in one exact pass.

    Args:
        tokens: [batch, pos]. pad: true where a column is padding. hooks: further hooks of the run.
        autoencoders: those whose latents are nodes of the circuit, by name.

    Raises:
        RequestError: the circuit is of another graph, an autoencoder is missing, the ablation's prompts do not align.
    """
    ablated = ablation.outputs(model, tokens, shape=circuit.shape, autoencoders=autoencoders, pad=pad)
    return circuit_metric(model, tokens, circuit, ablated, metric, hooks, logits_at, pad, autoencoders)


def score_circuit(
    model: Transformer,
    tokens: Tensor,
    circuit: Circuit,
    ablation: Ablation,
    metric: Metric | Callable[..., Any],
    *,
    pad: Tensor | None = None,
    autoencoders: Mapping[str, Autoencoder] | None = None,
    logits_at: Columns = None,
) -> CircuitScore:
    """Faithfulness and completeness of a circuit. Four passes and those that the ablation's values take.

    Arguments as of `run_circuit`. Raises RequestError as it does.
    """
    values = ablation.outputs(model, tokens, shape=circuit.shape, autoencoders=autoencoders, pad=pad)
    every = Circuit(circuit.shape)

    def mean(chosen: Circuit) -> float:
        found = circuit_metric(model, tokens, chosen, values, metric, None, logits_at, pad, autoencoders)
        return float(found.mean())

    return CircuitScore(mean(every), mean(every.complement()), mean(circuit), mean(circuit.complement()))


def circuit_metric(
    model: Transformer,
    tokens: Tensor,
    circuit: Circuit,
    ablated: Tensor,
    metric: Metric | Callable[..., Any],
    hooks: TransformerHooks | None,
    logits_at: Columns,
    pad: Tensor | None,
    autoencoders: Mapping[str, Autoencoder] | None,
) -> Tensor:
    """The metric with edges outside the circuit at given values `ablated` of their senders, [batch]."""
    (bound,) = bind_metrics(metric, tokens, pad, logits_at).values()
    with torch.no_grad():
        tree = circuit_hooks(model, circuit, ablated, hooks, autoencoders=autoencoders)
        return bound(model(tokens, hooks=tree, pad=pad, logits_at=bound.columns))
