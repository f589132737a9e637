"""Extraction over a data set: batch by batch into one cache, or to disk with one batch in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.arguments import known_arguments, refuse_unknown
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.inputs import MODEL_INPUTS, MULTIMODAL
from neuron_lens.faces.hooked_model.queries import query_rows
from neuron_lens.faces.hooked_model.requests import requests_of
from neuron_lens.faces.hooked_model.store import ActivationSaver
from neuron_lens.faces.hooked_model.stored import CacheWriter, StoredCache, jsonable

if TYPE_CHECKING:
    from neuron_lens.faces.hooked_model.model import HookedModel

__all__ = ["BatchSaver", "extract", "require_batches", "split_batch"]

BatchSaver = Callable[[dict[str, Any]], Mapping[str, Any] | None]
# Keys of a batch that say how it is to be run.
OPTIONS = ("pivot_positions", "split_positions", "vocabulary_index")
# Options of one forward that mean nothing for a whole data set.
REFUSED = ("external_cache", "batch_idx")
# Options that are requests, kept in the metadata when they are given.
QUERIES = ("ablation_queries", "patching_queries")


def split_batch(batch: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A batch of a dataloader as what the model takes, options of `forward`, and the user's own entries."""
    if not isinstance(batch, Mapping):
        return batch, {}, {}
    taken = (
        *MODEL_INPUTS,
        *MULTIMODAL,
    )  # images too, so that they are refused and not taken for something else
    inputs = {name: batch[name] for name in taken if name in batch}
    options = {name: batch[name] for name in OPTIONS if name in batch}
    others = {name: value for name, value in batch.items() if name not in (*taken, *OPTIONS)}
    return inputs, options, others


def extract(
    model: HookedModel,
    dataloader: Iterable[Any],
    target_token_positions: Sequence[Any],
    extraction_config: ExtractionConfig | None,
    *,
    batch_saver: BatchSaver | None = None,
    stream_to: str | os.PathLike[str] | ActivationSaver | None = None,
    progress: bool = False,
    aggregation: tuple[str, Callable[[Any, Any], Any]] | None = None,
    tag: str | None = None,
    **options: Any,
) -> ActivationCache | StoredCache:
    """`forward` of every batch, joined into one cache.

    Args:
        dataloader: batches as `forward` takes inputs, or mappings with input_ids and attention_mask, and
            besides them pivot_positions, vocabulary_index and entries of your own.
        batch_saver: takes a batch's own entries and returns what to keep of them, by key.
        stream_to: a new folder, or an `ActivationSaver` for a new run: every batch is written when it is done,
            and one is in memory at a time; the result is a `StoredCache`. The folder appears when all batches are there.
        aggregation: (prefix, rule) to join keys that begin so by a rule of your own.
        tag: a word for queries of the store.
        options: those of `forward`, the same for all batches.

    Raises:
        RequestError: no batch at all; batches whose own keys change; unknown options; a folder that exists.
    """
    refused = [name for name in REFUSED if name in options]
    if refused:
        raise RequestError(f"{refused[0]} is set batch by batch; leave it out")
    refuse_unknown("extract_cache", options, known_arguments(model.forward))
    require_batches("dataloader", dataloader)
    if batch_saver is not None and not callable(batch_saver):
        raise RequestError(
            f"batch_saver must be a function of a batch's own entries; got {batch_saver!r:.60}"
        )
    if aggregation is not None and not (
        isinstance(aggregation, tuple) and len(aggregation) == 2 and callable(aggregation[1])
    ):
        raise RequestError(f"register_aggregation is a pair (prefix, function); got {aggregation!r:.60}")
    if stream_to is not None and not isinstance(stream_to, str | os.PathLike | ActivationSaver):
        raise RequestError(f"stream_to must be a new folder or an ActivationSaver; got {stream_to!r:.60}")
    config = ExtractionConfig() if extraction_config is None else extraction_config
    options["interventions"] = requests_of(options.get("interventions"))  # read once for every batch
    metadata = {
        "model_name": model.config.model_name,
        "target_token_positions": jsonable(list(target_token_positions)),
        "extraction_config": jsonable(config),
        "interventions": jsonable(options["interventions"]),
        "pivot_positions": jsonable(options.get("pivot_positions", options.get("split_positions"))),
        **{
            name: jsonable(query_rows(options[name], name))
            for name in QUERIES
            if options.get(name) is not None
        },
    }
    caches = _batches(model, dataloader, target_token_positions, config, batch_saver, options, progress)
    if stream_to is None:
        rules = None if aggregation is None else dict([aggregation])
        return ActivationCache.join(caches, rules).add_metadata(**metadata, tag=tag)
    if aggregation is not None:
        raise RequestError(
            "a rule of your own joins batches in memory; with stream_to use StoredCache.iter_batches"
        )
    folder = stream_to
    if isinstance(stream_to, ActivationSaver):
        folder = stream_to.new_folder(model.config.model_name)
        metadata = stream_to.metadata(model.config.model_name, tag, metadata)
    assert not isinstance(folder, ActivationSaver), "replaced by its folder"
    with CacheWriter(folder, {"tag": tag, **metadata}) as writer:
        for cache in caches:
            writer.add(cache)
    return StoredCache(writer.folder)


def require_batches(name: str, given: Any) -> None:
    """Raises RequestError unless there is something to go through, batch by batch."""
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise RequestError(
            f"{name} must give batches, one after another: a list or a DataLoader; got {given!r:.60}"
        )


def _batches(
    model: HookedModel,
    dataloader: Iterable[Any],
    positions: Sequence[Any],
    config: ExtractionConfig,
    batch_saver: BatchSaver | None,
    options: dict[str, Any],
    progress: bool,
) -> Iterator[ActivationCache]:
    own: set[str] | None = None
    total = len(dataloader) if isinstance(dataloader, Sized) else None
    for number, batch in enumerate(tqdm(dataloader, total=total, disable=not progress, unit="batch")):
        inputs, given, others = split_batch(batch)
        keys = set(batch) if isinstance(batch, Mapping) else set()
        if own is None:
            own = keys
        elif keys != own:
            raise RequestError(
                f"batch {number} has other keys than batch 0: {sorted(keys ^ own)} are in one of them only"
            )
        twice = [name for name in given if options.get(name) is not None]
        if twice:
            raise RequestError(f"{twice[0]} is in the batches and given for all of them; give it once")
        cache = model.forward(inputs, positions, extraction_config=config, **{**options, **given})
        if batch_saver is not None:
            add_own(cache, batch_saver(dict(others)), number)
        yield cache
    if own is None:
        raise RequestError("the dataloader is empty: there is nothing to extract")


def add_own(cache: ActivationCache, saved: Mapping[str, Any] | None, number: int) -> None:
    """What batch_saver returned, beside the activations."""
    if saved is None:
        return
    if not isinstance(saved, Mapping):
        raise RequestError(
            f"batch {number}: batch_saver must return a dict or None; got {type(saved).__name__}"
        )
    taken = [key for key in saved if key in cache]
    if taken:
        raise RequestError(
            f"batch {number}: batch_saver returned {taken[0]!r}, which the cache has already; use another name"
        )
    for key, value in saved.items():
        cache[key] = value
