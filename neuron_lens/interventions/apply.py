"""From declared interventions to a tree of hooks, and runs with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, Run, Site, TransformerHooks
from neuron_lens.interventions.declared import (
    HEAD_AXES,
    Intervention,
    Sourced,
    refuse_mask_beyond,
    site_named,
)
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.places import At, keys_meant, located, position_mask
from neuron_lens.interventions.tensors import Activations, shown_place

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Edit", "Keeper", "capture", "mean_activations", "part_mask", "to_hooks"]


def to_hooks(
    interventions: Intervention | Iterable[Intervention],
    model: Transformer,
    *,
    tokens: Tensor | None = None,
    pad: Tensor | None = None,
    autoencoders: Mapping[str, Any] | None = None,
) -> TransformerHooks:
    """A tree of hooks that does what the interventions say, in their order where several act at one site.

    Args:
        model: the model they are for; they are checked against its sites and sizes here.
        tokens: [batch, pos]; needed when positions are given as text. pad: true where a column is padding.
        autoencoders: what `EditLatents` names.

    Raises:
        RequestError: an intervention does not fit the model, or its text is not in the tokens.
    """
    hooks = TransformerHooks()
    for intervention in [interventions] if isinstance(interventions, Intervention) else interventions:
        intervention.check(model.config)
        intervention = with_located_text(intervention, tokens, pad, model)
        for path in intervention.sites():
            if intervention.site != path and path in model.config.absent_sites():
                continue
            site = Site(path, site_named(path).axes)
            keeper = None
            if isinstance(intervention, Patch) and intervention.reads_elsewhere():
                keeper = _keep_source(intervention, path, model, hooks)
            edit: Any = Edit(intervention, site, autoencoders, keeper)
            if intervention.layers is not None and site_named(path).per_layer:
                edit = AtLayers(intervention.layers).append(edit)
            hooks.append_to_path(f"{path}.fwd", edit)
    return hooks


def _keep_source(patch: Patch, path: str, model: Transformer, hooks: TransformerHooks) -> Keeper:
    """A hook where a patch takes from the same run: it keeps what leaves that site for the patch."""
    keeper = Keeper(patch)
    places = {patch.source_place(path, layer) for layer in patch.layers_in(model.config, path)}
    source = next(iter(places))[0]
    layers = [layer for _, layer in places if layer is not None]
    hook: Any = AtLayers(layers).append(keeper) if layers else keeper
    hooks.append_to_path(f"{source}.fwd2", hook)
    return keeper


class Keeper:
    """Keeps what passes, for a later hook of the same pass. Compared by the patch it is for."""

    def __init__(self, patch: Patch) -> None:
        self.patch = patch

    @property
    def name(self) -> str:
        """What it is for."""
        return f"keep for {self.patch.label()}"

    def __call__(self, x: Tensor, run: Run, layer: int | None = None) -> None:
        run.carried[id(self), layer] = x.clone()  # a later hook may edit the very tensor in place

    def kept(self, run: Run, target: str, layer: int | None) -> Tensor:
        """What was kept for the patch at a layer of its site. Raises RequestError when the pass began behind it."""
        place = self.patch.source_place(target, layer)
        if (id(self), place[1]) not in run.carried:
            raise RequestError(
                f"{self.patch.label()}: this pass began behind {shown_place(place)}, where the patch takes from"
            )
        tensor: Tensor = run.carried[id(self), place[1]]
        return tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keeper) and self.patch == other.patch

    __hash__ = None  # type: ignore[assignment]


def with_located_text(
    intervention: Intervention, tokens: Tensor | None, pad: Tensor | None, model: Transformer
) -> Intervention:
    """The same intervention with positions given as text replaced by numbers."""
    if intervention.positions is None or tokens is None:
        if tokens is None:
            _refuse_text(intervention)
        return intervention
    positions = located(intervention.positions, tokens, pad, model.tokenizer)
    return (
        intervention
        if positions is intervention.positions
        else intervention.model_copy(update={"positions": positions})
    )


def _refuse_text(intervention: Intervention) -> None:
    if hasattr(intervention.positions, "text"):
        raise RequestError(
            f"{intervention.label()}: positions given as text are found in tokens; pass to_hooks(…, tokens=tokens)"
        )


class Edit:
    """The hook of one declared intervention at one site. Compared by what it says."""

    def __init__(
        self,
        intervention: Intervention,
        site: Site,
        autoencoders: Mapping[str, Any] | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self.intervention, self.site, self.autoencoders = intervention, site, autoencoders
        self.keeper = keeper

    @property
    def name(self) -> str:
        """The intervention, in short."""
        return self.intervention.label()

    def __call__(self, x: Tensor, run: Run, layer: int | None = None) -> Tensor:
        mask = part_mask(self.intervention, self.site, run, x)
        if isinstance(self.intervention, Sourced) and run.step and mask is not None and not bool(mask.any()):
            return x  # nothing of this generation step is meant, so there is nothing to align
        at = self._at(run, layer, x, mask)
        changed = self.intervention.changed(x, at)
        if mask is None:
            return changed.expand_as(x).to(x.dtype).clone()
        return torch.where(mask, changed, x)

    def _at(self, run: Run, layer: int | None, x: Tensor, meant: Tensor | None) -> At:
        if self._has_no_alignment(run, layer):
            raise RequestError(
                f"{self.name}: a recorded run cannot be aligned with what padded rows read behind a key-value cache; "
                f"name positions of the prompt, or generate row by row"
            )
        uniform = run.uniform
        return At(
            self.site,
            layer,
            start=run.starts if uniform and isinstance(run.starts, int) else 0,
            ends=run.ends(x.device),
            positions=None if uniform else run.positions(x.device),
            keys=None if uniform else run.key_positions(x.device),
            meant=meant,
            kept=None if self.keeper is None else self.keeper.kept(run, self.site.path, layer),
            autoencoders=self.autoencoders,
        )

    def _has_no_alignment(self, run: Run, layer: int | None) -> bool:
        """Whether columns of a source cannot be found for those of this pass: its rows began at different positions."""
        if not isinstance(self.intervention, Sourced) or self.intervention.source is None or run.uniform:
            return False
        if isinstance(run.starts, int) and run.starts == 0:
            return False
        source = self.intervention.source[self.intervention.source_place(self.site.path, layer)]
        return source.shape[self.site.dim("pos")] > 1  # one value for all positions needs no alignment

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and (self.intervention, self.site) == (other.intervention, other.site)

    __hash__ = None  # type: ignore[assignment]


def part_mask(intervention: Intervention, site: Site, run: Run, x: Tensor) -> Tensor | None:
    """Which part of x [*axes] is meant: a bool tensor that broadcasts to it; None when it is all of it."""
    axes = site.axes or ()
    mask: Tensor | None = None
    has_columns = intervention.positions is not None or intervention.steps is not None
    if has_columns or intervention.rows is not None:
        selected = position_mask(intervention.positions, intervention.steps, run, x.device)
        if (
            isinstance(intervention, Patch)
            and intervention.source is not None
            and intervention.source_positions is None
        ):
            place = intervention.source_place(
                site.path, 0 if intervention.layers is None else intervention.layers[0]
            )
            if place in intervention.source and isinstance(run.starts, int):
                known = intervention.source[place].shape[site.dim("pos")]
                refuse_mask_beyond(selected, run.starts, known, intervention.label())
        if intervention.rows is not None:
            selected = selected & _chosen(intervention.rows, run.batch, x.device, "row")[:, None]
        shape = [
            run.batch if axis == "batch" else x.shape[i] if axis == "pos" else 1
            for i, axis in enumerate(axes)
        ]
        mask = selected.view(shape)
    for names, indices in ((HEAD_AXES, intervention.heads), (axes[-1:], intervention.units)):
        if indices is not None:
            dim = next(i for i, axis in enumerate(axes) if axis in names)
            chosen = _chosen(indices, x.shape[dim], x.device, str(axes[dim]))
            chosen = chosen.view([-1 if i == dim else 1 for i in range(len(axes))])
            mask = chosen if mask is None else mask & chosen
    if intervention.keys is not None and intervention.selects_keys():
        chosen = _key_mask(intervention, run, x)
        mask = chosen if mask is None else mask & chosen
    return mask


def _key_mask(intervention: Intervention, run: Run, x: Tensor) -> Tensor:
    """Which keys of a pattern [batch, head, pos, key_pos] are meant; broadcasts to it.

    Raises RequestError outside generation when no row that is meant has one of the keys.
    """
    assert intervention.keys is not None, "asked only when keys are named"
    chosen = keys_meant(intervention.keys, run.key_positions(x.device), run.ends(x.device))
    rows = slice(None) if intervention.rows is None else list(intervention.rows)
    missing = ~chosen[rows].any(-1).any(0)  # [keys named]
    if run.step is None and bool(missing.any()):
        key = intervention.keys[int(missing.nonzero()[0])]
        raise RequestError(
            f"{intervention.label()}: no row has key {key}: there are only {x.shape[-1]} keys, counted from 0"
        )
    return chosen.any(1)[:, None, None, :]


def _chosen(indices: tuple[int, ...], size: int, device: torch.device, what: str) -> Tensor:
    wrong = [i for i in indices if i >= size]
    if wrong:
        raise RequestError(f"{what} {wrong[0]} does not exist: there are {size}, counted from 0")
    chosen = torch.zeros(size, dtype=torch.bool, device=device)
    chosen[list(indices)] = True
    return chosen


def capture(
    model: Transformer,
    tokens: Tensor,
    sites: str | Iterable[str],
    *,
    layers: Iterable[int] | int | None = None,
    hooks: TransformerHooks | None = None,
    pad: Tensor | None = None,
) -> Activations:
    """Run the model once, without gradients, and keep what passes some sites: a source for patches.

    Args:
        tokens: [batch, pos]. sites: paths or globs of sites. layers: only these; None for all.
        hooks: interventions of that run; what is kept is what leaves each site after them.

    Raises:
        HookError: a path names no site. RequestError: it never fires in this model.
    """
    tree = hooks.copy() if hooks is not None else TransformerHooks()
    wanted = [sites] if isinstance(sites, str) else list(sites)
    absent = model.config.absent_sites()
    for path in wanted:
        if path in absent:
            raise RequestError(f"{path} never fires in this model: {absent[path]}")
    inside = [path for path in wanted if path not in _TREE_PER_RUN]
    recordings = [tree.record(inside, layers=layers)] if inside else []
    outside = [path for path in wanted if path in _TREE_PER_RUN]
    recordings += [tree.record(outside)] if outside else []
    with torch.no_grad():
        model(tokens, hooks=tree, pad=pad)
    # copies: a later hook of the same pass may edit the very tensor in place
    return Activations({key: recording[key].clone() for recording in recordings for key in recording})


_TREE_PER_RUN = {site.path for site in TransformerHooks().sites() if not site.per_layer}


def mean_activations(
    activations: Activations, *, over_positions: bool = True, pad: Tensor | None = None
) -> Activations:
    """Means over the batch of recorded activations [batch, pos, …], as `MeanAblate` takes them.

    Args:
        over_positions: one mean for all positions [1, 1, …]; else one for each [1, pos, …].
        pad: true where a column is padding [batch, pos]; those do not count.

    Raises:
        RequestError: an activation is an attention pattern and positions are to be averaged, or padding is given for one.
    """
    means = {}
    for place in activations:
        x = activations[place]
        axes = site_named(place[0]).axes or ()
        if "key_pos" in axes and (over_positions or pad is not None):
            raise RequestError(
                f"{place[0]} is a pattern: its mean is taken for each position, without padding"
            )
        dims = [axes.index("batch")] + ([axes.index("pos")] if over_positions else [])
        if pad is None:
            means[place] = x.mean(dims, keepdim=True)
        else:
            shape = [x.shape[i] if axis in ("batch", "pos") else 1 for i, axis in enumerate(axes)]
            weight = (~pad).to(x.dtype).view(shape)
            means[place] = (x * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True).clamp_min(1)
    return Activations(means)
