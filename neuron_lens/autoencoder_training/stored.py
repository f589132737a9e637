"""The stream of a trainer, read from disk: activations that were stored once, for any number of runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neuron_lens.autoencoder_training.settings import TrainingSettings
from neuron_lens.autoencoder_training.stream import ActivationStream
from neuron_lens.errors import RequestError
from neuron_lens.harvest.dense import StoredActivations
from neuron_lens.harvest.settings import fitting_shape, model_fingerprint

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["StoredStream", "stored_stream"]


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


def stored_stream(model: Transformer, store: StoredActivations, settings: TrainingSettings) -> StoredStream:
    """The stream of a training run, read from a store of this model's activations.

    Raises:
        RequestError: a store of another model, of other rows than the run's training part (those a run of this seed
            is evaluated on would be among them), or without its sites.
    """
    key, target = store.manifest["key"], settings.target
    if key["model"] != model_fingerprint(model):
        raise RequestError(f"{store.folder} holds activations of another model; give that one, or store anew")
    shape = fitting_shape(model)
    wanted = {
        "split": "train",
        "seed": settings.seed,
        "shape": [shape.length, shape.row_length, shape.context],
    }
    wrong = [f"{name} {key[name]}, expected {value}" for name, value in wanted.items() if key[name] != value]
    if wrong:
        raise RequestError(
            f"{store.folder} holds other rows than the training part of this run ({'; '.join(wrong)}): store with "
            f'split="train" and the seed of the run, so that nothing it is evaluated on is trained on'
        )
    if settings.layer is None or (target is not None and target[1] is None):
        raise RequestError(
            "sites outside the blocks are not stored: say which layer, or train from the text itself"
        )
    return StoredStream(
        store,
        settings.site,
        settings.layer,
        batch_tokens=settings.batch_tokens,
        buffer_tokens=settings.buffer_tokens,
        seed=settings.seed,
        target=None if target is None or target[1] is None else (target[0], target[1]),
    )
