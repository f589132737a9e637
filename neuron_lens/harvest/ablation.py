"""What a unit does: replace its activation at chosen tokens and see what becomes of the next-token
prediction.

The model is run on windows with the context they were harvested with, intact and with the unit's
activation replaced through the hook tree: once where the unit fires, once where it does not. Losses are
nats per token, compared at the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from neuron_lens.harvest.settings import model_inputs
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.hooks import TransformerHooks
from neuron_lens.windows import ABSENT, TextWindows

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["AblatedTokens", "ablate_where", "window_inputs"]


@dataclass(frozen=True, eq=False)
class AblatedTokens:
    """Figures per window `[window]` at the replaced tokens, and mean changes per next token `[d_vocab]`.

    `n` tokens that have a next token; mean `intact` and `ablated` loss there (0 where n is 0); mean
    `divergence` KL(intact || ablated); `log_probability_change` averaged over all replaced tokens.
    """

    n: NDArray[np.int64]
    intact: NDArray[np.float64]
    ablated: NDArray[np.float64]
    divergence: NDArray[np.float64]
    log_probability_change: NDArray[np.float64]


def window_inputs(
    windows: TextWindows, rows: Sequence[int]
) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """Ids of windows with their context as harvested, and where in them the window begins."""
    inputs, begins = [], []
    for row in rows:
        ids = windows.columns["token"][row, : windows.context + windows.length]
        own = ids[ids != ABSENT]
        inputs.append(own)
        begins.append(int(windows.context_position[row]))
    return inputs, np.array(begins, dtype=np.int64)


@torch.inference_mode()
def ablate_where(
    source: UnitSource,
    index: int,
    value: float,
    windows: TextWindows,
    rows: Sequence[int],
    masks: Sequence[NDArray[np.bool_]],
) -> list[AblatedTokens]:
    """Replace a unit of a source by `value` at the masked tokens of the windows, for every mask
    `[window, length]` in turn.

    The last token of a window that ends its document has no next token and is left out.
    """
    model, layer = source.model, source.layer
    inputs, begins = window_inputs(windows, rows)
    tokens, pad, first = model_inputs(model, inputs)
    columns = first + torch.from_numpy(begins)[:, None] + torch.arange(windows.length)
    here = torch.from_numpy(windows.columns["token"][list(rows), windows.context :].astype(np.int64))
    target = here[:, 1 : windows.length + 1]
    columns = columns.clamp(max=tokens.shape[1] - 1).to(tokens.device)
    stream = tokens if layer == 0 else model(tokens, pad=pad if pad.any() else None, stop_at_layer=layer)
    intact = _log_probabilities(model, stream, pad, layer, None, columns)
    results = []
    for mask in masks:
        chosen = torch.from_numpy(mask & (here[:, : windows.length] != ABSENT).numpy())
        counted = (chosen & (target != ABSENT)).to(tokens.device)
        edited = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
        edited[
            torch.arange(len(tokens))[:, None].to(tokens.device).expand_as(columns)[chosen], columns[chosen]
        ] = True
        hooks = source.replacing(index, value, edited)
        ablated = _log_probabilities(model, stream, pad, layer, hooks, columns)
        results.append(_compare(intact, ablated, target.to(tokens.device), counted))
    return results


def _log_probabilities(
    model: Transformer,
    stream: Tensor,
    pad: Tensor,
    layer: int,
    hooks: TransformerHooks | None,
    columns: Tensor,
) -> Tensor:
    """Log-probabilities of next tokens at some columns, `[batch, column, d_vocab]`."""
    logits = model(
        stream, hooks=hooks, pad=pad if pad.any() else None, start_at_layer=layer, logits_at=columns
    )
    return functional.log_softmax(logits.float(), dim=-1)


def _compare(intact: Tensor, ablated: Tensor, target: Tensor, counted: Tensor) -> AblatedTokens:
    n = counted.sum(1)
    wanted = target.clamp(min=0)[:, :, None]
    shares = counted / n.clamp(min=1)[:, None]
    divergence = (intact.exp() * (intact - ablated)).sum(-1)
    total = n.sum().clamp(min=1)
    change = ((ablated - intact)[counted]).sum(0) / total
    return AblatedTokens(
        n=n.cpu().numpy(),
        intact=(-intact.gather(-1, wanted)[..., 0] * shares).sum(1).double().cpu().numpy(),
        ablated=(-ablated.gather(-1, wanted)[..., 0] * shares).sum(1).double().cpu().numpy(),
        divergence=(divergence * shares).sum(1).double().cpu().numpy(),
        log_probability_change=change.double().cpu().numpy(),
    )
