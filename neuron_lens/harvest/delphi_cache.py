"""A corpus through a model and an autoencoder into Delphi's latent cache, a batch of rows at a time.

Rows are whole contexts of one length, cut from documents without overlap; what is left of a document at its end is not
cached, for the format has no padding. Models whose tokenizer begins texts with a beginning-of-sequence token read it
before every row, and it is neither in the rows nor in the cache. Format: `explain.formats.delphi`.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.delphi import LatentCache, LatentCacheWriter
from neuron_lens.harvest.batches import row_batches
from neuron_lens.harvest.corpus import Corpus, WindowShape
from neuron_lens.harvest.settings import fitting_shape, model_inputs
from neuron_lens.harvest.sources import Caught, LatentSource
from neuron_lens.hooks import TransformerHooks

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.transformer import Transformer

__all__ = ["write_delphi_cache"]

_RANGE = 4096  # latents that are dense at once


@torch.inference_mode()
def write_delphi_cache(
    model: Transformer,
    autoencoder: Autoencoder,
    corpus: Corpus,
    folder: Path | str,
    *,
    context: int | None = None,
    n_splits: int = 5,
    batch_rows: int = 16,
    max_rows: int | None = None,
    model_name: str = "",
    progress: bool = True,
) -> LatentCache:
    """Write what every latent of the autoencoder holds at every token, and return the cache opened.

    The module is called `layers.<layer>.<site>`. Memory: one batch of rows, a range of its latents dense.

    Args:
        context: tokens of a row; default: the rows a harvest reads.
        n_splits: files the latents are shared by.
        max_rows: stop after so many rows.
        model_name: what Delphi loads the tokenizer by; default: the name in the model's configuration.

    Raises:
        RequestError: an autoencoder that says no site or does not fit the model, a model without tokenizer, a context
            the model cannot read, no document that long, or an activation that float16 cannot hold.
    """
    length = fitting_shape(model).row_length if context is None else context
    _check(model, length, batch_rows, max_rows)
    source = LatentSource(model, autoencoder)
    hooks = TransformerHooks()
    source.attach(hooks)
    shape = WindowShape(length=length, row_length=length, context=0)
    whole = (row for row in corpus.rows(model.tokenizer, shape) if len(row.ids) == length)
    module = f"layers.{source.layer}.{source.site}"
    writer = LatentCacheWriter(
        folder,
        module,
        n_latents=source.n_units,
        n_splits=min(n_splits, source.n_units),
        config={"model_name": model_name or model.config.name or "model", "dataset_repo": corpus.name},
    )
    with writer, tqdm(unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for batch, _ in row_batches(islice(whole, max_rows), batch_rows):
            tokens, pad, first = model_inputs(model, [row.ids for row in batch])
            model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=source.layer + 1)
            places, values = _not_zero(source.take(partial(_behind, first)), source.n_units)
            writer.add(tokens[:, first:].cpu().numpy(), places.numpy(), values.numpy())
            bar.update(len(batch) * length)
    return LatentCache(folder, module)


def _behind(first: int, x: Tensor) -> Tensor:
    return x[:, first:]


def _not_zero(caught: Caught, n_latents: int) -> tuple[Tensor, Tensor]:
    """Places `[n, 3]` (row, position, latent) and values `[n]`, on the CPU; a range of latents after the other."""
    places, values = [], []
    for begin in range(0, n_latents, _RANGE):
        dense = caught.columns(begin, min(begin + _RANGE, n_latents))
        own = dense.nonzero()
        values.append(dense[own.unbind(1)].float().cpu())
        places.append((own + own.new_tensor([0, 0, begin])).cpu())
    return torch.cat(places), torch.cat(values)


def _check(model: Transformer, length: int, batch_rows: int, max_rows: int | None) -> None:
    if model.tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so no text can be given to it; load one with the model"
        )
    longest = model.config.n_ctx - bool(model.tokenizer.adds_bos and model.tokenizer.bos_id is not None)
    if not 1 <= length <= longest:
        raise RequestError(f"rows of {length} tokens were asked for; this model reads 1 to {longest}")
    if batch_rows < 1 or (max_rows is not None and max_rows < 1):
        raise RequestError(f"batch_rows ({batch_rows}) and max_rows ({max_rows}) must be at least 1")
