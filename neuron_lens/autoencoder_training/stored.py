"""The stream of a trainer, read from disk: activations that were stored once, for any number of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuron_lens.autoencoder_training.stream import ActivationStream
from neuron_lens.errors import RequestError
from neuron_lens.harvest.dense import StoredActivations

__all__ = ["StoredStream"]


class StoredStream(ActivationStream):
    """Activations of one stored site, [batch_tokens, d_in] at a time: what `ActivationStream` gives for the model
    and text they were stored from with split="train", in the same order, to the rounding they are stored with.

    Args:
        target: another stored site, as in `ActivationStream`.

    Raises:
        RequestError: a site that is not stored, or fewer tokens than a batch.
    """

    def __init__(
        self,
        store: StoredActivations,
        site: str,
        layer: int,
        *,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int = 0,
        target: tuple[str, int] | None = None,
    ) -> None:
        self.store = store
        self.places = [(site, layer)] if target is None else [(site, layer), target]
        self.widths = [store.shards(path, at)[0].shape[1] for path, at in self._stored]
        self.batch_tokens, self.buffer_tokens, self.seed = (
            batch_tokens,
            max(buffer_tokens, batch_tokens),
            seed,
        )
        self.kept = store.row_sizes.astype(np.int64)
        self._ends = np.cumsum(self.kept)
        self.rows: Any = range(len(self.kept))
        self.tokens_per_epoch = store.n_tokens
        if self.tokens_per_epoch < batch_tokens:
            raise RequestError(
                f"{store.folder} holds {self.tokens_per_epoch} tokens, less than one batch of {batch_tokens}; store "
                "more text or use a smaller batch_tokens"
            )

    @property
    def _stored(self) -> list[tuple[str, int]]:
        return [(path, layer) for path, layer in self.places if layer is not None]

    def _activations(self, rows: Sequence[Any]) -> Tensor:
        tokens = np.concatenate(
            [np.arange(self._ends[row] - self.kept[row], self._ends[row]) for row in rows]
        )
        return torch.cat([self.store.rows(path, layer, tokens) for path, layer in self._stored], dim=-1)
