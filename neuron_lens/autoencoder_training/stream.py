"""Batches of activations from a model and a corpus, shuffled, without end, and the same every time.

Rows of text are permuted over the whole corpus, anew in each epoch; the activations of many rows fill a
buffer, are shuffled together and dealt out. What a buffer holds depends on the seed and its number alone, so
that a stream can be taken up anywhere: nothing of it need be saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.corpus import Corpus, Row, WindowShape
from neuron_lens.harvest.run import fitting_shape, model_inputs
from neuron_lens.hooks import TransformerHooks
from neuron_lens.windows import SPLITS

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["ActivationStream", "kept_columns", "rows_of_split"]

_BATCH_ROWS = 16


class ActivationStream:
    """Activations of one site, [batch_tokens, d_in] at a time.

    Only the training part of the corpus is read (`split_of` says which rows those are), every token once an epoch,
    with the left context it is harvested with. The beginning-of-sequence token is not part of it.

    Args:
        layer: of the site; None when it is outside the blocks.
        buffer_tokens: activations that are shuffled together; rounded up to whole rows.
        target: another site and its layer, whose activations of the same tokens stand beside the first's, in a
            batch [batch_tokens, d_in + d_out]; `parted` takes them apart.
    """

    def __init__(
        self,
        model: Transformer,
        corpus: Corpus,
        site: str,
        layer: int | None,
        *,
        batch_tokens: int,
        buffer_tokens: int,
        seed: int = 0,
        target: tuple[str, int | None] | None = None,
    ) -> None:
        self.model = model
        self.places = [(site, layer)] if target is None else [(site, layer), target]
        self.widths: list[int] = []
        self.batch_tokens, self.buffer_tokens, self.seed = (
            batch_tokens,
            max(buffer_tokens, batch_tokens),
            seed,
        )
        self.rows = rows_of_split(model, corpus, "train", seed)
        self.kept = np.array([len(row.ids) - row.keep_from for row in self.rows])
        self.tokens_per_epoch = int(self.kept.sum())
        if self.tokens_per_epoch < batch_tokens:
            raise RequestError(
                f"the training part of the corpus {corpus.name} has {self.tokens_per_epoch} tokens, less than one "
                f"batch of {batch_tokens}; give more text or a smaller batch_tokens"
            )
        for place in self.places:
            _check_site(model, *place)

    def parted(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """What is read [batch, d_in] and what is predicted [batch, d_out]: the same where there is no target."""
        if len(self.places) == 1:
            return batch, batch
        read, predicted = batch.split(self.widths, dim=-1)
        return read, predicted

    def batches(self, start: int = 0) -> Iterator[Tensor]:
        """Batch number `start` and all that follow, [batch_tokens, d_in] in the model's dtype."""
        for number, rows in enumerate(self._plan()):
            count = int(self.kept[rows].sum()) // self.batch_tokens
            if start >= count:
                start -= count
                continue
            buffer = self.buffer(number, rows)
            for index in range(start, count):
                yield buffer[index * self.batch_tokens : (index + 1) * self.batch_tokens]
            start = 0

    def buffer(self, number: int = 0, rows: Sequence[int] | None = None) -> Tensor:
        """The shuffled activations [tokens, d_in] of a buffer, by its number (`rows`: what the plan says of it)."""
        if rows is None:
            rows = next(planned for index, planned in enumerate(self._plan()) if index == number)
        held = self._activations([self.rows[row] for row in rows])
        generator = torch.Generator().manual_seed(_mixed(self.seed, 1, number))
        return held[torch.randperm(len(held), generator=generator).to(held.device)]

    def _plan(self) -> Iterator[list[int]]:
        """The rows of each buffer in turn, without end."""
        rows: list[int] = []
        tokens, epoch = 0, 0
        while True:
            for row in np.random.default_rng(_mixed(self.seed, 2, epoch)).permutation(len(self.rows)):
                rows.append(int(row))
                tokens += int(self.kept[row])
                if tokens >= self.buffer_tokens:
                    yield rows
                    rows, tokens = [], 0
            epoch += 1

    @torch.no_grad()
    def _activations(self, rows: Sequence[Row]) -> Tensor:
        caught: dict[int, Tensor] = {}

        def catch(x: Tensor, place: int, layer: int | None = None) -> None:
            if layer == self.places[place][1]:
                caught[place] = x.flatten(2)

        hooks = TransformerHooks()
        for place, (site, _) in enumerate(self.places):
            hooks.append_to_path(f"{site}.fwd", partial(catch, place=place))
        layers = [layer for _, layer in self.places if layer is not None]
        stop = max(layers) + 1 if len(layers) == len(self.places) else None
        parts = []
        for first_row in range(0, len(rows), _BATCH_ROWS):
            batch = rows[first_row : first_row + _BATCH_ROWS]
            tokens, pad, first = model_inputs(self.model, [row.ids for row in batch])
            self.model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=stop)
            found = [caught.pop(place) for place in range(len(self.places))]
            self.widths, together = [each.shape[-1] for each in found], torch.cat(found, dim=-1)
            parts.append(together[kept_columns(batch, tokens.shape[1], first).to(tokens.device)])
        return torch.cat(parts)


def rows_of_split(model: Transformer, corpus: Corpus, split: str, seed: int) -> list[Row]:
    """The rows of one part of the corpus, as the model will read them. Raises RequestError without a tokenizer."""
    if model.tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so no text can be given to it; load one with the model"
        )
    shape: WindowShape = fitting_shape(model)
    return [row for row in corpus.rows(model.tokenizer, shape, seed) if SPLITS[row.split] == split]


def kept_columns(rows: Sequence[Row], length: int, first: int) -> Tensor:
    """Which columns of the rows' inputs are their own tokens, not context and not padding [row, length], bool."""
    columns = torch.arange(length)[None]
    begin = torch.tensor([first + row.keep_from for row in rows])[:, None]
    end = torch.tensor([first + len(row.ids) for row in rows])[:, None]
    return (columns >= begin) & (columns < end)


def _check_site(model: Transformer, site: str, layer: int | None) -> None:
    hooks = TransformerHooks()
    found = {each.path: each for each in hooks.sites()}.get(site)
    if found is None:
        hooks.matching(f"{site}.fwd")  # raises, with the nearest paths
        raise RequestError(f"{site!r} names several sites; an autoencoder reads one")
    absent = model.config.absent_sites()
    if site in absent:
        raise RequestError(f"{site} never fires in this model: {absent[site]}")
    if found.per_layer and layer is None:
        raise RequestError(f"{site} is in every layer: say which")
    if not found.per_layer and layer is not None:
        raise RequestError(f"{site} belongs to no layer; leave the layer out")
    if "pos" not in (found.axes or ()):
        raise RequestError(
            f"{site} runs once for each expert, on the tokens that use it; an autoencoder reads every position"
        )
    if layer is not None and layer >= model.config.n_layers:
        raise RequestError(
            f"layer {layer} does not exist: the model has layers 0 to {model.config.n_layers - 1}"
        )


def _mixed(*parts: int) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
