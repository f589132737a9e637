"""What every kind of unit has in common: where it is read, which units are kept, how one is replaced.

A source hangs hooks into a tree; after each forward it hands over what they caught, a range
of units at a time, so that a wide source is never dense all at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.records import Unit, UnitKind

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Caught", "Cut", "UnitSource", "dense_latents", "logits_written", "require_site"]

# Cuts windows out of a site's tensor: [batch, pos, ...] -> [window, length, ...].
Cut = Callable[[Tensor], Tensor]


class Caught:
    """What one source held in one batch, `[row, pos, unit]`, or cut into windows, `[window, length, unit]`."""

    is_cut = False

    def __init__(self, activations: Tensor, partners: Tensor | None = None) -> None:
        self._activations, self._partners = activations, partners

    def columns(self, first: int, last: int) -> Tensor:
        """The activations of a range of the kept units `[..., last - first]`."""
        return self._activations[..., first:last]

    def partners(self, first: int, last: int) -> Tensor | None:
        """Tokens back to the token that contributes most `[..., last - first]`, int16 (heads)."""
        return None if self._partners is None else self._partners[..., first:last]


class UnitSource(ABC):
    """Units of one kind, read at one site of one layer.

    Attributes:
        kind, site, layer, dictionary: those of its units.
        n_units: how many units there are; `indices` says which of them are kept, rising.
        is_sparse: whether activations are zero almost everywhere, and stored so.
        has_partners: whether every activation comes with the token it reads (heads).
        replaced_by: what stands for a unit that is taken out.
    """

    kind: UnitKind
    is_sparse = False
    has_partners = False
    replaced_by: Literal["zero", "mean"] = "mean"

    def __init__(
        self,
        model: Transformer,
        *,
        site: str,
        layer: int,
        n_units: int,
        indices: Sequence[int] | None = None,
        dictionary: str = "",
    ) -> None:
        if not 0 <= layer < model.config.n_layers:
            raise RequestError(
                f"layer {layer} does not exist: the model has layers 0 to {model.config.n_layers - 1}"
            )
        require_site(model, site)
        self.model, self.site, self.layer = model, site, layer
        self.n_units, self.dictionary = n_units, dictionary
        self._caught: dict[str, Tensor] = {}
        self.indices = tuple(range(n_units)) if indices is None else tuple(sorted(set(indices)))
        beyond = [index for index in self.indices if not 0 <= index < n_units]
        if beyond or not self.indices:
            raise RequestError(
                f"{self.kind}s {beyond[:5]} do not exist: there are 0 to {n_units - 1}"
                if beyond
                else f"no {self.kind} was asked for; name at least one"
            )

    @property
    def name(self) -> str:
        """A folder name, different for every source of a model: "layer2", "layer2_head"."""
        parts = [f"layer{self.layer}", *([] if self.kind == "neuron" else [self.kind])]
        return "_".join([*parts, *([self.dictionary] if self.dictionary else [])])

    @property
    def reads(self) -> tuple[str, ...]:
        """The sites that are caught."""
        return (self.site,)

    def key(self) -> dict[str, Any]:
        """What its activations depend on besides model and text, as JSON gives it back."""
        whole = len(self.indices) == self.n_units
        return {
            "kind": self.kind,
            "site": self.site,
            "layer": self.layer,
            "dictionary": self.dictionary,
            "units": self.n_units if whole else list(self.indices),
        }

    def unit(self, index: int) -> Unit:
        """The record of one of its units."""
        return Unit(kind=self.kind, layer=self.layer, index=index, site=self.site, dictionary=self.dictionary)

    def column(self, index: int) -> int:
        """Where a unit stands among the kept ones. Raises RequestError for one that is not kept."""
        place = bisect_left(self.indices, index)
        if place == len(self.indices) or self.indices[place] != index:
            raise RequestError(f"{self.kind} {index} of {self.name} was not harvested")
        return place

    def attach(self, hooks: TransformerHooks) -> None:
        """Hang the catching hooks into a tree; they hand on the sites' own tensors, nothing is copied."""
        for path in self.reads:
            hooks.append_to_path(f"{path}.fwd", AtLayers(self.layer).append(_Catcher(self._caught, path)))

    def _pop(self, path: str) -> Tensor:
        """What a site held in the last forward."""
        return self._caught.pop(path)

    def forget(self) -> None:
        """Let go of what the last forward left, untaken."""
        self._caught.clear()

    @abstractmethod
    def take(self, cut: Cut) -> Caught:
        """What the last forward left; nothing of it stays here. `cut` is for what is worth cutting before more is
        computed of it."""

    @abstractmethod
    def replacing(self, index: int, value: float | Tensor, where: Tensor) -> TransformerHooks:
        """Hooks that replace a unit's activation by `value` (one number, or one for each token `[batch, pos]`) where
        `where` `[batch, pos]` is True."""

    def written(self) -> Tensor | None:
        """The direction each kept unit writes into the stream `[unit, d_model]`, None where it has no single
        one."""
        return None

    def read(self) -> Tensor | None:
        """The direction of the stream that drives each kept unit `[unit, d_model]`, None where there is no single
        one; see `embeddings_read`."""
        return None


class _Catcher:
    """A hook that keeps what passes under a name."""

    def __init__(self, kept: dict[str, Tensor], name: str) -> None:
        self._kept, self._name = kept, name

    def __call__(self, x: Tensor) -> None:
        self._kept[self._name] = x


def require_site(model: Transformer, site: str) -> None:
    """Raises RequestError for a path that is no site inside the blocks, or never fires in this model."""
    sites = {each.path: each for each in TransformerHooks().sites()}
    if site not in sites:
        raise RequestError(f"no site is called {site!r}; {did_you_mean(site, sites)}")
    if not sites[site].per_layer:
        raise RequestError(f"{site} belongs to no layer; units are harvested at sites inside the blocks")
    if "pos" not in (sites[site].axes or ()):
        raise RequestError(
            f"{site} runs once for each expert, on the tokens that use it; units are harvested where every position is"
        )
    absent = model.config.absent_sites()
    if site in absent:
        raise RequestError(f"{site} never fires in this model: {absent[site]}")


def logits_written(model: Transformer, written: Tensor) -> Tensor:
    """What directions of the stream `[unit, d_model]` add to the logits `[unit, d_vocab]`, through the final
    norm's weight.

    The logit lens of the weights (nostalgebraist 2020; Geva et al. 2022): centred over the vocabulary,
    since a shift of all logits changes nothing.
    """
    written = written.detach().float()
    gain = getattr(model.ln_f, "weight", None)
    if model.config.norm == "layer":
        written = written - written.mean(-1, keepdim=True)  # the norm takes the mean out
    if gain is not None:
        written = written * (gain.detach().float() + (1.0 if model.config.norm_offset else 0.0))
    logits = written @ model.unembed.weight.detach().float().T
    return logits - logits.mean(-1, keepdim=True)


def dense_latents(values: Tensor, indices: Tensor, first: int, last: int) -> Tensor:
    """A range of latents `[..., last - first]` out of active ones (values and indices `[..., active]`)."""
    inside = (indices >= first) & (indices < last)
    slots = torch.where(inside, indices - first, last - first)
    dense = values.new_zeros(*values.shape[:-1], last - first + 1)
    return dense.scatter_(-1, slots, values)[..., :-1]
