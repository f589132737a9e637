"""Chosen neurons and latents in a forward pass: what each is when it reads a stream of its own, and what it writes.

Each unit gets its own copy of the stream. Where the copy is what the rest of its part reads, nothing changes; where an
edge into the unit is cut, the unit alone changes, and the part's output moves along the unit's direction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from neuron_lens.autoencoders import Autoencoder
from neuron_lens.autoencoders.normalisation import DecodeState, normalise
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AtLayers, MLPHooks, TransformerHooks
from neuron_lens.interventions.circuits.nodes import GraphShape, Units
from neuron_lens.transformer.norm import Norm

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["LatentUnits", "NeuronUnits", "UnitHooks", "UnitsOfModel", "open_units", "through_norm"]


class UnitsOfModel:
    """Some units of one model.

    Attributes:
        directions: what one of each unit's activation writes, [unit, d_model]; of neurons before the norm that may
            stand behind the MLP, else to the stream.
    """

    directions: Tensor

    def __init__(self, units: Units, model: Transformer) -> None:
        self.units = units
        self.block: Any = model.blocks[units.layer]

    def values(self, read: Tensor) -> Tensor:
        """Each unit's activation when it reads its own copy of the stream. [batch, pos, unit, d_model] ->
        [batch, pos, unit]"""
        raise NotImplementedError

    def normalised(self, read: Tensor) -> Tensor:
        """The stream as the MLP's weights read it."""
        norm = self.block.ln_attn if self.block.config.shared_norm else self.block.ln_mlp
        return read if norm is None else norm(read)


class NeuronUnits(UnitsOfModel):
    """Neurons: entries of `mlp.post_act`."""

    def __init__(self, units: Units, model: Transformer) -> None:
        super().__init__(units, model)
        self.directions = self.block.mlp.down.weight[:, list(units.indices)].T.detach()

    def values(self, read: Tensor) -> Tensor:
        mlp, normed = self.block.mlp, self.normalised(read)
        if not mlp.gated:
            return mlp.act(self._each(mlp.up, normed))
        return mlp.act(self._each(mlp.gate, normed)) * self._each(mlp.up, normed)

    def _each(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """Each unit's own row of a linear map, on its own copy. [batch, pos, unit]"""
        chosen = list(self.units.indices)
        found = torch.einsum("bpud,ud->bpu", x, linear.weight[chosen])
        return found if linear.bias is None else found + linear.bias[chosen]


class LatentUnits(UnitsOfModel):
    """Latents of an autoencoder; activations in the unit in which its decoder writes at that position."""

    def __init__(self, units: Units, model: Transformer, autoencoder: Autoencoder) -> None:
        super().__init__(units, model)
        self.autoencoder = autoencoder
        config = autoencoder.config
        if config.d_out != model.config.d_model or max(units.indices) >= config.d_latent:
            raise RequestError(
                f"autoencoder {units.autoencoder!r} is {config.d_in} -> {config.d_latent} -> {config.d_out}; the graph names "
                f"latent {max(units.indices)} and the stream is {model.config.d_model} wide"
            )
        self.reads = "" if config.site_in is None else config.site_in.path
        one_hot = torch.zeros(len(units.indices) + 1, config.d_latent, dtype=autoencoder.dtype)
        one_hot[range(len(units.indices)), list(units.indices)] = 1
        unscaled = DecodeState(one_hot.new_ones(()), one_hot.new_zeros(()))
        with torch.no_grad():
            decoded = autoencoder.decode(one_hot.to(autoencoder.W_dec.device), unscaled)
        self.directions = (decoded[:-1] - decoded[-1]).to(model.embed.weight.dtype)

    def values(self, read: Tensor) -> Tensor:
        found = [
            self.encoded(self.part_read(read[:, :, i]), [unit]) for i, unit in enumerate(self.units.indices)
        ]
        return torch.cat(found, -1)

    def part_read(self, stream: Tensor) -> Tensor:
        """What the encoder reads when the part reads a stream [batch, pos, d_model]."""
        if self.units.place == "block" or self.reads == "resid.torso.mlp_in":
            return stream
        read = self.normalised(stream)
        return read if self.reads == "resid.torso.post_ln_mlp" else self._mlp_output(read, stream)

    def _mlp_output(self, read: Tensor, stream: Tensor) -> Tensor:
        """What the MLP adds to the stream."""
        added = self.block.mlp(read, MLPHooks(), layer=self.units.layer)
        if self.block.ln_mlp_out is not None:
            added = self.block.ln_mlp_out(added)
        return added * self.block.config.residual_scale

    def encoded(self, x: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """Latents of what the encoder reads [batch, pos, d_in] -> [batch, pos, unit]."""
        chosen = self.units.indices if indices is None else indices
        latents = self.autoencoder.encode(x, list(chosen))
        if self.autoencoder.config.needs_state:
            latents = latents * normalise(x, self.autoencoder.config)[1].scale
        return latents.to(x.dtype)


def open_units(
    model: Transformer, shape: GraphShape, autoencoders: Mapping[str, Autoencoder] | None
) -> list[UnitsOfModel]:
    """The units of a graph in a model. Raises RequestError when an autoencoder is missing or does not fit."""
    opened: list[UnitsOfModel] = []
    known = autoencoders or {}
    for units in shape.units:
        if units.part == "neuron":
            opened.append(NeuronUnits(units, model))
            continue
        if units.autoencoder not in known:
            raise RequestError(
                f"the graph has latents of {units.autoencoder!r}; pass autoencoders={{{units.autoencoder!r}: …}}; "
                + (did_you_mean(units.autoencoder, known) if known else "none was given")
            )
        opened.append(LatentUnits(units, model, known[units.autoencoder]))
    return opened


Copies = Callable[[Units, Tensor], Tensor | None]


class UnitHooks:
    """The hooks that give units streams of their own. One pass at a time.

    Args:
        copies: given units and the stream [batch, pos, d_model] at their place, the own stream of each of their nodes
            [batch, pos, node, d_model]; None when all read that stream.

    Attributes:
        live: activations of the units in this pass [batch, pos, unit], by layer and place.
        remaining: of latents, what they are where the rest of their part reads: in the MLP, or the remainder.
    """

    def __init__(self, units: Sequence[UnitsOfModel], tree: TransformerHooks, copies: Copies) -> None:
        self.copies = copies
        self.live: dict[tuple[int, str], Tensor] = {}
        self.remaining: dict[tuple[int, str], Tensor] = {}
        self._own: dict[int, Tensor | None] = {}
        self._read: dict[int, Tensor] = {}
        for one in units:
            layer = one.units.layer
            if one.units.place == "block":
                assert isinstance(one, LatentUnits), "only latents write behind a block"
                self._append(tree, "resid.torso.post_mlp.fwd", layer, self._behind_block(one))
                continue
            self._append(tree, "resid.torso.mlp_in.fwd", layer, self._at_mlp_in(one))
            if isinstance(one, NeuronUnits):
                self._append(tree, "mlp.post_act.fwd", layer, self._at_neurons(one))
            elif isinstance(one, LatentUnits):
                self._append(tree, "resid.torso.mlp_in.fwd2", layer, self._keep_read)
                self._append(tree, "resid.torso.delta_mlp.fwd", layer, self._at_mlp_output(one))

    @staticmethod
    def _append(tree: TransformerHooks, path: str, layer: int, hook: Callable[..., Any]) -> None:
        tree.append_to_path(path, AtLayers(layer).append(hook))

    def _keep_read(self, x: Tensor, layer: int) -> None:
        self._read[layer] = x

    def _at_mlp_in(self, one: UnitsOfModel) -> Callable[..., Any]:
        def split(x: Tensor) -> Tensor | None:
            own = self._own[one.units.layer] = self.copies(one.units, x)
            # the rest of the MLP reads a stream of its own too
            return None if own is None else x.clone()

        return split

    def _at_neurons(self, one: NeuronUnits) -> Callable[..., Any]:
        layer, index = one.units.layer, torch.tensor(one.units.indices)

        def replace(x: Tensor) -> Tensor | None:
            own = self._own.pop(layer)
            at = index.to(x.device)
            if own is None:
                self.live[layer, "mlp"] = x.index_select(-1, at)
                return None
            self.live[layer, "mlp"] = one.values(own)
            return x.index_copy(-1, at, self.live[layer, "mlp"])

        return replace

    def _at_mlp_output(self, one: LatentUnits) -> Callable[..., Any]:
        layer = one.units.layer

        def replace(x: Tensor) -> Tensor | None:
            read = self._read.pop(layer)
            of_output = one.reads == "resid.torso.delta_mlp"
            return self._moved(one, x, x if of_output else one.part_read(read), self._own.pop(layer))

        return replace

    def _behind_block(self, one: LatentUnits) -> Callable[..., Any]:
        def replace(x: Tensor) -> Tensor | None:
            own = self.copies(one.units, x)
            return self._moved(one, x, x if own is None else own[:, :, -1], own)

        return replace

    def _moved(self, one: LatentUnits, x: Tensor, read: Tensor, own: Tensor | None) -> Tensor | None:
        """x with each latent as its own stream has it, instead of as what the rest reads has it."""
        place = one.units.layer, one.units.place
        self.remaining[place] = one.encoded(read)
        if own is None:
            self.live[place] = self.remaining[place]
            return None
        self.live[place] = one.values(own)
        return x + (self.live[place] - self.remaining[place]) @ one.directions.to(x.device)


def through_norm(norm: Norm, x: Tensor, divisor: Tensor) -> Tensor:
    """What a part of a norm's input is in its output, with the divisor held: parts add up to the norm less its bias.

    x: [..., d_model]; divisor: sqrt(variance + eps) of the whole input, broadcasts to x.
    """
    centred = x - x.mean(-1, keepdim=True) if norm.center else x
    weight = None if norm.weight is None else norm.weight + 1 if norm.offset else norm.weight
    return centred / divisor if weight is None else centred / divisor * weight
