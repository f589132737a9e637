"""Harvesting every neuron of a model, or every latent of an autoencoder: top windows, a uniform sample and figures.

Peers do what they offer on the same rows of ids: SAELens' activation store (its activation runner without the
write) keeps one site's activations and finds nothing in them; Delphi's cache step keeps every activation of the
latents that is not zero. Its files are also written by us, and hold the same before anything is timed. At the
middle layer our forward stops there; Delphi runs the model to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import latents
from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformer_lens, write_gpt2

_FORWARD, _SAELENS = "forward, truncated", "sae-lens activation store, one site"
TARGETS = {_FORWARD: "at most 1.18 (0.85 of its tokens per second) for neurons"}
_NEURONS = ("neuron_lens", _FORWARD, _SAELENS)
_LATENTS = ("neuron_lens", _FORWARD, "delphi, in memory", _SAELENS)
_FILES = ("neuron_lens, Delphi's files", "delphi, saved", "delphi, in memory", _FORWARD)


def cases(tiny: bool) -> list[Case]:
    """All neurons of all layers, in rows of 256 tokens of which 64 are context; all latents at the middle layer, in
    rows without context, as Delphi reads them; each far into a corpus. Then the latents as Delphi's files."""
    if tiny:
        sizes = {"model": TINY, "rows": 4, "batches": 3, "length": 16, "before": 3}
        names = ("tiny", "tiny, latents", "tiny, Delphi's files")
        wide: dict[str, Any] = {**sizes, "d_latent": 256, "k": 4}
    else:
        sizes = {"model": SMALL, "rows": 8, "batches": 1, "length": 64, "before": 48}
        what = "24,576 latents of layer 6, k 32, 8 rows of 256"
        names = (
            "GPT-2 small, 12 x 3072 neurons, 8 rows of 256", f"GPT-2 small, {what}",
            f"GPT-2 small, Delphi's files of {what}",
        )  # fmt: skip
        wide = {**sizes, "d_latent": 24_576, "k": 32}
    return [
        Case(names[0], sizes, peers=_NEURONS),
        Case(names[1], wide, peers=_LATENTS),
        Case(names[2], wide, peers=_FILES, tolerance=2e-2),  # a step of float16
    ]


def prepare(case: Case, folder: Path) -> None:
    """Write the model, and the autoencoder where latents are asked for."""
    write_gpt2(case.sizes["model"], folder)
    if "d_latent" in case.sizes:
        latents.write_autoencoder(case, folder)


def peers() -> list[Peer]:
    """Ours; the same rows through the model, stopped after the last layer read; SAELens on one site; Delphi."""
    return [
        Peer("neuron_lens", _harvesting, checked=False),
        Peer("neuron_lens, Delphi's files", latents.saved_by_us),
        Peer(_FORWARD, _forward, process="neuron_lens", checked=False),
        Peer(_SAELENS, _saelens, environment="sae-lens", checked=False),
        Peer(
            "delphi, in memory",
            latents.cached_by_delphi,
            environment="delphi",
            process="delphi",
            checked=False,
        ),
        Peer("delphi, saved", latents.saved_by_delphi, environment="delphi", process="delphi"),
    ]


def _ids(case: Case) -> list[Any]:
    """Batches of rows of ids [row, 4 x length]."""
    return list(latents.rows_of(case).split(case.sizes["rows"]))


def _harvesting(case: Case, folder: Path) -> Callable[[], Any]:
    """The pass over batches: forward, catch, keep; new text in every call."""
    import torch

    from neuron_lens.harvest.kept import SourceKeepers
    from neuron_lens.hooks import TransformerHooks

    settings, model, batches = _settings(case), open_ours(folder), _ids(case)
    sources, depth = _sources(case, model, folder), _depth(case)
    keepers = [SourceKeepers(source, settings, torch.device("cpu"), folder) for source in sources]
    hooks = TransformerHooks()
    for source in sources:
        source.attach(hooks)
    with torch.inference_mode():
        model(batches[0], hooks=hooks, stop_at_layer=depth)
        for source, kept in zip(sources, keepers, strict=True):
            _read_before(case, source.take(_cutter(batches[0], 0, settings)), batches[0], kept)
    seen = case.sizes["before"]

    @torch.inference_mode()
    def run() -> Any:
        nonlocal seen
        for ids in batches:
            seen += 1
            ids = (ids + 13 * seen) % model.config.d_vocab
            model(ids, hooks=hooks, stop_at_layer=depth)
            cutter = _cutter(ids, seen, settings)
            for source, kept in zip(sources, keepers, strict=True):
                kept.update(source.take(cutter), cutter)
        return torch.tensor(seen)

    return run


def _sources(case: Case, model: Any, folder: Path) -> list[Any]:
    """The neurons of every layer, or the latents."""
    from neuron_lens.harvest.sources import LatentSource, NeuronSource

    if "d_latent" in case.sizes:
        return [LatentSource(model, latents.open_autoencoder(case, folder))]
    return [NeuronSource(model, layer) for layer in range(model.config.n_layers)]


def _depth(case: Case) -> int:
    """How many blocks must run."""
    return latents.layer_of(case) + 1 if "d_latent" in case.sizes else int(case.sizes["model"]["n_layer"])


def _settings(case: Case) -> Any:
    from neuron_lens.harvest.corpus import WindowShape
    from neuron_lens.harvest.settings import HarvestSettings

    length = case.sizes["length"]
    context = 0 if "d_latent" in case.sizes else length
    shape = WindowShape(length=length, context=context, row_length=4 * length)
    return HarvestSettings(shape=shape, random=(192, 48, 48), batch_rows=case.sizes["rows"])


def _cutter(ids: Any, number: int, settings: Any) -> Any:
    """The windows of a batch, its rows dealt to the three parts."""
    from neuron_lens.harvest.corpus import Row
    from neuron_lens.harvest.cutter import Cutter

    shape = settings.shape
    rows = [
        Row(number * 1000 + place, 0, shape.context, row, (number + place) % 3)
        for place, row in enumerate(ids.numpy().astype("int32"))
    ]
    return Cutter(rows, shape.length, 0, 0)


def _read_before(case: Case, caught: Any, ids: Any, kept: Any) -> None:
    """Fill keepers as a long pass has: with the activations of one batch, made stronger or weaker at random in every
    row and unit, so that no two windows are alike."""
    import torch

    from neuron_lens.harvest.sources import Caught

    generator, settings = torch.Generator().manual_seed(0), _settings(case)
    held = caught.columns(0, kept.bounds[-1][1])
    for number in range(case.sizes["before"]):
        strength = torch.randn(len(held), 1, held.shape[-1], generator=generator).mul_(0.1).exp_()
        again = Caught(held * strength)
        again.is_cut = caught.is_cut
        kept.update(again, _cutter(ids, number, settings))


def _forward(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, batches, depth = open_ours(folder), _ids(case), _depth(case)

    @torch.inference_mode()
    def run() -> Any:
        return [model(ids, stop_at_layer=depth)[:, -1] for ids in batches]

    return run


def _saelens(case: Case, folder: Path) -> Callable[[], Any]:
    """`ActivationsStore.get_activations` on transformer-lens, of the last layer's neurons or of what latents read."""
    import torch
    from sae_lens import ActivationsStore

    sizes = case.sizes["model"]
    model = open_transformer_lens(folder)
    batches = _ids(case)
    site, width = f"{sizes['n_layer'] - 1}.mlp.hook_post", 4 * sizes["n_embd"]
    if "d_latent" in case.sizes:
        site, width = f"{latents.layer_of(case)}.hook_resid_post", sizes["n_embd"]
    from datasets import Dataset

    rows = [row.tolist() for ids in batches for row in ids]
    store = ActivationsStore(
        model=model, dataset=Dataset.from_dict({"tokens": rows}), streaming=False,
        hook_name=f"blocks.{site}", hook_head_index=None,
        context_size=len(rows[0]), d_in=width, n_batches_in_buffer=2,
        total_training_tokens=10**6, store_batch_size_prompts=case.sizes["rows"], train_batch_size_tokens=256,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        disable_concat_sequences=False, sequence_separator_token=None,
    )  # fmt: skip
    return torch.no_grad()(lambda: [store.get_activations(ids) for ids in batches])
