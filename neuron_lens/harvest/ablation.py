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

__all__ = [
    "AblatedTokens",
    "WindowRun",
    "ablate_where",
    "divergences",
    "simulated_divergences",
    "window_inputs",
]

_AT_ONCE = 8  # windows whose predictions at every token are in memory together
_FAR = 80.0  # a change of log-probability whose exponential float32 still holds


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


class WindowRun:
    """Windows of a source's corpus run intact, once, to be compared with runs in which something is changed.

    Args:
        windows, rows: the windows, and which of them.
        at: the tokens of each window whose prediction is compared `[row, place]`; None for all of its tokens.

    Attributes:
        intact: log-probabilities of the next token there `[row, place, d_vocab]`.
    """

    def __init__(
        self,
        model: Transformer,
        layer: int,
        windows: TextWindows,
        rows: Sequence[int],
        at: NDArray[np.int64] | None = None,
    ) -> None:
        inputs, begins = window_inputs(windows, rows)
        self._model, self._layer = model, layer
        self._tokens, self._pad, first = model_inputs(model, inputs)
        begins_at = first + torch.from_numpy(begins)[:, None]
        last = self._tokens.shape[1] - 1
        self._columns = (begins_at + torch.arange(windows.length)).clamp(max=last)
        self.tokens_of_windows = torch.from_numpy(
            windows.columns["token"][list(rows), windows.context :].astype(np.int64)
        )
        read = self._columns if at is None else self._columns.gather(1, torch.from_numpy(at))
        self._read = read.to(self._tokens.device)
        with torch.inference_mode():
            padding = self._pad if self._pad.any() else None
            self._stream = (
                self._tokens if layer == 0 else model(self._tokens, pad=padding, stop_at_layer=layer)
            )
            self.intact = self.changed(None)

    def spread(self, values: NDArray[np.generic]) -> Tensor:
        """Values of the windows' tokens `[row, length]` at the places of these tokens in what the model reads, and
        zero (or False) elsewhere `[row, pos]`."""
        given = torch.from_numpy(np.ascontiguousarray(values))
        there = self.tokens_of_windows[:, : given.shape[1]] != ABSENT
        spread = torch.zeros(self._tokens.shape, dtype=given.dtype)
        row = torch.arange(len(given))[:, None].expand_as(given)
        spread[row[there], self._columns[there]] = given[there]
        return spread.to(self._tokens.device)

    @torch.inference_mode()
    def changed(self, hooks: TransformerHooks | None) -> Tensor:
        """Log-probabilities of the next token `[row, place, d_vocab]` with hooks at work."""
        logits = self._model(
            self._stream,
            hooks=hooks,
            pad=self._pad if self._pad.any() else None,
            start_at_layer=self._layer,
            logits_at=self._read,
        )
        return functional.log_softmax(logits.float(), dim=-1)


def divergences(intact: Tensor, changed: Tensor) -> Tensor:
    """KL(intact || changed) of log-probabilities `[..., d_vocab]`, nats `[...]`."""
    return (intact.exp() * (intact - changed)).sum(-1)


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
    run = WindowRun(source.model, source.layer, windows, rows)
    here = run.tokens_of_windows
    target = here[:, 1 : windows.length + 1]
    results = []
    for mask in masks:
        chosen = torch.from_numpy(mask & (here[:, : windows.length] != ABSENT).numpy())
        counted = (chosen & (target != ABSENT)).to(run.intact.device)
        changed = run.changed(source.replacing(index, value, run.spread(chosen.numpy())))
        results.append(_compare(run.intact, changed, target.to(run.intact.device), counted))
    return results


@torch.inference_mode()
def simulated_divergences(
    source: UnitSource,
    index: int,
    windows: TextWindows,
    rows: Sequence[int],
    simulated: NDArray[np.float64],
    given: NDArray[np.bool_],
    mean: float,
) -> NDArray[np.float64]:
    """How far predictions move when a unit is replaced by its simulation, and when by its mean `[window, 2]`.

    The Jensen-Shannon divergence of the next-token predictions from the intact ones (nats), averaged over the tokens
    of each window, as ablation scoring takes it (Bills et al. 2023, "Language models can explain neurons in language
    models"). `simulated` activations `[window, length]` stand where `given` is True; elsewhere the unit stays as it is
    in both. A row may be named several times, with other simulations: what these share is run once.
    """
    found = np.zeros((len(rows), 2))
    named: dict[int, list[int]] = {}  # where each row is named
    for place, row in enumerate(rows):
        named.setdefault(row, []).append(place)
    distinct = list(named)
    for begin in range(0, len(distinct), _AT_ONCE):
        part = distinct[begin : begin + _AT_ONCE]
        run = WindowRun(source.model, source.layer, windows, part)
        by_mean: dict[bytes, NDArray[np.float64]] = {}
        for turn in range(max(len(named[row]) for row in part)):
            # A row that is named less often goes along with its last simulation again.
            places = [named[row][min(turn, len(named[row]) - 1)] for row in part]
            where, key = run.spread(given[places]), given[places].tobytes()
            values = run.spread(simulated[places]).to(run.intact.dtype)
            if key not in by_mean:
                by_mean[key] = _moved(run, source.replacing(index, mean, where))
            found[places, 0] = _moved(run, source.replacing(index, values, where))
            found[places, 1] = by_mean[key]
    return found


def _moved(run: WindowRun, hooks: TransformerHooks) -> NDArray[np.float64]:
    """The Jensen-Shannon divergence of predictions with hooks at work from the intact ones, the mean over the tokens of
    each window `[row]`."""
    there = run.tokens_of_windows[:, : run.intact.shape[1]] != ABSENT
    moved = _jensen_shannon(run.intact, run.changed(hooks)).cpu() * there
    return moved.double().sum(1).numpy() / there.sum(1).clamp(min=1).numpy()


def _jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Of log-probabilities `[..., d_vocab]`, nats `[...]`; not below 0 by rounding.

    With p and q of a token, d = log q - log p and l = log((p + q) / 2p), this is half the sum of q d - (p + q) l: summed
    as two divergences from the middle, what one unit does would lie near the rounding errors of what cancels.
    """
    change = (b - a).clamp(-_FAR, _FAR)
    middle = torch.log1p(torch.expm1(change) / 2)
    q = b.exp()
    return ((q * change - (a.exp() + q) * middle).sum(-1) / 2).clamp(min=0)


def _compare(intact: Tensor, ablated: Tensor, target: Tensor, counted: Tensor) -> AblatedTokens:
    n = counted.sum(1)
    wanted = target.clamp(min=0)[:, :, None]
    shares = counted / n.clamp(min=1)[:, None]
    divergence = divergences(intact, ablated)
    total = n.sum().clamp(min=1)
    change = ((ablated - intact)[counted]).sum(0) / total
    return AblatedTokens(
        n=n.cpu().numpy(),
        intact=(-intact.gather(-1, wanted)[..., 0] * shares).sum(1).double().cpu().numpy(),
        ablated=(-ablated.gather(-1, wanted)[..., 0] * shares).sum(1).double().cpu().numpy(),
        divergence=(divergence * shares).sum(1).double().cpu().numpy(),
        log_probability_change=change.double().cpu().numpy(),
    )
