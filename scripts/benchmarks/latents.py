"""The latents of one random autoencoder as Delphi's files, written by Delphi and by neuron_lens.

Delphi's side is its own from end to end: the model as its command opens it, sparsify's encoder, its cache. It reads
sparsify's format, and so do we.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.area import Case
from benchmarks.gpt2 import open_ours, tokens_of

__all__ = [
    "cached_by_delphi",
    "hookpoint",
    "layer_of",
    "open_autoencoder",
    "rows_of",
    "saved_by_delphi",
    "saved_by_us",
    "write_autoencoder",
]

_SPLITS = 5  # Delphi's default
_DOUBT = 2e-4  # of a standard deviation of pre-activations, far above the rounding of either forward


def layer_of(case: Case) -> int:
    """The layer whose residual stream is encoded: the middle one."""
    return int(case.sizes["model"]["n_layer"]) // 2


def hookpoint(case: Case) -> str:
    """The module whose output is encoded."""
    return f"h.{layer_of(case)}"


def rows_of(case: Case) -> Any:
    """Rows of ids `[row, pos]`: all batches."""
    sizes = case.sizes
    return tokens_of(sizes["model"], sizes["rows"] * sizes["batches"], 4 * sizes["length"])


def write_autoencoder(case: Case, folder: Path) -> None:
    """Write a top-k autoencoder in sparsify's format to `sae/<hookpoint>`, and which tokens leave no doubt.

    Its bias is the mean activation, so that no latent is on everywhere. A token is in doubt where its last latent and
    the next are closer than rounding, so that two right forwards may choose differently: those are not compared.
    """
    import torch
    from safetensors.torch import save_file

    from neuron_lens.hooks import TransformerHooks

    model, ids, k = open_ours(folder), rows_of(case), case.sizes["k"]
    hooks = TransformerHooks()
    recording = hooks.record("resid.torso.post_mlp")
    with torch.inference_mode():
        model(ids, hooks=hooks, stop_at_layer=layer_of(case) + 1)
    x = recording["resid.torso.post_mlp", layer_of(case)].flatten(0, 1).clone()
    directions = torch.randn(case.sizes["d_latent"], x.shape[1], generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=1, keepdim=True)
    weights = {
        "encoder.weight": directions,
        "encoder.bias": torch.zeros(len(directions)),
        "W_dec": directions.clone(),
        "b_dec": x.mean(0),
    }
    target = folder / "sae" / hookpoint(case)
    target.mkdir(parents=True)
    save_file(weights, target / "sae.safetensors")
    config = {"k": k, "num_latents": len(directions), "expansion_factor": 0, "d_in": x.shape[1]}
    (target / "cfg.json").write_text(json.dumps(config))
    pre_activations = (x - weights["b_dec"]).split(256)
    gaps = [(part @ directions.T).topk(k + 1).values[:, -2:].diff().neg()[:, 0] for part in pre_activations]
    scale = (x - weights["b_dec"]).norm(dim=1).mean() / x.shape[1] ** 0.5
    clear = (torch.cat(gaps) > _DOUBT * scale).reshape(ids.shape)
    save_file({"clear": clear}, folder / "clear.safetensors")


def open_autoencoder(case: Case, folder: Path) -> Any:
    """The autoencoder in neuron_lens."""
    from neuron_lens.autoencoders import load_autoencoder

    return load_autoencoder(folder / "sae" / hookpoint(case))


def saved_by_us(case: Case, folder: Path) -> Callable[[], Any]:
    """`write_delphi_cache` of all rows."""
    from neuron_lens.harvest.corpus import Row
    from neuron_lens.harvest.delphi_cache import write_delphi_cache

    model, autoencoder = open_ours(folder), open_autoencoder(case, folder)
    model.tokenizer = SimpleNamespace(adds_bos=False, bos_id=None)  # rows are ids already
    rows = [Row(i, 0, 0, ids, 0) for i, ids in enumerate(rows_of(case).numpy().astype("int32"))]
    corpus: Any = SimpleNamespace(name="ids", rows=lambda tokenizer, shape: iter(rows))
    options = {"context": 4 * case.sizes["length"], "n_splits": _SPLITS, "batch_rows": case.sizes["rows"]}

    def save() -> Path:
        return write_delphi_cache(
            model, autoencoder, corpus, folder / "ours", model_name="gpt2", progress=False, **options
        ).folder

    return _checked_once(save, folder)


def cached_by_delphi(case: Case, folder: Path) -> Callable[[], Any]:
    """`LatentCache.run` of all rows: places and activations in memory."""
    run, module = _delphi(case, folder), hookpoint(case)

    def cached() -> Any:
        held = run().cache
        return [held.latent_locations[module], held.latent_activations[module]]

    return cached


def saved_by_delphi(case: Case, folder: Path) -> Callable[[], Any]:
    """As `cached_by_delphi`, then `save_splits` and `save_config`."""
    from delphi.config import CacheConfig

    run = _delphi(case, folder)

    def save() -> Path:
        cache = run()
        cache.save_splits(_SPLITS, folder / "delphi")
        cache.save_config(folder / "delphi", CacheConfig(), "gpt2")
        return folder / "delphi" / hookpoint(case)

    return _checked_once(save, folder)


def _delphi(case: Case, folder: Path) -> Callable[[], Any]:
    """`LatentCache.run` of all rows, then the cache. It runs the whole model, whichever layer is encoded."""
    from delphi.latents import LatentCache
    from delphi.sparse_coders.load_sparsify import load_sparsify_hooks
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    encoders, transcode = load_sparsify_hooks(model, str(folder / "sae"), [hookpoint(case)])
    ids = rows_of(case)

    def run() -> Any:
        cache = LatentCache(model, encoders, batch_size=case.sizes["rows"], transcode=transcode)
        cache.run(ids.numel(), ids)
        return cache

    return run


def _checked_once(save: Callable[[], Path], folder: Path) -> Callable[[], Any]:
    """The first call, which is not timed, returns what the files hold besides writing them."""
    checked = False

    def run() -> Any:
        nonlocal checked
        written = save()
        if checked:
            return None
        checked = True
        return _content(written, folder)

    return run


def _content(module: Path, folder: Path) -> dict[str, Any]:
    """Tokens, activations in order of row, position and latent, and a digest of those places: equal or far apart."""
    import numpy
    import torch
    from safetensors.numpy import load_file

    clear = load_file(folder / "clear.safetensors")["clear"]
    places, activations, tokens = [], [], []
    for path in sorted(module.glob("*.safetensors")):
        held = load_file(path)
        place = held["locations"].astype(numpy.int64)
        place[:, 2] += int(path.stem.split("_")[0])
        places.append(place)
        activations.append(held["activations"])
        tokens.append(held["tokens"])
    place, activation = numpy.concatenate(places), numpy.concatenate(activations)
    kept = clear[place[:, 0], place[:, 1]]
    place, activation = place[kept], activation[kept]
    order = numpy.lexsort((place[:, 2], place[:, 1], place[:, 0]))
    digest = hashlib.blake2b(place[order].tobytes(), digest_size=32).digest()
    return {
        "activations": torch.from_numpy(activation[order].astype("float32")),
        "places": torch.tensor(list(digest)),
        "tokens": torch.from_numpy(tokens[0]),
    }
