"""Harvesting every neuron of a model: top windows, a uniform sample and figures, against the forward alone.

Peers do what they offer on the same rows of ids: SAELens' activation store (its activation runner without the
write) keeps one site's activations and finds nothing in them. Delphi's cache step is not measured: its package
does not install beside the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformer_lens, tokens_of, write_gpt2

TARGETS = {"forward, truncated": "at most 1.18 (0.85 of its tokens per second)"}


def cases(tiny: bool) -> list[Case]:
    """All neurons of all layers, in rows of 256 tokens of which 64 are context, far into a corpus."""
    if tiny:
        return [Case("tiny", {"model": TINY, "rows": 4, "batches": 3, "length": 16, "before": 3})]
    sizes = {"model": SMALL, "rows": 8, "batches": 1, "length": 64, "before": 48}
    return [Case("GPT-2 small, 12 x 3072 neurons, 8 rows of 256", sizes)]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours; the same rows through the model, stopped after the last block; SAELens on one site."""
    return [
        Peer("neuron_lens", _harvesting, checked=False),
        Peer("forward, truncated", _forward, process="neuron_lens", checked=False),
        Peer("sae-lens activation store, one site", _saelens, environment="sae-lens", checked=False),
    ]


def _ids(case: Case) -> list[Any]:
    """Batches of rows of ids [row, 4 x length]."""
    sizes = case.sizes
    every = tokens_of(sizes["model"], sizes["rows"] * sizes["batches"], 4 * sizes["length"])
    return list(every.split(sizes["rows"]))


def _harvesting(case: Case, folder: Path) -> Callable[[], Any]:
    """The pass over batches: forward, catch, keep; new text in every call."""
    import torch

    from neuron_lens.harvest.kept import SourceKeepers
    from neuron_lens.harvest.sources import NeuronSource
    from neuron_lens.hooks import TransformerHooks

    settings, model, batches = _settings(case), open_ours(folder), _ids(case)
    sources = [NeuronSource(model, layer) for layer in range(model.config.n_layers)]
    keepers = [SourceKeepers(source, settings, torch.device("cpu"), folder) for source in sources]
    _read_before(case, model, batches[0], keepers)
    hooks = TransformerHooks()
    for source in sources:
        source.attach(hooks)
    seen = case.sizes["before"]

    @torch.inference_mode()
    def run() -> Any:
        nonlocal seen
        for ids in batches:
            seen += 1
            ids = (ids + 13 * seen) % model.config.d_vocab
            model(ids, hooks=hooks, stop_at_layer=len(sources))
            cutter = _cutter(ids, seen, settings)
            for source, kept in zip(sources, keepers, strict=True):
                kept.update(source.take(cutter), cutter)
        return torch.tensor(seen)

    return run


def _settings(case: Case) -> Any:
    from neuron_lens.harvest.corpus import WindowShape
    from neuron_lens.harvest.settings import HarvestSettings

    length = case.sizes["length"]
    shape = WindowShape(length=length, context=length, row_length=4 * length)
    return HarvestSettings(shape=shape, random=(192, 48, 48), batch_rows=case.sizes["rows"])


def _cutter(ids: Any, number: int, settings: Any) -> Any:
    """The windows of a batch, its rows dealt to the three parts."""
    from neuron_lens.harvest.corpus import Row
    from neuron_lens.harvest.cutter import Cutter

    length = settings.shape.length
    rows = [
        Row(number * 1000 + place, 0, length, row, (number + place) % 3)
        for place, row in enumerate(ids.numpy().astype("int32"))
    ]
    return Cutter(rows, length, 0, 0)


def _read_before(case: Case, model: Any, ids: Any, keepers: list[Any]) -> None:
    """Fill the keepers as a long pass has: with the activations of one batch, made stronger or weaker at random in
    every row and unit, so that no two windows are alike."""
    import torch

    from neuron_lens.harvest.sources import Caught
    from neuron_lens.hooks import TransformerHooks

    hooks = TransformerHooks()
    recording = hooks.record("mlp.post_act")
    settings = _settings(case)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        model(ids, hooks=hooks, stop_at_layer=len(keepers))
        for layer, kept in enumerate(keepers):
            held = recording["mlp.post_act", layer]
            for number in range(case.sizes["before"]):
                strength = torch.randn(len(held), 1, held.shape[-1], generator=generator).mul_(0.1).exp_()
                kept.update(Caught(held * strength), _cutter(ids, number, settings))


def _forward(case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    model, batches = open_ours(folder), _ids(case)
    n_layers = model.config.n_layers

    @torch.inference_mode()
    def run() -> Any:
        return [model(ids, stop_at_layer=n_layers)[:, -1] for ids in batches]

    return run


def _saelens(case: Case, folder: Path) -> Callable[[], Any]:
    """`ActivationsStore.get_activations` of one layer's neurons, on transformer-lens."""
    import torch
    from sae_lens import ActivationsStore

    sizes = case.sizes["model"]
    model = open_transformer_lens(folder)
    batches = _ids(case)
    from datasets import Dataset

    rows = [row.tolist() for ids in batches for row in ids]
    store = ActivationsStore(
        model=model, dataset=Dataset.from_dict({"tokens": rows}), streaming=False,
        hook_name=f"blocks.{sizes['n_layer'] - 1}.mlp.hook_post", hook_head_index=None,
        context_size=len(rows[0]), d_in=4 * sizes["n_embd"], n_batches_in_buffer=2,
        total_training_tokens=10**6, store_batch_size_prompts=case.sizes["rows"], train_batch_size_tokens=256,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
        disable_concat_sequences=False, sequence_separator_token=None,
    )  # fmt: skip
    return torch.no_grad()(lambda: [store.get_activations(ids) for ids in batches])
