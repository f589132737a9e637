"""HookedModel: the stream of every layer at the last token over a data set, against the forward passes alone.

The forward passes alone are the plain ones, with all logits, and for comparison those that make the last logits only: they skip
most of the last block, which the extraction reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, tokens_of, write_gpt2

TARGETS = {"forward": "at most 1.05 (0.95 of its tokens a second)"}


def cases(tiny: bool) -> list[Case]:
    """A data set of prompts. A call takes the next part of it, in batches, so that a round stays short."""
    model, prompts, pos, part, batch = (TINY, 8, 8, 4, 2) if tiny else (SMALL, 256, 64, 32, 16)
    return [
        Case(
            f"{prompts} x {pos}, {part} a call",
            {"model": model, "prompts": prompts, "pos": pos, "part": part, "batch": batch},
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


def _parts(case: Case) -> Any:
    """The parts of the data set, round and round; each a list of batches."""
    sizes = case.sizes
    tokens = tokens_of(sizes["model"], sizes["prompts"], sizes["pos"])
    return itertools.cycle([part.split(sizes["batch"]) for part in tokens.split(sizes["part"])])


def _extracting(case: Case, folder: Path) -> Callable[[], Any]:
    from neuron_lens.faces.hooked_model import ExtractionConfig, HookedModel

    model, parts = HookedModel(open_ours(folder)), _parts(case)
    config = ExtractionConfig(extract_resid_out=True)
    return lambda: model.extract_cache(next(parts), ["last"], config)["logits"][:, 0]


def _forward(logits_at: int | None) -> Callable[[Case, Path], Callable[[], Any]]:
    def build(case: Case, folder: Path) -> Callable[[], Any]:
        import torch

        model, parts = open_ours(folder), _parts(case)

        def run() -> Any:
            return torch.cat([model(batch, logits_at=logits_at)[:, -1] for batch in next(parts)])

        return torch.no_grad()(run)

    return build
