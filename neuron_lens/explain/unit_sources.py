"""From units to where a model is read: which source each unit belongs to. Brings torch in when asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from neuron_lens.errors import RequestError
from neuron_lens.records import Unit

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.harvest.sources import Direction, UnitSource
    from neuron_lens.transformer import Transformer

__all__ = ["NamesUnits", "blocks", "grouped", "source_of", "sources_of"]


def grouped(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units by kind, layer, site and dictionary, which share a source."""
    groups: dict[tuple[str, int, str, str], list[Unit]] = {}
    for unit in units:
        groups.setdefault((unit.kind, unit.layer, unit.site, unit.dictionary), []).append(unit)
    return list(groups.values())


def blocks(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """At most `size` units at a time, of one source each."""
    for own in grouped(units):
        for begin in range(0, len(own), size):
            yield own[begin : begin + size]


def source_of(
    units: Sequence[Unit],
    model: Transformer,
    autoencoders: Mapping[str, Autoencoder],
    directions: Sequence[Direction],
) -> UnitSource:
    """Where units of one kind, layer, site and dictionary are read.

    `autoencoders` are by name of their dictionary. Raises RequestError for units at another site than their kind is
    read at, or of an autoencoder or direction that is not given.
    """
    from neuron_lens.harvest.sources import DirectionSource, HeadSource, LatentSource, NeuronSource

    first = units[0]
    expected = {"neuron": "mlp.post_act", "head": "attn.v_out"}.get(first.kind, first.site)
    if first.site != expected:
        raise RequestError(f"{first.kind}s are explained at {expected}; got a {first.kind} at {first.site}")
    source: UnitSource
    if first.kind == "neuron":
        source = NeuronSource(model, first.layer)
    elif first.kind == "head":
        source = HeadSource(model, first.layer)
    elif first.kind == "latent":
        if first.dictionary not in autoencoders:
            raise RequestError(
                f"no autoencoder {first.dictionary!r} is known for {first}; give it as "
                "Pipeline(…, autoencoders=[…]) and name latents with pipeline.latents([…])"
            )
        source = LatentSource(
            model,
            autoencoders[first.dictionary],
            [unit.index for unit in units],
            dictionary=first.dictionary,
        )
    else:
        found = [each for each in directions if each.dictionary == first.dictionary]
        if not found:
            raise RequestError(
                f"no direction {first.dictionary!r} is known; give it as Pipeline(…, directions=[…]) and "
                "name it with pipeline.directed()"
            )
        # One vector may be given at several places.
        here = [each for each in found if (each.site, each.layer) == (first.site, first.layer)]
        source = DirectionSource(model, (here or found)[0])
    if (source.site, source.layer) != (first.site, first.layer):
        raise RequestError(
            f"{first} at {first.site}: its {first.kind} source reads {source.site} of layer {source.layer}"
        )
    return source


def sources_of(
    units: Sequence[Unit],
    model: Transformer,
    autoencoders: Mapping[str, Autoencoder],
    directions: Sequence[Direction],
    *,
    model_name: str,
) -> dict[Unit, UnitSource]:
    """The source of every unit, one for those that share it; see `source_of`.

    Raises RequestError for no units at all, a unit that does not exist, or two sources of one name.
    """
    if not units:
        raise RequestError("no units to explain: name at least one layer and neuron")
    last = model.config.n_layers - 1
    for unit in units:
        if unit.layer > last:
            raise RequestError(f"layer {unit.layer} does not exist: {model_name} has layers 0 to {last}")
    found: dict[Unit, UnitSource] = {}
    for own in grouped(units):
        source = source_of(own, model, autoencoders, directions)
        beyond = [unit.index for unit in own if unit.index >= source.n_units]
        if beyond:
            raise RequestError(
                f"{source.kind} {beyond[0]} does not exist: {model_name} has 0 to {source.n_units - 1} in every layer"
            )
        found |= dict.fromkeys(own, source)
    _refuse_namesakes(list(dict.fromkeys(found.values())))
    return found


def _refuse_namesakes(sources: Sequence[UnitSource]) -> None:
    """Harvests lie under the names of their sources, units under kind, layer and dictionary."""
    by_name: dict[str, UnitSource] = {}
    for source in sources:
        other = by_name.setdefault(source.name, source)
        if other is not source:
            raise RequestError(
                f"{source.name} would be read at {other.site} and at {source.site}, and both be filed under one name; "
                "name the directions differently"
            )


class NamesUnits:
    """Base of what has a model, autoencoders and directions: makes their units from numbers."""

    model: Transformer
    directions: Sequence[Direction]
    _dictionaries: dict[str, Autoencoder]

    def default_units(self, layer: int | None = None, count: int = 8) -> tuple[Unit, ...]:
        """Units to show when none are named: spread evenly over a layer's neurons (default: the middle
        layer)."""
        config = self.model.config
        layer = config.n_layers // 2 if layer is None else layer
        places = np.linspace(0, config.d_mlp - 1, min(count, config.d_mlp)).astype(int)
        return self.neurons(layer, [int(index) for index in places])

    def neurons(self, layer: int, indices: Sequence[int]) -> tuple[Unit, ...]:
        """Neurons of a layer."""
        return tuple(Unit(layer=layer, index=index) for index in indices)

    def heads(self, layer: int, indices: Sequence[int]) -> tuple[Unit, ...]:
        """Attention heads of a layer."""
        return tuple(Unit(kind="head", layer=layer, index=index, site="attn.v_out") for index in indices)

    def latents(self, indices: Sequence[int], autoencoder: Autoencoder | None = None) -> tuple[Unit, ...]:
        """Latents of one of the pipeline's autoencoders (which one must be said when there are several)."""
        found = [
            (name, each)
            for name, each in self._dictionaries.items()
            if autoencoder is None or each is autoencoder
        ]
        if len(found) != 1:
            raise RequestError(
                f"say which autoencoder: {len(found)} of the pipeline's {len(self._dictionaries)} fit; give "
                "them as Pipeline(…, autoencoders=[…])"
            )
        name, chosen = found[0]
        site = chosen.config.site_in
        if site is None or site.layer is None:
            raise RequestError(
                "this autoencoder does not say which site and layer of a model it was made for"
            )
        return tuple(
            Unit(kind="latent", layer=site.layer, index=index, site=site.path, dictionary=name)
            for index in indices
        )

    def directed(self) -> tuple[Unit, ...]:
        """The pipeline's directions as units."""
        return tuple(
            Unit(kind="direction", layer=each.layer, index=0, site=each.site, dictionary=each.dictionary)
            for each in self.directions
        )
