"""Attribution patching of nodes: a first-order estimate of what patching each activation would do, from one pass.

Edges are in `circuits`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.apply import capture
from neuron_lens.interventions.gradients import grad_at
from neuron_lens.interventions.metrics import Columns, Metric
from neuron_lens.interventions.tensors import Activations

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["attribution_patch"]

AnyMetric = Metric | Callable[..., Any]


def attribution_patch(
    model: Transformer,
    tokens: Tensor,
    source: Activations,
    metric: AnyMetric,
    *,
    pad: Tensor | None = None,
    hooks: TransformerHooks | None = None,
    logits_at: Columns = None,
) -> Activations:
    """An estimate of the effect of patching each entry of each source activation into the run of `tokens`.

    (source − activation) · gradient, entry by entry: sum over the axes of whatever is patched together (a head, a
    position, a neuron) for its estimate. One forward and one backward pass (Nanda 2023, attribution patching).

    Args:
        source: activations of the other run at the sites wanted, for instance `capture(model, others, sites)`.

    Returns:
        Activations: estimates, each row's change of its own metric, of the shape of the activations.
    """
    sites = sorted({site for site, _ in source})
    layers = sorted({layer for _, layer in source if layer is not None}) or None
    gradients = grad_at(
        model, tokens, metric, sites, layers=layers, pad=pad, hooks=hooks, logits_at=logits_at
    )
    here = capture(model, tokens, sites, layers=layers, hooks=hooks, pad=pad)
    return Activations({place: (source[place] - here[place]) * gradients[place] for place in source})
