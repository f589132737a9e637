"""Circuits: some edges of a model's graph with their scores; chosen by score, grown, pruned, and stored as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.files.atomic import write_json_atomic
from neuron_lens.interventions.circuits.nodes import GraphShape
from neuron_lens.interventions.places import validation_text
from neuron_lens.interventions.store import read_json

__all__ = ["Circuit", "Edge"]

FORMAT = 1


@dataclass(frozen=True)
class Edge:
    """A sender's contribution to what a receiver reads. score: its attribution."""

    sender: str
    receiver: str
    score: float


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
        """The circuit of these edges (sender, receiver), by name.

        Raises RequestError for one that does not exist, and when there are none.
        """
        chosen = list(edges)
        if not chosen:
            raise RequestError("a circuit of no edges was asked for: name at least one")
        return Circuit(self.shape, self.scores, self._mask(chosen))

    def among(self, nodes: Iterable[str]) -> Circuit:
        """The kept edges whose both ends belong to these nodes, by name ("embedding", "head 0.1", "logits", …).

        Raises RequestError for a node that the graph does not have, and when no edge is left.
        """
        known = {node.name: index for index, node in enumerate(self.shape.senders)}
        senders = torch.zeros(self.kept.shape[0], dtype=torch.bool)
        receivers = torch.zeros(self.kept.shape[1], dtype=torch.bool)
        for name in nodes:
            if name != "logits" and name not in known:
                raise RequestError(
                    f"the graph has no node {name!r}; {did_you_mean(name, [*known, 'logits'])}"
                )
            if name == "logits":
                receivers[-1] = True
            else:
                senders[known[name]] = True
                receivers[self.shape.fed_by[known[name]]] = True
        return self._of(self.kept & senders[:, None] & receivers, "no edge joins these nodes")

    def above(self, threshold: float) -> Circuit:
        """The kept edges whose score is at least `threshold` in size. Raises RequestError when there are none."""
        largest = float(torch.where(self.kept, self.scores.abs(), 0.0).max())
        return self._of(
            self.kept & (self.scores.abs() >= threshold),
            f"no edge has a score of {threshold:g} in size; the largest is {largest:g}",
        )

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
            reached[self.shape.fed_by[sender]] = True
        return Circuit(self.shape, self.scores, kept)

    def pruned(self) -> Circuit:
        """Without edges that lie on no path from the embedding to the logits. Raises RequestError when none does."""
        kept = self.kept.clone()
        while True:
            fed = torch.tensor(
                [
                    node.part == "embedding" or bool(kept[:, ports].any())
                    for node, ports in zip(self.shape.senders, self.shape.fed_by, strict=True)
                ]
            )
            readers = torch.zeros(kept.shape[1], dtype=torch.bool)
            readers[-1] = True
            for ports, is_used in zip(self.shape.fed_by, kept.any(1).tolist(), strict=True):
                if is_used:
                    readers[ports] = True
            fewer = kept & fed[:, None] & readers
            if torch.equal(fewer, kept):
                return self._of(kept, "no path of the circuit leads from the embedding to the logits")
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
            circuit = cls(GraphShape.model_validate(stored.get("shape")))
            edges = [(edge["from"], edge["to"]) for edge in stored["edges"]]
            chosen = [pair for pair, edge in zip(edges, stored["edges"], strict=True) if edge["kept"]]
            for place, edge in zip(circuit._places(edges), stored["edges"], strict=True):
                circuit.scores[place] = float(edge["score"])
        except ValidationError as error:
            raise RequestError(f"{path}: {validation_text(error)}") from None
        except (KeyError, TypeError) as error:
            raise RequestError(f"{path}: an edge lacks what it needs ({error!r})") from None
        return cls(circuit.shape, circuit.scores, circuit._mask(chosen))

    def _of(self, kept: Tensor, why_empty: str) -> Circuit:
        """A circuit of some of the edges. Raises RequestError when it would be empty."""
        if not bool(kept.any()):
            raise RequestError(f"the circuit would be empty: {why_empty}")
        return Circuit(self.shape, self.scores, kept)

    def _mask(self, edges: Iterable[tuple[str, str]]) -> Tensor:
        kept = torch.zeros_like(self.kept)
        for place in self._places(edges):
            kept[place] = True
        return kept

    def _places(self, edges: Iterable[tuple[str, str]]) -> Iterator[tuple[int, int]]:
        """Indices (sender, receiver) of edges by name. Raises RequestError for one that does not exist."""
        senders = {node.name: index for index, node in enumerate(self.shape.senders)}
        receivers = {port.name: index for index, port in enumerate(self.shape.receivers)}
        possible = self.shape.possible
        for sender, receiver in edges:
            for name, known in ((sender, senders), (receiver, receivers)):
                if name not in known:
                    raise RequestError(f"the graph has no {name!r}; {did_you_mean(name, known)}")
            place = senders[sender], receivers[receiver]
            if not bool(possible[place]):
                raise RequestError(
                    f"there is no edge from {sender!r} to {receiver!r}: it reads before that writes"
                )
            yield place

    def _edge(self, sender: int, receiver: int) -> Edge:
        names = self.shape.senders[sender].name, self.shape.receivers[receiver].name
        return Edge(*names, float(self.scores[sender, receiver]))


def _check_count(count: int) -> None:
    if count < 1:
        raise RequestError(f"a circuit has at least one edge, got a count of {count}")
