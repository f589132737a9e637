"""One pass of the model over a corpus: rows in batches, hooks that catch the sites, keepers that keep a
little.

The pass stops at the last layer asked for. The catching hook hands the site's own tensor on: nothing is
copied and nothing stays after the batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.harvest.corpus import Corpus, Row, WindowShape, gather_windows
from neuron_lens.harvest.keepers import Moments, TopWindows, UniformSample, WindowBatch
from neuron_lens.harvest.shard import FORMAT_VERSION, LayerHarvest
from neuron_lens.hooks import TransformerHooks
from neuron_lens.windows import SPLITS

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["HarvestSettings", "fitting_shape", "harvest_layers", "model_fingerprint", "model_inputs"]

MINIMUM_WINDOWS = 2  # in every part

_PLACE_STRIDE = 2**32  # a place is document * stride + start


@dataclass(frozen=True, kw_only=True)
class HarvestSettings:
    """What is kept: windows per part (train, validation, test), of the uniform sample and at the top of
    each unit."""

    shape: WindowShape = field(default_factory=WindowShape)
    random: tuple[int, int, int] = (1024, 256, 256)
    top: tuple[int, int, int] = (24, 12, 16)
    seed: int = 0
    site: str = "mlp.post_act"
    batch_rows: int = 16


class _LayerKeepers:
    """Everything kept of one layer."""

    def __init__(self, n_units: int, settings: HarvestSettings, device: torch.device) -> None:
        length = settings.shape.length
        self.moments = Moments()
        self.top = [TopWindows(count, n_units, length, device) for count in settings.top]
        self.random = [UniformSample(count, n_units, length, device) for count in settings.random]

    def update(self, batch: WindowBatch, split: Tensor) -> None:
        """Take a batch in; `split` `[window]` says which part each window belongs to."""
        self.moments.update(batch)
        hidden = ~batch.mask
        masked = (
            batch.activations.masked_fill(hidden[:, :, None], -torch.inf)
            if hidden.any()
            else batch.activations
        )
        largest = masked.amax(1)
        for code in range(len(SPLITS)):
            chosen = (split == code).nonzero()[:, 0]
            if len(chosen):
                part = batch.select(chosen)
                self.top[code].update(part, largest[chosen])
                self.random[code].update(part)


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
    """Harvest layers into `folder/layer<i>`, in one pass; what is there already, of the same content, is
    opened.

    Raises RequestError for layers that do not exist, a model without a tokenizer, or a corpus without tokens.
    """
    settings = settings or HarvestSettings(shape=fitting_shape(model))
    fingerprint = fingerprint or model_fingerprint(model)
    wanted = sorted(set(layers))
    if not wanted or wanted[0] < 0 or wanted[-1] >= model.config.n_layers:
        raise RequestError(
            f"layers {wanted} do not fit a model of {model.config.n_layers} layers, counted from 0"
        )
    if model.tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so no text can be given to it; load one with the model"
        )
    done: dict[int, LayerHarvest] = {}
    for layer in wanted:
        found = LayerHarvest.open(folder / f"layer{layer}", _key(fingerprint, corpus, layer, settings))
        if found is not None:
            done[layer] = found
    missing = [layer for layer in wanted if layer not in done]
    if missing:
        keepers, n_tokens = _pass(model, corpus, missing, settings, progress)
        for layer in missing:
            key = _key(fingerprint, corpus, layer, settings)
            done[layer] = _write(
                folder / f"layer{layer}", keepers.pop(layer), model, corpus, settings, key, n_tokens
            )
    return {layer: done[layer] for layer in wanted}


def model_fingerprint(model: Transformer) -> str:
    """A hash of the config and of every weight."""
    digest = hashlib.blake2b(model.config.model_dump_json().encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fitting_shape(model: Transformer) -> WindowShape:
    """The default shape of windows for a model's context, with room for a beginning-of-sequence token."""
    return WindowShape.fitting(model.config.n_ctx - (_bos_id(model) is not None))


def _bos_id(model: Transformer) -> int | None:
    """The token every text begins with, or None for models that were not trained so."""
    tokenizer = model.tokenizer
    return tokenizer.bos_id if tokenizer is not None and tokenizer.adds_bos else None


def model_inputs(model: Transformer, rows: Sequence[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor, int]:
    """Rows of ids as the model reads them: tokens and padding `[batch, pos]`, and where the rows' own
    tokens begin.

    Models whose tokenizer starts texts with a beginning-of-sequence token get one before every row.
    """
    bos = _bos_id(model)
    first = 0 if bos is None else 1
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), first + longest, dtype=torch.long)
    pad = torch.ones_like(tokens, dtype=torch.bool)
    for place, row in enumerate(rows):
        if bos is not None:
            tokens[place, 0] = bos
        tokens[place, first : first + len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        pad[place, : first + len(row)] = False
    device = model.embed.weight.device
    return tokens.to(device), pad.to(device), first


@torch.inference_mode()
def _pass(
    model: Transformer, corpus: Corpus, layers: Sequence[int], settings: HarvestSettings, progress: bool
) -> tuple[dict[int, _LayerKeepers], int]:
    """Run the corpus through the model once; keepers by layer, and the number of tokens kept."""
    caught: dict[int, Tensor] = {}
    keepers: dict[int, _LayerKeepers] = {}
    chosen = frozenset(layers)

    def catch(x: Tensor, layer: int) -> None:
        if layer in chosen:
            caught[layer] = x

    hooks = TransformerHooks().append_to_path(f"{settings.site}.fwd", catch)
    n_tokens = 0
    rows = corpus.rows(model.tokenizer, settings.shape, settings.seed)
    with tqdm(unit=" tokens", unit_scale=True, desc="harvesting", disable=not progress) as bar:
        for batch in _batches(rows, settings.batch_rows):
            tokens, pad, first = model_inputs(model, [row.ids for row in batch])
            model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=max(layers) + 1)
            cutter = _Cutter(batch, settings, first)
            for layer in layers:
                activations = caught.pop(layer)
                if layer not in keepers:
                    keepers[layer] = _LayerKeepers(activations.shape[-1], settings, activations.device)
                keepers[layer].update(cutter.windows(activations), cutter.split)
            n_tokens += cutter.n_tokens
            bar.update(cutter.n_tokens)
            bar.set_postfix_str(f"document {batch[-1].document + 1}/{corpus.n_documents}", refresh=False)
    _require_enough(corpus, keepers, n_tokens)
    return keepers, n_tokens


def _require_enough(corpus: Corpus, keepers: dict[int, _LayerKeepers], n_tokens: int) -> None:
    """Every part needs windows, or nothing can be fitted or scored."""
    samples = next(iter(keepers.values())).random if keepers else []
    sizes = [int((sample.place >= 0).sum()) for sample in samples]
    if not sizes or min(sizes) < MINIMUM_WINDOWS:
        held = ", ".join(f"{name} {size}" for name, size in zip(SPLITS, sizes, strict=False)) or "none"
        raise RequestError(
            f"the corpus {corpus.name} is too small: its {n_tokens} tokens make these windows: {held}; every "
            f"part needs at least {MINIMUM_WINDOWS}, so give more text (about 5,000 tokens do)"
        )


def _batches(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _Cutter:
    """Cuts the windows out of a batch of rows; the same places for every layer."""

    def __init__(self, rows: Sequence[Row], settings: HarvestSettings, first: int) -> None:
        self._length = settings.shape.length
        row_of, start, present, place, split = [], [], [], [], []
        for index, row in enumerate(rows):
            for begin in range(row.keep_from, len(row.ids), self._length):
                row_of.append(index)
                start.append(first + begin)
                present.append(min(self._length, len(row.ids) - begin))
                place.append(row.document * _PLACE_STRIDE + row.start + begin)
                split.append(row.split)
        self._row_of = torch.tensor(row_of)
        self._columns = torch.tensor(start)[:, None] + torch.arange(self._length)
        self._mask = torch.arange(self._length) < torch.tensor(present)[:, None]
        self._place = torch.tensor(place)
        self._priority = torch.tensor([_priority(one, settings.seed) for one in place])
        self.split = torch.tensor(split)
        self.n_tokens = sum(present)

    def windows(self, activations: Tensor) -> WindowBatch:
        """The windows of a site's tensor `[batch, pos, unit]`."""
        columns = self._columns.clamp(max=activations.shape[1] - 1)
        cut = activations[self._row_of[:, None].to(activations.device), columns.to(activations.device)]
        return WindowBatch(cut, self._mask.to(cut.device), self._place, self._priority)


def _priority(place: int, seed: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # fits a signed integer


def _write(
    folder: Path,
    keepers: _LayerKeepers,
    model: Transformer,
    corpus: Corpus,
    settings: HarvestSettings,
    key: dict[str, Any],
    n_tokens: int,
) -> LayerHarvest:
    """Put one layer's keepers on disk, with the text of all their windows."""
    sampled = [keeper.sorted() for keeper in keepers.random]
    random_places = torch.cat([places for places, _ in sampled]).numpy()
    top_places = torch.cat([keeper.place for keeper in keepers.top]).T.cpu().numpy()
    top_split = [code for code, keeper in enumerate(keepers.top) for _ in range(keeper.count)]
    kept = np.unique(np.concatenate([random_places, top_places[top_places >= 0]]))
    texts = _token_texts(model)
    windows, unlexed = gather_windows(
        corpus,
        model.tokenizer,
        settings.shape,
        {(int(place // _PLACE_STRIDE), int(place % _PLACE_STRIDE)) for place in kept},
        texts,
        settings.seed,
    )
    moments = keepers.moments
    tensors = {
        "random.row": windows.rows_of(random_places // _PLACE_STRIDE, random_places % _PLACE_STRIDE),
        "random.activations": torch.cat([held for _, held in sampled])
        .permute(2, 0, 1)
        .contiguous()
        .cpu()
        .numpy(),
        "top.row": _rows_or_absent(windows, top_places),
        "top.activations": torch.cat([keeper.activations for keeper in keepers.top])
        .transpose(0, 1)
        .contiguous()
        .cpu()
        .numpy(),
        "top.split": np.array(top_split, dtype=np.int32),
        "moments": torch.cat([moments.central(), moments.low.double()[None], moments.high.double()[None]])
        .T.contiguous()
        .cpu()
        .numpy(),
    }
    facts = {"n_tokens": n_tokens, "n_documents": corpus.n_documents, "n_unlexed_documents": unlexed}
    return LayerHarvest.write(folder, windows, tensors, key, facts)


def _rows_or_absent(windows: Any, places: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rows = np.full(places.shape, -1, dtype=np.int32)
    held = places >= 0
    rows[held] = windows.rows_of(places[held] // _PLACE_STRIDE, places[held] % _PLACE_STRIDE)
    return rows


def _token_texts(model: Transformer) -> list[str]:
    """The text of every id of the model's vocabulary; ids beyond the tokenizer's are empty."""
    size = model.tokenizer.vocab_size
    known = [model.tokenizer.token_str(token) for token in range(min(size, model.config.d_vocab))]
    return known + [""] * (model.config.d_vocab - len(known))


def _key(fingerprint: str, corpus: Corpus, layer: int, settings: HarvestSettings) -> dict[str, Any]:
    """What a harvest depends on, as JSON gives it back."""
    plain = asdict(settings)
    plain.pop("batch_rows")
    plain["random"], plain["top"] = list(settings.random), list(settings.top)
    return {
        "version": FORMAT_VERSION,
        "model": fingerprint,
        "corpus": corpus.fingerprint,
        "layer": layer,
        **plain,
    }
