"""What every declared intervention has in common: the place it names, its sites, and its check against a model.

A declared intervention is a frozen pydantic model: it holds no code, compares and hashes by content, and says with
`changed(x, at)` what its site's tensor becomes. Where only a part is meant, `to_hooks` keeps the rest.
"""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from neuron_lens.errors import HookError, RequestError, did_you_mean
from neuron_lens.hooks import FwdBwdHooks, TransformerHooks
from neuron_lens.interventions.places import At, Frozen, PerRow, Positions, read_positions
from neuron_lens.interventions.tensors import Activations, TensorData, shown_place
from neuron_lens.shapes import Axis
from neuron_lens.transformer import TransformerConfig

__all__ = ["Intervention", "Sourced", "axis_size", "site_named"]

_TREE = {site.path: site for site in TransformerHooks().sites()}
UNIT_AXES: tuple[Axis, ...] = ("d_mlp", "d_latent", "d_head", "d_vocab", "d_model", "expert")
HEAD_AXES: tuple[Axis, ...] = ("head", "kv_head")


def site_named(path: str) -> FwdBwdHooks:
    """The site of a path, for its axes. Raises RequestError with the nearest paths when there is none."""
    if path not in _TREE:
        raise RequestError(f"no site is called {path!r}; {did_you_mean(path, _TREE)}")
    return _TREE[path]


def axis_size(config: TransformerConfig, axis: Axis) -> int | None:
    """How long an axis is in a model; None for those that depend on the input."""
    sizes = {
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "d_head": config.d_head,
        "d_model": config.d_model,
        "d_mlp": config.d_mlp,
        "d_vocab": config.d_vocab_out,
        "expert": config.experts.n_experts if config.experts else 0,
        "one": 1,
    }
    return sizes.get(axis)


class Intervention(Frozen):
    """Something done to one site's tensor, in one place.

    Attributes:
        site: path of the site, as in `TransformerHooks().paths()` without `.fwd`.
        layers: layers counted from 0; None for all (and for sites outside the blocks).
        positions: which positions (at patterns: which queries); None for all. An int, a list, a slice or `Span`, a text or
            `TokenText`, or `PerRow` (also a long tensor [batch] or [batch, k]). Negative ones count from the end of the prompt.
        heads: which heads (kv heads where the site has only those); None for all.
        keys: which keys, at attention patterns; absolute positions, or counted from the end. None for all.
        units: which entries of the last axis: neurons, latents, directions; None for all.
        rows: which rows of the batch; None for all.
        steps: which generation steps (0 is the prompt); None for all.
    """

    kind: str
    site: str
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None
    heads: tuple[int, ...] | None = None
    keys: tuple[int, ...] | None = None
    units: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None

    @field_validator("layers", "heads", "keys", "units", "rows", "steps", mode="before")
    @classmethod
    def _as_tuple(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return (given,)
        return tuple(given) if isinstance(given, list | range | set | frozenset) else given

    @field_validator("layers", "heads", "units", "rows", "steps")
    @classmethod
    def _not_empty(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given is not None and (not given or min(given) < 0):
            raise ValueError("whole numbers from 0 upwards, at least one; leave it out for all")
        return given

    @field_validator("keys")
    @classmethod
    def _some_keys(cls, given: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if given == ():
            raise ValueError("no key is named; leave keys out for all")
        return given

    @field_validator("positions", mode="before")
    @classmethod
    def _read_positions(cls, given: Any) -> Any:
        return read_positions(given)

    @field_validator("positions")
    @classmethod
    def _some_positions(cls, given: Positions | None) -> Positions | None:
        if given == () or (isinstance(given, PerRow) and not all(given.positions)):
            raise ValueError("no position is named; leave positions out for all")
        return given

    @model_validator(mode="after")
    def _fits_its_sites(self) -> Self:
        for path in self.sites():
            site = site_named(path)
            axes = site.axes or ()
            if "token" in axes:
                raise ValueError(
                    f"{path} runs once for each expert, on the tokens that use it: it has no rows and positions to name; "
                    "append a hook to its path (its context says which expert and tokens)"
                )
            if self.layers is not None and not site.per_layer:
                raise ValueError(f"{path} belongs to no layer; leave layers out")
            if self.heads is not None and not set(axes) & set(HEAD_AXES):
                raise ValueError(f"{path} has no heads: its axes are [{', '.join(axes)}]")
            if self.keys is not None and "key_pos" not in axes:
                raise ValueError(f"{path} has no keys: its axes are [{', '.join(axes)}]")
            if self.units is not None and axes[-1] not in UNIT_AXES:
                raise ValueError(f"{path} has no units: its last axis is {axes[-1]}")
        return self

    def sites(self) -> tuple[str, ...]:
        """Paths of the sites this acts at."""
        return (self.site,)

    def changed(self, x: Tensor, at: At) -> Tensor:
        """What the whole tensor becomes; broadcasts to x [..., *axes of the site]. x itself is left as it is."""
        raise NotImplementedError

    def looks_back_to(self, length: int) -> int | None:
        """The earliest other position whose activation `changed` reads in the same run; None when it reads none."""
        return None

    def selects_keys(self) -> bool:
        """Whether only the named keys change; otherwise `changed` sees to the keys itself."""
        return self.keys is not None

    def depends_on_place(self) -> bool:
        """Whether `changed` reads the place fields, so that two places cannot share one call."""
        return False

    def layers_in(self, config: TransformerConfig, path: str) -> tuple[int | None, ...]:
        """The layers this acts at in a model; (None,) at sites outside the blocks."""
        if not site_named(path).per_layer:
            return (None,)
        return tuple(range(config.n_layers)) if self.layers is None else self.layers

    def check(self, config: TransformerConfig) -> None:
        """Raises RequestError when this does not fit a model: sites, layers, heads, units, sizes of tensors."""
        absent = config.absent_sites()
        for path in self.sites():
            if path in absent:
                raise RequestError(f"{self.label()}: {path} never fires in this model: {absent[path]}")
            axes = site_named(path).axes or ()
            self._in_range("layer", self.layers, config.n_layers)
            for axis in axes:
                if axis in HEAD_AXES:
                    self._in_range("head", self.heads, axis_size(config, axis))
            if axes[-1] in UNIT_AXES:
                self._in_range("unit", self.units, axis_size(config, axes[-1]))
            if isinstance(self.positions, tuple):
                self._in_range("position", tuple(p for p in self.positions if p >= 0), config.n_ctx)
            self._check_values(config, path)

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        """Subclasses with tensors say here whether those fit the site."""

    def _in_range(self, what: str, given: tuple[int, ...] | None, size: int | None) -> None:
        wrong = [i for i in given or () if size is not None and i >= size]
        if wrong:
            raise RequestError(
                f"{self.label()}: {what} {wrong[0]} does not exist: the model has {size}, counted from 0"
            )

    def _check_broadcast(self, config: TransformerConfig, path: str, value: Tensor, name: str) -> None:
        """Whether a value broadcasts to the site's axes behind batch and pos."""
        axes = site_named(path).axes or ()
        sizes = [axis_size(config, axis) for axis in axes]
        if value.dim() > len(axes):
            raise RequestError(
                f"{self.label()}: {name} has {value.dim()} axes, {path} has [{', '.join(axes)}]"
            )
        for given, size, axis in zip(reversed(value.shape), reversed(sizes), reversed(axes), strict=False):
            if size is not None and given not in (1, size):
                raise RequestError(
                    f"{self.label()}: {name} {list(value.shape)} does not fit {path} [{', '.join(axes)}]: "
                    f"{axis} is {size}, not {given}"
                )

    def label(self) -> str:
        """A short name for tables and messages: `patch attn.v_out layers 3 heads 5`."""
        parts = [self.kind, self.site]
        for name in ("layers", "positions", "heads", "keys", "units", "rows", "steps"):
            value = getattr(self, name)
            if value is not None:
                parts.append(f"{name} {','.join(map(str, value)) if isinstance(value, tuple) else value}")
        return " ".join(parts)

    def content_hash(self) -> str:
        """SHA-256 of everything this says, tensors included: the same on every machine."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Sourced(Intervention):
    """Base of interventions that take values from recorded activations.

    source: activations [batch or 1, pos, …] by (site, layer), for each site and layer this acts at.
    """

    source: Activations

    def source_place(self, path: str, layer: int | None) -> tuple[str, int | None]:
        """Where in the source the value for a site and layer is."""
        return path, layer

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        axes = site_named(path).axes or ()
        for layer in self.layers_in(config, path):
            place = self.source_place(path, layer)
            value = self.source[place]
            if value.dim() != len(axes):
                raise RequestError(
                    f"{self.label()}: the source's {shown_place(place)} has {value.dim()} axes, {path} has [{', '.join(axes)}]"
                )
            self._check_broadcast(config, path, value, f"the source's {shown_place(place)}")

    def aligned(self, x: Tensor, at: At, place: tuple[str, int | None]) -> Tensor:
        """The source's tensor at the columns of x, [batch or 1, *axes]; zeros where it has no such column."""
        source = self.source[place]
        source = source.to(device=x.device, dtype=x.dtype)
        for axis, start in (("pos", at.start), ("key_pos", 0)):
            if at.site.axes is not None and axis in at.site.axes:
                source = _columns(source, at.dim(axis), start, x.shape[at.dim(axis)])
        batch = x.shape[at.dim("batch")]
        if source.shape[0] not in (1, batch):
            raise RequestError(
                f"{self.label()}: the source has {source.shape[0]} rows and the run {batch}; give as many, or one for all"
            )
        return source


def _columns(source: Tensor, dim: int, start: int, length: int) -> Tensor:
    if source.shape[dim] == 1:
        return source  # one value for all positions
    have = max(0, min(length, source.shape[dim] - start))
    taken = source.narrow(dim, min(start, source.shape[dim]), have)
    if have == length:
        return taken
    missing = list(taken.shape)
    missing[dim] = length - have
    return torch.cat((taken, taken.new_zeros(missing)), dim)


def as_tensor(data: TensorData, like: Tensor) -> Tensor:
    """A field's tensor on the device and in the dtype of an activation."""
    return data.tensor.to(device=like.device, dtype=like.dtype)


def refuse_mask_beyond(selected: Tensor, start: int, known: int, label: str) -> None:
    """Raises HookError when selected columns [batch, pos] lie behind the source's `known` positions."""
    if start + selected.shape[1] > known > 1 and bool(selected[:, max(0, known - start) :].any()):
        raise HookError(
            f"{label}: positions from {known} on were selected, but the source has only {known} positions"
        )
