"""Gradients by site name: of a metric, of other activations, and rows of Jacobians, in one forward pass each.

Sites are named in any order. Weights need no gradients of their own, and get none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.interventions.declared import site_named
from neuron_lens.interventions.metrics import BoundMetric, Columns, Metric, bind_metrics
from neuron_lens.interventions.tensors import Activations, Place, shown_place

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["differentiable", "grad_at", "jacobian_rows", "jvp_at", "traced_run", "vjp_at"]

Sites = str | Iterable[str]


def grad_at(
    model: Transformer,
    tokens: Tensor,
    metric: Metric | Callable[..., Any],
    sites: Sites,
    *,
    layers: Iterable[int] | int | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Activations:
    """The gradient of a metric, summed over rows, at each site: each row's own gradient of its own metric.

    Args:
        tokens: [batch, pos]. metric: a `Metric`, or a function of logits.
        sites: paths or globs. layers: only these; None for all. hooks: interventions of the run; the gradient is with
            respect to what leaves each site after them.
        logits_at: columns that a plain function is given.

    Returns:
        Activations: of the shape of the activations; zeros where the metric does not depend on them.

    Raises:
        RequestError: a metric that gives no number a row, or has no gradient. HookError: a site that does not exist.
    """
    (bound,) = bind_metrics(metric, tokens, pad, logits_at).values()
    kept, logits = traced_run(
        model, tokens, sites, layers=layers, pad=pad, hooks=hooks, logits_at=bound.columns
    )
    values = differentiable(bound, logits)
    return _pulled_back([values], [torch.ones_like(values)], kept)


def vjp_at(
    model: Transformer,
    tokens: Tensor,
    cotangents: Mapping[Any, Tensor],
    sites: Sites,
    *,
    layers: Iterable[int] | int | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
) -> Activations:
    """Vector-Jacobian products: cotangents at some places pulled back to each site.

    Args:
        cotangents: by (site, layer), or "logits"; each of the shape of the activation there.
        sites, layers: where the result is wanted.

    Raises:
        RequestError: a cotangent of a wrong shape.
    """
    given = Activations(cotangents)
    tree = hooks.copy() if hooks is not None else TransformerHooks()
    outputs = {place: _keeper(tree, place) for place in given}
    kept, _ = traced_run(model, tokens, sites, layers=layers, pad=pad, hooks=tree)
    ends: list[Tensor] = []
    vectors: list[Tensor | None] = []
    for place, keeper in outputs.items():
        value = keeper.value(place)
        if value.shape != given[place].shape:
            raise RequestError(
                f"the cotangent of {shown_place(place)} is {list(given[place].shape)}, the activation {list(value.shape)}"
            )
        if value.requires_grad:
            ends.append(value)
            vectors.append(given[place].to(value.dtype))
    return _pulled_back(ends, vectors, kept)


def jvp_at(
    model: Transformer,
    tokens: Tensor,
    tangents: Mapping[Any, Tensor],
    sites: Sites,
    *,
    layers: Iterable[int] | int | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
) -> Activations:
    """Jacobian-vector products: how each site moves when activations at some places move along tangents.

    Args:
        tangents: by (site, layer); each broadcasts to the activation there.
        sites, layers: where the result is wanted ("logits" too).

    Raises:
        HookError: a site that does not exist, or a tangent that does not fit.
    """
    moved = Activations(tangents)
    weight = model.embed.weight
    amount = torch.zeros((), dtype=weight.dtype, device=weight.device, requires_grad=True)
    tree = TransformerHooks()
    for place in moved:
        _append(tree, place, "fwd", _Move(moved[place], amount))
    tree = tree if hooks is None else hooks | tree
    # the fused kernel has no second derivative: a hook at the pattern takes the explicit path
    tree.append_to_path("attn.qk_probs.fwd", _nothing)
    recordings = _recorded(tree, sites, layers)
    with torch.enable_grad():
        model(tokens, hooks=tree, pad=pad)
    kept = {_place(key): recording[key] for recording in recordings for key in recording}
    moving = {place: value for place, value in kept.items() if value.requires_grad}
    # the gradient by `amount` is linear in the cotangents: its gradient by them is the derivative itself
    cotangents = [torch.zeros_like(value).requires_grad_() for value in moving.values()]
    directions: Sequence[Tensor | None] = []
    if moving:
        (pulled,) = torch.autograd.grad(list(moving.values()), amount, cotangents, create_graph=True)
        directions = torch.autograd.grad(pulled, cotangents, allow_unused=True)
    found = dict(zip(moving, directions, strict=True))
    return Activations(
        {
            place: torch.zeros_like(value) if found.get(place) is None else found[place]
            for place, value in kept.items()
        }
    )


def jacobian_rows(
    model: Transformer,
    tokens: Tensor,
    of: Place,
    rows: Sequence[Sequence[int]],
    sites: Sites,
    *,
    layers: Iterable[int] | int | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    at_once: int | None = None,
) -> dict[Place, Tensor]:
    """Rows of the Jacobian of one activation with respect to others, all from one forward pass.

    Args:
        of: (site, layer) of the activation, or ("logits", None).
        rows: entries of it behind the batch axis, such as (pos, unit) or (pos, head, unit). Each batch row gives the
            Jacobian of its own entry.
        sites, layers: with respect to what.
        at_once: how many rows one backward pass takes together, which bounds its memory; None: all.

    Returns:
        dict: by (site, layer), [rows, *axes of the site].

    Raises:
        RequestError: an entry outside the activation, or at_once below 1.
    """
    if at_once is not None and at_once < 1:
        raise RequestError(f"a backward pass takes at least one row, got at_once={at_once}")
    tree = hooks.copy() if hooks is not None else TransformerHooks()
    keeper = _keeper(tree, of)
    # backward of the fused kernel cannot be batched; the explicit path can
    tree.append_to_path("attn.qk_probs.fwd", _nothing)
    kept, _ = traced_run(model, tokens, sites, layers=layers, pad=pad, hooks=tree)
    value = keeper.value(of)
    vectors = value.new_zeros(len(rows), *value.shape)
    for index, entry in enumerate(rows):
        sizes = value.shape[1:]
        if len(entry) != len(sizes) or any(not -n <= i < n for i, n in zip(entry, sizes, strict=True)):
            raise RequestError(
                f"row {tuple(entry)} is no entry of {shown_place(of)}, which is [batch, {', '.join(map(str, sizes))}]"
            )
        vectors[index].movedim(0, -1)[tuple(map(int, entry))] = 1
    places = list(kept)
    zeros = {place: kept[place].new_zeros(len(rows), *kept[place].shape) for place in places}
    if not value.requires_grad or not rows:
        return zeros
    found: dict[Place, list[Tensor]] = {place: [] for place in places}
    parts = vectors.split(at_once or len(rows))
    for index, part in enumerate(parts):
        gradients = torch.autograd.grad(
            value,
            [kept[place] for place in places],
            part,
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=index + 1 < len(parts),
        )
        for place, gradient in zip(places, gradients, strict=True):
            found[place] += [] if gradient is None else [gradient]
    return {place: torch.cat(found[place]) if found[place] else zeros[place] for place in places}


def traced_run(
    model: Transformer,
    tokens: Tensor,
    sites: Sites,
    *,
    layers: Iterable[int] | int | None = None,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Tensor | None = None,
) -> tuple[dict[Place, Tensor], Tensor]:
    """A forward pass whose activations carry gradients: those at the sites, and the logits."""
    tree = TransformerHooks() if hooks is None else hooks.copy()
    recordings = _recorded(tree, sites, layers, rooted=True)
    with torch.enable_grad():
        logits = model(tokens, hooks=tree, pad=pad, logits_at=logits_at)
    return {_place(key): recording[key] for recording in recordings for key in recording}, logits


def differentiable(metric: BoundMetric, logits: Tensor) -> Tensor:
    """The metric of logits with its graph, whatever the mode of the caller.

    Raises RequestError when the metric has no gradient by the logits, as a rank has none.
    """
    with torch.enable_grad():
        values = metric(logits)
    if logits.requires_grad and not values.requires_grad:
        raise RequestError(
            f"the metric {metric.name!r} has no gradient by the logits (a rank or a count has none, and what detaches them): "
            "use a difference of logits, a probability or a loss"
        )
    return values


def _recorded(
    tree: TransformerHooks, sites: Sites, layers: Iterable[int] | int | None, *, rooted: bool = False
) -> list[Any]:
    """Recordings of some sites with their graphs. rooted: activations that carry no gradient become leaves."""
    inside: list[str] = []
    outside: list[str] = []
    for path in [sites] if isinstance(sites, str) else sites:
        (outside if "*" not in path and not site_named(path).per_layer else inside).append(path)
    chosen = None if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if rooted:
        for path in inside:
            tree.append_to_path(f"{path}.fwd2", _leaf if chosen is None else AtLayers(chosen).append(_leaf))
        for path in outside:
            tree.append_to_path(f"{path}.fwd2", _leaf)
    some = [tree.record(inside, layers=chosen, detach=False)] if inside else []
    return some + ([tree.record(outside, detach=False)] if outside else [])


def _pulled_back(
    ends: list[Tensor], vectors: list[Tensor | None], kept: Mapping[Place, Tensor]
) -> Activations:
    """Gradients of `ends` at the kept activations; zeros where they do not depend on them."""
    places = list(kept)
    found: Sequence[Tensor | None] = [None] * len(places)
    if any(end.requires_grad for end in ends):
        found = torch.autograd.grad(ends, [kept[place] for place in places], vectors, allow_unused=True)
    return Activations(
        {
            place: torch.zeros_like(kept[place]) if gradient is None else gradient
            for place, gradient in zip(places, found, strict=True)
        }
    )


def _leaf(x: Tensor) -> Tensor | None:
    """What carries no gradient yet becomes a leaf of the graph."""
    return None if x.requires_grad else x.detach().clone().requires_grad_()


def _nothing(x: Tensor) -> None:
    """A hook that leaves everything as it is."""


def _place(key: Any) -> Place:
    return key if isinstance(key, tuple) else (key, None)


def _append(tree: TransformerHooks, place: Place, chain: str, hook: Any) -> None:
    site, layer = place
    site_named(site)
    tree.append_to_path(f"{site}.{chain}", hook if layer is None else AtLayers(layer).append(hook))


class _Keeper:
    """Keeps the tensor that passes, with its graph."""

    def __init__(self) -> None:
        self.kept: Tensor | None = None

    def __call__(self, x: Tensor) -> None:
        self.kept = x

    def value(self, place: Place) -> Tensor:
        """What passed. Raises RequestError when nothing did."""
        if self.kept is None:
            raise RequestError(f"nothing passed {shown_place(place)} in this run")
        return self.kept


def _keeper(tree: TransformerHooks, place: Place) -> _Keeper:
    keeper = _Keeper()
    _append(tree, place, "fwd2", keeper)
    return keeper


class _Move:
    """x + amount · tangent."""

    def __init__(self, tangent: Tensor, amount: Tensor) -> None:
        self.tangent, self.amount = tangent, amount

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.amount * self.tangent
