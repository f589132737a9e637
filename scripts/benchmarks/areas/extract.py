"""HookedModel: the stream of every layer at the last token over a data set, against the forward passes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, tokens_of, write_gpt2

TARGETS = {"forward": "at most 1.05", "forward, last logits": "at most 1.05"}


def cases(tiny: bool) -> list[Case]:
    """A data set of prompts in batches."""
    model, prompts, pos, batch = (TINY, 8, 8, 4) if tiny else (SMALL, 256, 64, 16)
    return [
        Case(
            f"{prompts} x {pos}",
            {"model": model, "prompts": prompts, "pos": pos, "batch": batch},
            tolerance=1e-4,
        )
    ]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours, and the engine's forward with all logits and with the last ones only, in the same process."""
    return [
        Peer("neuron_lens", _extracting),
        Peer("forward", _forward(None), process="neuron_lens"),
        Peer("forward, last logits", _forward(-1), process="neuron_lens"),
    ]


def _batches(case: Case) -> list[Any]:
    sizes = case.sizes
    return list(tokens_of(sizes["model"], sizes["prompts"], sizes["pos"]).split(sizes["batch"]))


def _extracting(case: Case, folder: Path) -> Callable[[], Any]:
    from neuron_lens.faces.hooked_model import ExtractionConfig, HookedModel

    model, batches = HookedModel(open_ours(folder)), _batches(case)
    config = ExtractionConfig(extract_resid_out=True)
    return lambda: model.extract_cache(batches, ["last"], config)["logits"][:, 0]


def _forward(logits_at: int | None) -> Callable[[Case, Path], Callable[[], Any]]:
    def build(case: Case, folder: Path) -> Callable[[], Any]:
        import torch

        model, batches = open_ours(folder), _batches(case)

        def run() -> Any:
            return torch.cat([model(batch, logits_at=logits_at)[:, -1] for batch in batches])

        return torch.no_grad()(run)

    return build
