"""What an ablated edge carries instead of what its sender writes: zeros, means, or values of other prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder
from neuron_lens.errors import RequestError
from neuron_lens.interventions.circuits.nodes import GraphShape
from neuron_lens.interventions.circuits.senders import sender_outputs

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Ablation"]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What an ablated sender is taken to have written.

    kind: "zero"; "mean" over `tokens` and their positions; "patch", from `tokens`, row by row; "resample", from rows of
        `tokens` drawn at random with `seed`.
    tokens: other prompts [batch, pos]; for "patch" and "resample" of the length of those that are run.
    pad: true where a column of `tokens` is padding [batch, pos]. For "patch" each row has its padding where the row that is
        run has it; for "resample" a row is drawn from those that do.
    """

    kind: Literal["zero", "mean", "patch", "resample"]
    tokens: Tensor | None = None
    seed: int = 0
    pad: Tensor | None = None

    def outputs(
        self,
        model: Transformer,
        tokens: Tensor,
        *,
        shape: GraphShape | None = None,
        autoencoders: Mapping[str, Autoencoder] | None = None,
        pad: Tensor | None = None,
    ) -> Tensor:
        """Each sender's output under the ablation, [sender, batch or 1, pos or 1, d_model].

        tokens, pad: those that are run. shape: the graph; None for one without chosen units.

        Raises RequestError when the ablation's prompts are missing or do not fit.
        """
        shape = shape or GraphShape.of(model.config)
        if self.kind == "zero":
            sizes = (len(shape.senders), 1, 1, model.config.d_model)
            return torch.zeros(sizes, dtype=model.embed.weight.dtype, device=model.embed.weight.device)
        if self.tokens is None:
            raise RequestError(f"the ablation {self.kind!r} takes its values from other prompts: give tokens")
        if self.kind != "mean":
            self._check_length(tokens)
        written = sender_outputs(model, self.tokens, shape=shape, autoencoders=autoencoders, pad=self.pad)
        real = torch.ones_like(self.tokens, dtype=torch.bool) if self.pad is None else ~self.pad
        if self.kind == "mean":
            counted = torch.where(real[:, :, None], written, 0.0)
            return counted.sum((1, 2), keepdim=True) / real.sum()
        return written[:, self._rows(tokens, real, pad)]

    def _check_length(self, tokens: Tensor) -> None:
        assert self.tokens is not None, "checked before"
        if self.tokens.shape[1] != tokens.shape[1] or (
            self.kind == "patch" and len(self.tokens) != len(tokens)
        ):
            raise RequestError(
                f"the ablation's prompts are {list(self.tokens.shape)} and those that are run "
                f"{list(tokens.shape)}; they must align"
            )

    def _rows(self, tokens: Tensor, real: Tensor, pad: Tensor | None) -> Tensor:
        """Which of the ablation's rows each row that is run takes its values from, [batch]."""
        wanted = torch.ones_like(tokens, dtype=torch.bool) if pad is None else ~pad
        # rows align column by column: [batch, rows of the ablation]
        aligned = (wanted[:, None] == real[None].to(wanted.device)).all(-1).cpu()
        if self.kind == "patch":
            rows = torch.arange(len(tokens))
            fits = aligned.diagonal()
        else:
            # one number for each row, scaled to the rows that align with it
            draws = torch.rand(len(tokens), generator=torch.Generator().manual_seed(self.seed))
            fits = aligned.any(1)
            nth = (draws * aligned.sum(1)).long().clamp(max=len(real) - 1)
            rows = ((aligned.cumsum(1) - 1 == nth[:, None]) & aligned).float().argmax(1)
        if not bool(fits.all()):
            row = int((~fits).nonzero()[0])
            raise RequestError(
                f"row {row} has its padding elsewhere than the ablation's prompts: they must align column by column; "
                "pad both alike, or use the ablation 'mean' or 'zero'"
            )
        return rows.to(tokens.device)
