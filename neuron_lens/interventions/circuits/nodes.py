"""The graph of a transformer's computation through the residual stream: who writes, who reads, which edges can be.

Senders write to the stream: the embedding, heads, MLPs, and neurons or latents where some were chosen. Receivers read it:
the queries, keys and values of heads, MLPs, chosen neurons and latents, the logits. An edge is a sender's contribution
to what one receiver reads. Knows no tensors of activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.places import Frozen
from neuron_lens.transformer import TransformerConfig

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder

__all__ = ["GraphShape", "Node", "Port", "Units"]

SPLICED = "resid.torso.delta_mlp", "resid.torso.post_mlp"
READ_BY_TRANSCODERS = "resid.torso.mlp_in", "resid.torso.post_ln_mlp"


class Node(Frozen):
    """A part that writes to the stream, or the logits.

    Called "embedding", "head 3.1", "mlp 2", "neuron 2.17", "latent sae 2.431", "remainder sae 2" or "logits".
    """

    part: Literal["embedding", "head", "mlp", "neuron", "latent", "remainder", "logits"]
    layer: int | None = None
    head: int | None = None
    unit: int | None = None
    autoencoder: str = ""

    @property
    def name(self) -> str:
        """A short name."""
        return _name(self.part, self.autoencoder, self.layer, self.head if self.unit is None else self.unit)


class Port(Frozen):
    """What a receiver reads the stream with. head counts kv heads for keys and values."""

    reads: Literal["q", "k", "v", "mlp", "neuron", "latent", "remainder", "logits"]
    layer: int | None = None
    head: int | None = None
    unit: int | None = None
    autoencoder: str = ""

    @property
    def name(self) -> str:
        """A short name."""
        return _name(self.reads, self.autoencoder, self.layer, self.head if self.unit is None else self.unit)


def _name(part: str, autoencoder: str, layer: int | None, index: int | None) -> str:
    words = [part] + ([autoencoder] if autoencoder else [])
    if layer is not None:
        words.append(f"{layer}" if index is None else f"{layer}.{index}")
    return " ".join(words)


class Units(Frozen):
    """Neurons of an MLP, or latents of an autoencoder, that become nodes of their own.

    Neurons read what their MLP reads and write their output weights; "mlp" is then the rest of that MLP. Latents of an
    autoencoder or transcoder of an MLP's output do the same. Latents of the stream behind a block read the stream there
    and write their decoder directions; a further node, "remainder", reads the stream too and takes what all of them
    write out again, so that writers still add up to the stream: earlier nodes and the remainder together are what
    these latents leave unexplained (the error of Marks et al. 2024, arXiv 2403.19647).

    Made by `Units.neurons` and `Units.latents`.

    Attributes:
        place: "mlp" or "block": where they write.
        autoencoder: its name in `autoencoders={name: …}`; empty for neurons.
    """

    part: Literal["neuron", "latent"]
    layer: int
    indices: tuple[int, ...]
    place: Literal["mlp", "block"] = "mlp"
    autoencoder: str = ""

    @field_validator("indices")
    @classmethod
    def _some(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if not given or min(given) < 0 or len(set(given)) != len(given):
            raise ValueError("different whole numbers from 0 upwards, at least one")
        return given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if (self.part == "latent") != bool(self.autoencoder):
            raise ValueError("latents name their autoencoder, neurons none")
        if self.part == "neuron" and self.place != "mlp":
            raise ValueError("neurons write in their MLP")
        if " " in self.autoencoder:
            raise ValueError("the name of an autoencoder is a part of node names and has no spaces")
        return self

    @classmethod
    def neurons(cls, layer: int, indices: Iterable[int]) -> Units:
        """Neurons of one layer's MLP, by index in `mlp.post_act`."""
        return cls(part="neuron", layer=layer, indices=tuple(indices))

    @classmethod
    def latents(
        cls, name: str, autoencoder: Autoencoder, indices: Iterable[int], *, layer: int | None = None
    ) -> Units:
        """Latents of an autoencoder at its own site.

        Args:
            name: under which the autoencoder is passed on, `autoencoders={name: autoencoder}`.
            layer: None for the autoencoder's own.

        Raises:
            RequestError: its site is neither an MLP's output (autoencoders, transcoders) nor the stream behind a block,
                or a latent does not exist.
        """
        config = autoencoder.config
        read, write = config.site_in, config.site_out
        if read is None or write is None or read.layer != write.layer:
            raise RequestError(
                f"autoencoder {name!r} does not say which one layer it is for; its config needs site_in"
            )
        if not (
            (read.path == write.path and write.path in SPLICED)
            or (read.path in READ_BY_TRANSCODERS and write.path == SPLICED[0])
        ):
            raise RequestError(
                f"autoencoder {name!r} reads {read.path} and writes {write.path}; latents are nodes at "
                f"{' and '.join(SPLICED)}, or of transcoders from {' or '.join(READ_BY_TRANSCODERS)} to {SPLICED[0]}"
            )
        own = read.layer if layer is None else layer
        if own is None:
            raise RequestError(f"autoencoder {name!r} is for no certain layer; say layer=…")
        chosen = tuple(indices)
        if chosen and max(chosen) >= config.d_latent:
            raise RequestError(
                f"latent {max(chosen)} does not exist: {name!r} has {config.d_latent}, counted from 0"
            )
        place: Literal["mlp", "block"] = "mlp" if write.path == SPLICED[0] else "block"
        return cls(part="latent", layer=own, indices=chosen, place=place, autoencoder=name)

    def nodes(self) -> list[Node]:
        """The nodes these are, in the order of `indices`; behind a block the remainder comes last."""
        found = [
            Node(part=self.part, layer=self.layer, unit=unit, autoencoder=self.autoencoder)
            for unit in self.indices
        ]
        if self.place == "block":
            found.append(Node(part="remainder", layer=self.layer, autoencoder=self.autoencoder))
        return found

    def ports(self) -> list[Port]:
        """What these read with, each of `nodes` with one."""
        return [
            Port(
                reads="remainder" if node.part == "remainder" else self.part,
                layer=node.layer,
                unit=node.unit,
                autoencoder=node.autoencoder,
            )
            for node in self.nodes()
        ]


class GraphShape(Frozen):
    """All nodes and edges a model has.

    n_layers, n_heads, n_kv_heads: of the model. mlp: it has MLPs. parallel: they read what attention reads.
    units: neurons and latents that are nodes of their own; for each layer and place at most one set.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: bool
    parallel: bool
    units: tuple[Units, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        places = [(units.layer, units.place) for units in self.units]
        for units in self.units:
            if not 0 <= units.layer < self.n_layers:
                raise ValueError(f"units at layer {units.layer}; the model has {self.n_layers}, from 0")
            if units.place == "mlp" and not self.mlp:
                raise ValueError(f"units in the MLP of layer {units.layer}; the model has none")
            if places.count((units.layer, units.place)) > 1:
                raise ValueError(
                    f"two sets of units at the {units.place} of layer {units.layer}: one part is split one way; "
                    "join their indices, or choose between neurons and latents"
                )
        return self

    @classmethod
    def of(cls, config: TransformerConfig, units: Iterable[Units] = ()) -> GraphShape:
        """The graph of a model. Raises RequestError for units that it does not have."""
        if config.n_layers == 0:
            raise RequestError("a model without layers has no edges to speak of")
        chosen = tuple(units)
        for one in chosen:
            if one.part == "neuron" and config.mlp not in ("plain", "gated"):
                raise RequestError(f"neurons of layer {one.layer}: the model's MLP is {config.mlp!r}")
            if one.part == "neuron" and max(one.indices) >= config.d_mlp:
                raise RequestError(
                    f"neuron {max(one.indices)} does not exist: the model's MLPs have {config.d_mlp}, counted from 0"
                )
        return cls(
            n_layers=config.n_layers,
            n_heads=config.n_heads,
            n_kv_heads=config.n_kv_heads,
            mlp=config.mlp != "none",
            parallel=config.parallel,
            units=chosen,
        )

    def units_at(self, layer: int, place: str) -> Units | None:
        """The units that write at one place ("mlp" or "block"), if some were chosen."""
        return next((one for one in self.units if (one.layer, one.place) == (layer, place)), None)

    @cached_property
    def senders(self) -> list[Node]:
        """Who writes, in computation order: the embedding, then each layer's heads, MLP, units of both places."""
        nodes = [Node(part="embedding")]
        for layer in range(self.n_layers):
            nodes += [Node(part="head", layer=layer, head=head) for head in range(self.n_heads)]
            nodes += [Node(part="mlp", layer=layer)] if self.mlp else []
            for place in ("mlp", "block"):
                units = self.units_at(layer, place)
                nodes += units.nodes() if units else []
        return nodes

    @cached_property
    def receivers(self) -> list[Port]:
        """Who reads: each layer's queries, keys and values by head, its MLP and units; at last the logits."""
        ports: list[Port] = []
        for layer in range(self.n_layers):
            ports += [Port(reads="q", layer=layer, head=head) for head in range(self.n_heads)]
            ports += [Port(reads="k", layer=layer, head=head) for head in range(self.n_kv_heads)]
            ports += [Port(reads="v", layer=layer, head=head) for head in range(self.n_kv_heads)]
            ports += [Port(reads="mlp", layer=layer)] if self.mlp else []
            for place in ("mlp", "block"):
                units = self.units_at(layer, place)
                ports += units.ports() if units else []
        return [*ports, Port(reads="logits")]

    def senders_of_layer(self, layer: int) -> int:
        """Index of the first sender of a layer; of n_layers: how many senders there are."""
        before = (node.layer is None or node.layer < layer for node in self.senders)
        return sum(before)

    def senders_before(self, port: Port) -> int:
        """How many senders, the first ones, have written when a receiver reads."""
        layer = self.n_layers if port.layer is None else port.layer
        before = self.senders_of_layer(layer)
        if port.reads in ("q", "k", "v", "logits"):
            return before
        inside = self.units_at(layer, "mlp")
        if port.reads == "mlp" or (inside is not None and port in inside.ports()):
            return before + self.n_heads * (not self.parallel)
        return before + self.n_heads + self.mlp + (len(inside.indices) if inside else 0)

    @cached_property
    def _written_before(self) -> list[int]:
        return [self.senders_before(port) for port in self.receivers]

    @property
    def possible(self) -> Tensor:
        """Which edges exist, [sender, receiver] bool."""
        return torch.arange(len(self.senders))[:, None] < torch.tensor(self._written_before)

    @cached_property
    def fed_by(self) -> list[list[int]]:
        """For each sender the indices of the receivers that feed it."""
        index = {port.name: at for at, port in enumerate(self.receivers)}
        group = self.n_heads // self.n_kv_heads
        table = []
        for node in self.senders:
            names = [node.name]
            if node.head is not None:
                kv = node.head // group
                names = [f"q {node.layer}.{node.head}", f"k {node.layer}.{kv}", f"v {node.layer}.{kv}"]
            table.append([index[name] for name in names if name in index])
        return table
