"""One pass of the model over a corpus: rows in batches, hooks that catch the sites, keepers that keep a
little, and now and then everything held on disk.

The pass stops at the last layer asked for. The catching hooks hand the sites' own tensors on: nothing of a
batch stays after it. A pass over some of the documents leaves a part; parts of different documents are merged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.harvest.batches import row_batches
from neuron_lens.harvest.corpus import Corpus, Row
from neuron_lens.harvest.cutter import Cutter
from neuron_lens.harvest.finish import write_kept
from neuron_lens.harvest.keepers import State
from neuron_lens.harvest.kept import SourceKeepers
from neuron_lens.harvest.part import HarvestPart, Progress
from neuron_lens.harvest.second_pass import read_again
from neuron_lens.harvest.settings import HarvestSettings, fitting_shape, model_fingerprint, model_inputs
from neuron_lens.harvest.shard import FORMAT_VERSION, LayerHarvest
from neuron_lens.harvest.sources import NeuronSource, UnitSource
from neuron_lens.hooks import TransformerHooks
from neuron_lens.windows import SPLITS

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = [
    "HarvestSettings",
    "fitting_shape",
    "harvest",
    "harvest_layers",
    "harvest_part",
    "merge_harvests",
    "model_fingerprint",
    "model_inputs",
]

MINIMUM_WINDOWS = 2  # in every part
_NEAR = "near"  # the folder of the second pass, in that of the first


def harvest(
    model: Transformer,
    corpus: Corpus,
    sources: Sequence[UnitSource],
    folder: Path | str,
    settings: HarvestSettings | None = None,
    *,
    fingerprint: str | None = None,
    progress: bool = True,
) -> dict[str, LayerHarvest]:
    """Harvest sources into `folder/<source.name>`, in one pass; what is there already, of the same content, is
    opened. A pass that was killed goes on from its last part.

    Args:
        fingerprint: of the model, where it is known already.
        progress: show a bar on stderr.

    Returns:
        dict[str, LayerHarvest]: by the name of the source.

    Raises:
        RequestError: no sources or two of one name, a model without a tokenizer, too little text, or a
            damaged folder.
    """
    settings = settings or HarvestSettings(shape=fitting_shape(model))
    folder = Path(folder)
    fingerprint = fingerprint or model_fingerprint(model)
    _check(model, sources)
    done: dict[str, LayerHarvest] = {}
    for source in sources:
        found = LayerHarvest.open(folder / source.name, _key(fingerprint, corpus, source, settings))
        if found is not None:
            done[source.name] = found
    missing = [source for source in sources if source.name not in done]
    if missing:
        keys = [_key(fingerprint, corpus, source, settings) for source in missing]
        part = _part_folder(folder, keys)
        everything = range(corpus.n_documents)
        keepers, n_tokens = _pass(
            model, corpus, missing, settings, everything, part, keys, progress, scratch=folder
        )
        done |= _finish(model, corpus, missing, keepers, n_tokens, folder, settings, keys, progress)
    return {source.name: done[source.name] for source in sources}


def harvest_layers(
    model: Transformer,
    corpus: Corpus,
    layers: Sequence[int],
    folder: Path,
    settings: HarvestSettings | None = None,
    *,
    fingerprint: str | None = None,
    progress: bool = True,
) -> dict[int, LayerHarvest]:
    """`harvest` of the neurons of some layers, by layer."""
    site = settings.site if settings else HarvestSettings().site
    sources = {layer: NeuronSource(model, layer, site) for layer in sorted(set(layers))}
    done = harvest(
        model, corpus, list(sources.values()), folder, settings, fingerprint=fingerprint, progress=progress
    )
    return {layer: done[source.name] for layer, source in sources.items()}


def harvest_part(
    model: Transformer,
    corpus: Corpus,
    sources: Sequence[UnitSource],
    folder: Path | str,
    documents: range,
    settings: HarvestSettings | None = None,
    *,
    fingerprint: str | None = None,
    progress: bool = True,
) -> HarvestPart:
    """Harvest some of the documents and leave what was held in `folder`, for `merge_harvests`.

    Called again after it was killed, it goes on; called again after it was done, it opens what is there.

    Raises:
        RequestError: as `harvest`, or documents that do not exist.
    """
    settings = settings or HarvestSettings(shape=fitting_shape(model))
    folder = Path(folder)
    _check(model, sources)
    if documents.step != 1 or not 0 <= documents.start < documents.stop <= corpus.n_documents:
        raise RequestError(
            f"documents {documents} do not fit the corpus {corpus.name}: expected a range within "
            f"0 to {corpus.n_documents} that is not empty"
        )
    fingerprint = fingerprint or model_fingerprint(model)
    keys = [_key(fingerprint, corpus, source, settings) for source in sources]
    _pass(model, corpus, sources, settings, documents, folder, keys, progress, scratch=folder, keep=True)
    part = HarvestPart.open(folder)
    assert part is not None, "the pass has just written it"
    return part


def merge_harvests(
    model: Transformer,
    corpus: Corpus,
    sources: Sequence[UnitSource],
    parts: Sequence[HarvestPart],
    folder: Path | str,
    settings: HarvestSettings | None = None,
) -> dict[str, LayerHarvest]:
    """Parts of different documents as one harvest, the one a single pass gives (figures: at rounding).

    Raises:
        RequestError: parts of other models, corpora, sources or settings, that are not complete, that
            overlap, or that leave documents out.
    """
    settings = settings or HarvestSettings(shape=fitting_shape(model))
    _check(model, sources)
    fingerprint = model_fingerprint(model)
    keys = [_key(fingerprint, corpus, source, settings) for source in sources]
    ordered = sorted(parts, key=lambda part: part.progress.first_document)
    _check_parts(ordered, keys, corpus)
    merged: list[SourceKeepers] = []
    for part in ordered:
        held = _loaded(model, sources, settings, part, Path(folder))
        for own, theirs in zip(merged, held, strict=False):
            own.merge(theirs)
        merged = merged or held
    n_tokens = sum(part.progress.n_tokens for part in ordered)
    return _finish(model, corpus, sources, merged, n_tokens, Path(folder), settings, keys, progress=False)


def _check(model: Transformer, sources: Sequence[UnitSource]) -> None:
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise RequestError(f"name at least one source to harvest, and each once; got {names}")
    if model.tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so no text can be given to it; load one with the model"
        )


def _check_parts(parts: Sequence[HarvestPart], keys: list[dict[str, Any]], corpus: Corpus) -> None:
    begin = 0
    for part in parts:
        if part.key != {"sources": keys}:
            raise RequestError(f"{part.folder} was harvested from another model, corpus, source or settings")
        if not part.progress.is_complete:
            raise RequestError(f"{part.folder} is not complete: run harvest_part on it again")
        if part.progress.first_document != begin:
            raise RequestError(
                f"the parts do not follow each other: {part.folder} begins at document "
                f"{part.progress.first_document}, expected {begin}"
            )
        begin = part.progress.last_document
    if begin != corpus.n_documents:
        raise RequestError(f"the parts end at document {begin}; the corpus has {corpus.n_documents}")


@torch.inference_mode()
def _pass(
    model: Transformer,
    corpus: Corpus,
    sources: Sequence[UnitSource],
    settings: HarvestSettings,
    documents: range,
    folder: Path,
    keys: list[dict[str, Any]],
    progress: bool,
    *,
    scratch: Path,
    keep: bool = False,
) -> tuple[list[SourceKeepers], int]:
    """Run documents through the model; keepers by source, and the number of tokens kept."""
    part = HarvestPart.open(folder)
    if part is not None and not _belongs(part, keys, documents):
        part = None
    keepers = _loaded(model, sources, settings, part, scratch)
    at = part.progress if part else _begin(documents)
    if at.is_complete:
        return keepers, at.n_tokens
    hooks = TransformerHooks()
    for source in sources:
        source.attach(hooks)
    stop = max(source.layer for source in sources) + 1
    rows = corpus.rows(
        model.tokenizer, settings.shape, settings.seed, documents, (at.next_document, at.next_start)
    )
    written = n_tokens = at.n_tokens
    with tqdm(
        initial=n_tokens, unit=" tokens", unit_scale=True, desc="harvesting", disable=not progress
    ) as bar:
        for batch, following in row_batches(rows, settings.batch_rows):
            tokens, pad, first = model_inputs(model, [row.ids for row in batch])
            model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=stop)
            cutter = Cutter(batch, settings.shape.length, settings.seed, first)
            for source, kept in zip(sources, keepers, strict=True):
                kept.update(source.take(cutter), cutter)
            n_tokens += cutter.n_tokens
            bar.update(cutter.n_tokens)
            bar.set_postfix_str(f"document {batch[-1].document + 1}/{corpus.n_documents}", refresh=False)
            if following is not None and n_tokens - written >= settings.shard_tokens:
                _save(folder, keys, sources, keepers, documents, following, n_tokens)
                written = n_tokens
    if keep:
        _save(folder, keys, sources, keepers, documents, None, n_tokens)
    return keepers, n_tokens


def _begin(documents: range) -> Progress:
    return Progress(
        first_document=documents.start,
        last_document=documents.stop,
        next_document=documents.start,
        next_start=0,
        n_tokens=0,
        is_complete=False,
    )


def _belongs(part: HarvestPart, keys: list[dict[str, Any]], documents: range) -> bool:
    return part.key == {"sources": keys} and documents == range(
        part.progress.first_document, part.progress.last_document
    )


def _loaded(
    model: Transformer,
    sources: Sequence[UnitSource],
    settings: HarvestSettings,
    part: HarvestPart | None,
    scratch: Path,
) -> list[SourceKeepers]:
    """Keepers, empty or with what a part holds."""
    device = model.embed.weight.device
    keepers = [SourceKeepers(source, settings, device, scratch) for source in sources]
    if part is not None:
        for place, kept in enumerate(keepers):
            kept.load(partial(_state, part, place))
    return keepers


def _state(part: HarvestPart, place: int, start: str) -> State:
    return part.state(f"{place}/{start}")


def _save(
    folder: Path,
    keys: list[dict[str, Any]],
    sources: Sequence[UnitSource],
    keepers: Sequence[SourceKeepers],
    documents: range,
    following: Row | None,
    n_tokens: int,
) -> None:
    """Everything held, and where the pass goes on (None: nowhere)."""
    state = {
        f"{place}/{key}": held for place, kept in enumerate(keepers) for key, held in kept.state().items()
    }
    progress = Progress(
        first_document=documents.start,
        last_document=documents.stop,
        next_document=documents.stop if following is None else following.document,
        next_start=0 if following is None else following.start,
        n_tokens=n_tokens,
        is_complete=following is None,
    )
    HarvestPart.write(folder, {"sources": keys}, progress, state)


def _finish(
    model: Transformer,
    corpus: Corpus,
    sources: Sequence[UnitSource],
    keepers: list[SourceKeepers],
    n_tokens: int,
    folder: Path,
    settings: HarvestSettings,
    keys: list[dict[str, Any]],
    progress: bool,
) -> dict[str, LayerHarvest]:
    """Write what is kept of every source, each leaving memory when it is on disk; then read again what they want for
    their near misses. All are harvests at once."""
    _require_enough(corpus, keepers, n_tokens)
    unfinished = [
        write_kept(folder / source.name, source, keepers.pop(0), model, corpus, settings, n_tokens)
        for source in sources
    ]
    part = _part_folder(folder, keys)
    readings = [each.reading for each in unfinished]
    read_again(model, corpus, readings, settings, part / _NEAR, {"sources": keys}, progress)
    for each in unfinished:
        each.write_near()
    done = {
        source.name: each.complete(key) for source, each, key in zip(sources, unfinished, keys, strict=True)
    }
    _tidy(part)
    return done


def _part_folder(folder: Path, keys: list[dict[str, Any]]) -> Path:
    """Where a pass over these sources leaves what it holds."""
    digest = hashlib.blake2b(json.dumps(keys).encode(), digest_size=6).hexdigest()
    return folder / "parts" / digest


def _require_enough(corpus: Corpus, keepers: Sequence[SourceKeepers], n_tokens: int) -> None:
    """Every part needs windows, or nothing can be fitted or scored."""
    samples = keepers[0].ranges[0].random if keepers else []
    sizes = [int((sample.place >= 0).sum()) for sample in samples]
    if not sizes or min(sizes) < MINIMUM_WINDOWS:
        held = ", ".join(f"{name} {size}" for name, size in zip(SPLITS, sizes, strict=False)) or "none"
        raise RequestError(
            f"the corpus {corpus.name} is too small: its {n_tokens} tokens make these windows: {held}; every "
            f"part needs at least {MINIMUM_WINDOWS}, so give more text (about 5,000 tokens do)"
        )


def _tidy(folder: Path) -> None:
    """Delete the parts of a finished pass, and the folders that are empty then."""
    for place in (folder / _NEAR, folder):
        HarvestPart.clear(place)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


def _key(fingerprint: str, corpus: Corpus, source: UnitSource, settings: HarvestSettings) -> dict[str, Any]:
    """What a harvest depends on, as JSON gives it back."""
    plain = settings.plain()
    shape = plain.pop("shape")
    own = {"version": FORMAT_VERSION, "model": fingerprint, "corpus": corpus.fingerprint}
    return {**own, **source.key(), "shape": shape, **plain}
