"""Activations of whole sites on disk, every token of a corpus, to be read as memory-mapped arrays.

A folder with `manifest.json` and, for each shard n, `<site>.layer<i>-<n>.npy` [token, width] for every site,
`places-<n>.npy` [token, 2] int32, the document and the token's place in it, and `rows-<n>.npy` [row] int32, how
many of the tokens the model read together each time. Shards are whole under their names
before the manifest, renamed over the last one, speaks of them: a pass killed at any moment goes on behind the
last shard and gives the same files.

    store = store_activations(model, corpus, [("resid.torso.post_mlp", 2)], "activations/")
    store.shards("resid.torso.post_mlp", 2)[0]          # numpy.memmap [token, width]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path, write_json_atomic
from neuron_lens.harvest.batches import row_batches
from neuron_lens.harvest.corpus import Corpus, Row, WindowShape
from neuron_lens.harvest.settings import fitting_shape, model_fingerprint, model_inputs
from neuron_lens.harvest.sources.base import require_site
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.windows import SPLITS

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["StoredActivations", "store_activations"]

DENSE_VERSION = 1
_BATCH_ROWS = 16

SiteAt = tuple[str, int]  # path and layer


@dataclass(frozen=True)
class StoredActivations:
    """A folder of dense activations, opened; nothing is read before it is asked for."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: Path | str) -> StoredActivations:
        """Open a folder. Raises RequestError when it holds no finished store, or a shard is missing or of another
        size."""
        manifest = _manifest(Path(folder))
        if manifest is None or not manifest["is_complete"]:
            what = "holds no stored activations" if manifest is None else "is not complete"
            raise RequestError(f"{folder} {what}: run store_activations on it")
        opened = cls(Path(folder), manifest)
        for site, layer in opened.sites:
            sizes = [len(shard) for shard in opened.shards(site, layer)]
            if sizes != manifest["tokens"]:
                raise RequestError(
                    f"{folder}: the shards of {site}, layer {layer} hold {sizes} tokens, the manifest says "
                    f"{manifest['tokens']}; delete the folder and store again"
                )
        return opened

    @classmethod
    def find(cls, folder: Path | str) -> StoredActivations | None:
        """Open a folder; None where nothing is stored yet, or not all of it. Raises RequestError as `open` does."""
        manifest = _manifest(Path(folder))
        return cls.open(folder) if manifest is not None and manifest["is_complete"] else None

    @property
    def sites(self) -> list[SiteAt]:
        """The sites stored, with their layers."""
        return [(site, layer) for site, layer in self.manifest["key"]["sites"]]

    @property
    def n_tokens(self) -> int:
        """Tokens of all shards."""
        return sum(self.manifest["tokens"])

    def __len__(self) -> int:
        return self.n_tokens

    def shards(self, site: str, layer: int) -> list[NDArray[np.floating[Any]]]:
        """The shards of a site, memory-mapped `[token, width]`, in order. Raises RequestError for a site that is
        not stored, or a damaged file."""
        if (site, layer) not in self.sites:
            known = ", ".join(f"{path}, layer {at}" for path, at in self.sites)
            raise RequestError(f"{site}, layer {layer} is not stored in {self.folder}; it has {known}")
        return [
            _mapped(self.folder / _name(site, layer, number))
            for number in range(len(self.manifest["tokens"]))
        ]

    @cached_property
    def places(self) -> NDArray[np.int32]:
        """Document and place in it of every token `[token, 2]`; where the document changes, a new one begins."""
        return self._joined("places")

    @cached_property
    def row_sizes(self) -> NDArray[np.int32]:
        """How many tokens each row of text left `[row]`, in order: rows are what a trainer shuffles."""
        return self._joined("rows")

    def _joined(self, name: str) -> NDArray[np.int32]:
        return np.concatenate(
            [_mapped(self.folder / f"{name}-{number}.npy") for number in range(len(self.manifest["tokens"]))]
        )

    def rows(self, site: str, layer: int, tokens: NDArray[np.int64] | Sequence[int]) -> Tensor:
        """Some tokens' activations `[n, width]` as a tensor, in the order asked for; only they are read."""
        wanted = np.asarray(tokens, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < self.n_tokens:
            raise RequestError(
                f"tokens {wanted.min()} to {wanted.max()} were asked for; there are {self.n_tokens}"
            )
        shards = self.shards(site, layer)
        begins = np.concatenate([[0], np.cumsum(self.manifest["tokens"])])
        which = np.searchsorted(begins, wanted, side="right") - 1
        found = np.empty((len(wanted), shards[0].shape[1]), dtype=shards[0].dtype)
        for number in np.unique(which):
            own = which == number
            found[own] = shards[number][wanted[own] - begins[number]]
        return torch.from_numpy(found)


def store_activations(
    model: Transformer,
    corpus: Corpus,
    sites: Sequence[SiteAt],
    folder: Path | str,
    *,
    split: str | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    shape: WindowShape | None = None,
    seed: int = 0,
    shard_tokens: int = 131_072,
    progress: bool = True,
) -> StoredActivations:
    """Run the corpus through the model once and keep what the sites hold at every token.

    Every token once, with the left context it is harvested with; the beginning-of-sequence token is not among
    them. Called again after it was killed it goes on; called again after it was done it opens what is there.

    Args:
        sites: paths and layers, such as ("resid.torso.post_mlp", 2). Axes behind the position are flattened.
        split: only rows of this part of the corpus ("train", "validation", "test"); None for all.
        shard_tokens: a shard holds at least so many tokens, and is held in memory until it is written.

    Raises:
        RequestError: a site the model does not have, an unknown part or dtype, no text, or a folder that
            holds other activations.
    """
    folder = Path(folder)
    shape = shape or fitting_shape(model)
    key = _key(model, corpus, sites, split, dtype, shape, seed)
    manifest = _manifest(folder)
    if manifest is not None and manifest["key"] != key:
        raise RequestError(
            f"{folder} holds activations of another model, corpus, or choice of sites; give another folder"
        )
    if manifest is None:
        manifest = {"version": DENSE_VERSION, "key": key, "tokens": [], "next": [0, 0], "is_complete": False}
    if not manifest["is_complete"]:
        _run(model, corpus, folder, manifest, shape, shard_tokens, progress)
    if not manifest["tokens"]:
        raise RequestError(f"the corpus {corpus.name} has no text in the part {split!r}; give more text")
    return StoredActivations.open(folder)


def _key(
    model: Transformer,
    corpus: Corpus,
    sites: Sequence[SiteAt],
    split: str | None,
    dtype: str,
    shape: WindowShape,
    seed: int,
) -> dict[str, Any]:
    """What the store depends on; refuses what cannot be stored."""
    if not sites or len(set(sites)) < len(sites):
        raise RequestError(f"name at least one site to store, and each once; got {list(sites)}")
    for site, layer in sites:
        require_site(model, site)
        if not 0 <= layer < model.config.n_layers:
            raise RequestError(
                f"layer {layer} does not exist: the model has layers 0 to {model.config.n_layers - 1}"
            )
    if split is not None and split not in SPLITS:
        raise RequestError(f"there is no part {split!r} of a corpus; expected one of {', '.join(SPLITS)}")
    if dtype not in ("float16", "float32"):
        raise RequestError(f"activations are stored as float16 or float32, not {dtype!r}")
    if model.tokenizer is None:
        raise RequestError(
            "this model has no tokenizer, so no text can be given to it; load one with the model"
        )
    return {
        "model": model_fingerprint(model),
        "corpus": corpus.fingerprint,
        "sites": [list(each) for each in sites],
        "split": split,
        "dtype": dtype,
        "shape": [shape.length, shape.row_length, shape.context],
        "seed": seed,
    }


@torch.inference_mode()
def _run(
    model: Transformer,
    corpus: Corpus,
    folder: Path,
    manifest: dict[str, Any],
    shape: WindowShape,
    shard_tokens: int,
    progress: bool,
) -> None:
    """Write the shards that are missing; `manifest` is kept up to date, here and on disk."""
    key = manifest["key"]
    sites: list[SiteAt] = [(site, layer) for site, layer in key["sites"]]
    caught: dict[SiteAt, Tensor] = {}
    hooks = TransformerHooks()
    for at in sites:
        hooks.append_to_path(f"{at[0]}.fwd", AtLayers(at[1]).append(_catching(caught, at)))
    wanted = None if key["split"] is None else SPLITS.index(key["split"])
    begin = (int(manifest["next"][0]), int(manifest["next"][1]))
    rows = corpus.rows(model.tokenizer, shape, key["seed"], begin=begin)
    chosen = (row for row in rows if wanted is None or row.split == wanted)
    held: dict[SiteAt, list[NDArray[Any]]] = {at: [] for at in sites}
    places: list[NDArray[np.int32]] = []
    with tqdm(initial=sum(manifest["tokens"]), unit=" tokens", unit_scale=True, disable=not progress) as bar:
        for batch, following in row_batches(chosen, _BATCH_ROWS):
            tokens, pad, first = model_inputs(model, [row.ids for row in batch])
            stop = max(layer for _, layer in sites) + 1
            model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=stop)
            places += [_places(row) for row in batch]
            for at in sites:
                x = caught.pop(at).flatten(2)
                kept = [x[i, first + row.keep_from : first + len(row.ids)] for i, row in enumerate(batch)]
                held[at].append(torch.cat(kept).to(getattr(torch, key["dtype"])).cpu().numpy())
            bar.update(sum(len(row.ids) - row.keep_from for row in batch))
            if following is None or sum(map(len, places)) >= shard_tokens:
                manifest["next"] = [0, 0] if following is None else [following.document, following.start]
                _write_shard(folder, manifest, held, places)
                held, places = {at: [] for at in sites}, []
    manifest["is_complete"] = bool(manifest["tokens"])
    if manifest["is_complete"]:
        write_json_atomic(folder / "manifest.json", manifest)


def _catching(caught: dict[SiteAt, Tensor], at: SiteAt) -> Any:
    def catch(x: Tensor) -> None:
        caught[at] = x

    return catch


def _places(row: Row) -> NDArray[np.int32]:
    own = np.arange(row.start + row.keep_from, row.start + len(row.ids), dtype=np.int32)
    return np.stack([np.full_like(own, row.document), own], 1)


def _write_shard(
    folder: Path,
    manifest: dict[str, Any],
    held: dict[SiteAt, list[NDArray[Any]]],
    places: list[NDArray[np.int32]],
) -> None:
    number = len(manifest["tokens"])
    arrays = {_name(*at, number): np.concatenate(parts) for at, parts in held.items()}
    arrays[f"places-{number}.npy"] = np.concatenate(places)
    arrays[f"rows-{number}.npy"] = np.array([len(each) for each in places], dtype=np.int32)
    for name, array in arrays.items():
        with atomic_path(folder / name) as temporary, temporary.open("wb") as file:
            np.save(file, array, allow_pickle=False)
    manifest["tokens"].append(int(sum(map(len, places))))
    write_json_atomic(folder / "manifest.json", manifest)


def _name(site: str, layer: int, number: int) -> str:
    return f"{site}.layer{layer}-{number}.npy"


def _manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (
            manifest["version"] != DENSE_VERSION
            or not {"key", "tokens", "next", "is_complete"} <= manifest.keys()
        ):
            raise ValueError("another version or missing fields")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(
            f"{path} is not that of stored activations ({error}); give another folder"
        ) from None
    return manifest


def _mapped(path: Path) -> Any:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise RequestError(f"{path} cannot be read ({error}); delete its folder and store again") from None
