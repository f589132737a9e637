"""The graph of a transformer's computation through the residual stream: who writes, who reads, and which edges count.

Senders write to the stream: the embedding, heads, MLPs. Receivers read it: the queries, keys and values of heads, MLPs,
the logits. An edge is a sender's contribution to what one receiver reads. Knows no tensors of activations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.interventions.places import Frozen, validation_text
from neuron_lens.interventions.store import read_json
from neuron_lens.transformer import TransformerConfig

__all__ = ["Circuit", "Edge", "GraphShape", "Node"]

FORMAT = 1


class Node(Frozen):
    """A part that writes to the stream, or the logits. Called "embedding", "head 3.1", "mlp 2" or "logits"."""

    part: Literal["embedding", "head", "mlp", "logits"]
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        """A short name."""
        if self.layer is None:
            return self.part
        return f"{self.part} {self.layer}" + ("" if self.head is None else f".{self.head}")


class Port(Frozen):
    """What a receiver reads the stream with. head counts kv heads for keys and values."""

    reads: Literal["q", "k", "v", "mlp", "logits"]
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        """A short name."""
        if self.layer is None:
            return self.reads
        return f"{self.reads} {self.layer}" + ("" if self.head is None else f".{self.head}")


@dataclass(frozen=True)
class Edge:
    """A sender's contribution to what a receiver reads. score: its attribution."""

    sender: str
    receiver: str
    score: float


class GraphShape(Frozen):
    """All nodes and edges a model has.

    n_layers, n_heads, n_kv_heads: of the model. mlp: it has MLPs. parallel: they read what attention reads.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: bool
    parallel: bool

    @classmethod
    def of(cls, config: TransformerConfig) -> GraphShape:
        """The graph of a model."""
        return cls(
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            mlp=config.mlp != "none",
            parallel=config.parallel,
        )

    @cached_property
    def senders(self) -> list[Node]:
        """Who writes, in computation order: the embedding, then each layer's heads and its MLP."""
        nodes = [Node(part="embedding")]
        for layer in range(self.n_layers):
            nodes += [Node(part="head", layer=layer, head=head) for head in range(self.n_heads)]
            nodes += [Node(part="mlp", layer=layer)] if self.mlp else []
        return nodes

    @cached_property
    def receivers(self) -> list[Port]:
        """Who reads: each layer's queries, keys and values by head, its MLP; at last the logits."""
        ports: list[Port] = []
        for layer in range(self.n_layers):
            ports += [Port(reads="q", layer=layer, head=head) for head in range(self.n_heads)]
            ports += [Port(reads="k", layer=layer, head=head) for head in range(self.n_kv_heads)]
            ports += [Port(reads="v", layer=layer, head=head) for head in range(self.n_kv_heads)]
            ports += [Port(reads="mlp", layer=layer)] if self.mlp else []
        return [*ports, Port(reads="logits")]

    def senders_before(self, port: Port) -> int:
        """How many senders, the first ones, have written when a receiver reads."""
        layer = self.n_layers if port.layer is None else port.layer
        before = 1 + layer * (self.n_heads + self.mlp)
        return before + self.n_heads * (port.reads == "mlp" and not self.parallel)

    @property
    def possible(self) -> Tensor:
        """Which edges exist, [sender, receiver] bool."""
        order = torch.arange(len(self.senders))[:, None]
        return order < torch.tensor([self.senders_before(port) for port in self.receivers])

    def readers_of(self, node: Node) -> list[int]:
        """Indices of the receivers that feed a node."""
        group = self.n_heads // self.n_kv_heads
        found = []
        for index, port in enumerate(self.receivers):
            if node.part == "head" and node.head is not None:
                own = port.layer == node.layer and (
                    (port.reads == "q" and port.head == node.head)
                    or (port.reads in ("k", "v") and port.head == node.head // group)
                )
            else:
                own = port.reads == node.part and port.layer == node.layer
            found += [index] if own else []
        return found


class Circuit:
    """Some edges of a model's graph, with their scores.

    Attributes:
        shape: the whole graph.
        scores: attribution of each edge, [sender, receiver]; 0 where there is none.
        kept: the edges of the circuit, [sender, receiver] bool.
    """

    def __init__(self, shape: GraphShape, scores: Tensor | None = None, kept: Tensor | None = None) -> None:
        self.shape = shape
        possible = shape.possible
        self.scores = (
            torch.zeros(possible.shape)
            if scores is None
            else torch.where(possible, scores.float().cpu(), 0.0)
        )
        self.kept = possible.clone() if kept is None else kept.cpu() & possible

    def __len__(self) -> int:
        return int(self.kept.sum())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Circuit)
            and self.shape == other.shape
            and torch.equal(self.kept, other.kept)
            and torch.equal(self.scores, other.scores)
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Circuit of {len(self)} of {int(self.shape.possible.sum())} edges and {len(self.nodes())} nodes"
        )

    def edges(self) -> Iterator[Edge]:
        """The edges kept, the strongest first."""
        places = self.kept.nonzero().tolist()
        places.sort(key=lambda place: -abs(float(self.scores[place[0], place[1]])))
        for sender, receiver in places:
            yield self._edge(sender, receiver)

    def nodes(self) -> list[str]:
        """Senders with an edge kept, and the logits if something reaches them."""
        names = [
            node.name for node, row in zip(self.shape.senders, self.kept, strict=True) if bool(row.any())
        ]
        return names + (["logits"] if bool(self.kept[:, -1].any()) else [])

    def with_edges(self, edges: Iterable[tuple[str, str]]) -> Circuit:
        """The circuit of these edges (sender, receiver), by name. Raises RequestError for one that does not exist."""
        senders = {node.name: index for index, node in enumerate(self.shape.senders)}
        receivers = {port.name: index for index, port in enumerate(self.shape.receivers)}
        kept = torch.zeros_like(self.kept)
        for sender, receiver in edges:
            for name, known in ((sender, senders), (receiver, receivers)):
                if name not in known:
                    raise RequestError(f"the graph has no {name!r}; {did_you_mean(name, known)}")
            if not bool(self.shape.possible[senders[sender], receivers[receiver]]):
                raise RequestError(
                    f"there is no edge from {sender!r} to {receiver!r}: it reads before that writes"
                )
            kept[senders[sender], receivers[receiver]] = True
        return Circuit(self.shape, self.scores, kept)

    def above(self, threshold: float) -> Circuit:
        """The kept edges whose score is at least `threshold` in size."""
        return Circuit(self.shape, self.scores, self.kept & (self.scores.abs() >= threshold))

    def top(self, count: int) -> Circuit:
        """The `count` kept edges with the largest scores in size."""
        _check_count(count)
        sizes = torch.where(self.kept, self.scores.abs(), -1.0).flatten()
        chosen = sizes.topk(min(count, len(self))).indices
        kept = torch.zeros_like(sizes, dtype=torch.bool).index_fill(0, chosen, True)
        return Circuit(self.shape, self.scores, kept.view_as(self.kept))

    def greedy(self, count: int) -> Circuit:
        """`count` kept edges grown from the logits: always the strongest edge into a node that is already there
        (Hanna et al. 2024, arXiv 2403.17806), so that every edge leads to the logits."""
        _check_count(count)
        reached = torch.zeros(len(self.shape.receivers), dtype=torch.bool)
        reached[-1] = True
        kept = torch.zeros_like(self.kept)
        for _ in range(min(count, len(self))):
            open_edges = self.kept & ~kept & reached
            if not bool(open_edges.any()):
                break
            best = int(torch.where(open_edges, self.scores.abs(), -1.0).argmax())
            sender, receiver = divmod(best, kept.shape[1])
            kept[sender, receiver] = True
            reached[self.shape.readers_of(self.shape.senders[sender])] = True
        return Circuit(self.shape, self.scores, kept)

    def pruned(self) -> Circuit:
        """Without edges that lie on no path from the embedding to the logits."""
        kept = self.kept.clone()
        while True:
            fed = torch.tensor(
                [
                    node.part == "embedding" or bool(kept[:, self.shape.readers_of(node)].any())
                    for node in self.shape.senders
                ]
            )
            used = kept.any(1)
            readers = torch.zeros(kept.shape[1], dtype=torch.bool)
            readers[-1] = True
            for node, is_used in zip(self.shape.senders, used.tolist(), strict=True):
                if is_used:
                    readers[self.shape.readers_of(node)] = True
            fewer = kept & fed[:, None] & readers
            if torch.equal(fewer, kept):
                return Circuit(self.shape, self.scores, kept)
            kept = fewer

    def complement(self) -> Circuit:
        """All the other edges."""
        return Circuit(self.shape, self.scores, ~self.kept)

    def save(self, path: str | os.PathLike[str], *, only_kept: bool = False) -> None:
        """Write as JSON. only_kept: leave out the scores of edges that are not kept."""
        listed = self.kept if only_kept else self.shape.possible & (self.kept | (self.scores != 0))
        edges = []
        for sender, receiver in listed.nonzero().tolist():
            edge = self._edge(sender, receiver)
            kept = bool(self.kept[sender, receiver])
            edges.append({"from": edge.sender, "to": edge.receiver, "score": edge.score, "kept": kept})
        write_json_atomic(
            path, {"format": FORMAT, "shape": self.shape.model_dump(), "edges": edges}, indent=None
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Circuit:
        """Read what `save` wrote. Raises RequestError when it is missing, damaged or something else."""
        stored = read_json(path)
        if not isinstance(stored, dict) or stored.get("format") != FORMAT or "edges" not in stored:
            raise RequestError(f"{path} does not hold a circuit of format {FORMAT}")
        try:
            empty = cls(GraphShape.model_validate(stored.get("shape")))
            kept = empty.with_edges((edge["from"], edge["to"]) for edge in stored["edges"] if edge["kept"])
            there = empty.with_edges((edge["from"], edge["to"]) for edge in stored["edges"])
            scores = torch.zeros(kept.scores.shape)
            # both are walked in row-major order
            order = sorted(stored["edges"], key=lambda edge: _order(empty.shape)(edge))
            scores[there.kept] = torch.tensor([float(edge["score"]) for edge in order])
        except ValidationError as error:
            raise RequestError(f"{path}: {validation_text(error)}") from None
        except (KeyError, TypeError) as error:
            raise RequestError(f"{path}: an edge lacks what it needs ({error!r})") from None
        return cls(kept.shape, scores, kept.kept)

    def _edge(self, sender: int, receiver: int) -> Edge:
        names = self.shape.senders[sender].name, self.shape.receivers[receiver].name
        return Edge(*names, float(self.scores[sender, receiver]))


def _order(shape: GraphShape) -> Callable[[dict[str, Any]], tuple[int, int]]:
    senders = {node.name: index for index, node in enumerate(shape.senders)}
    receivers = {port.name: index for index, port in enumerate(shape.receivers)}
    return lambda edge: (senders[edge["from"]], receivers[edge["to"]])


def _check_count(count: int) -> None:
    if count < 0:
        raise RequestError(f"a number of edges is at least 0, got {count}")
