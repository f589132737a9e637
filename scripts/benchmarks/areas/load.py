"""Opening a checkpoint from safetensors, in time and memory, against transformers.

The second case also reads every weight once, since a mapped file costs nothing until it is read; the sum of squares that
is compared is of float32 and rough: equality of weights is for the tests of loading.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.area import Case, Peer
from benchmarks.gpt2 import SMALL, TINY, open_ours, open_transformers, write_gpt2

TARGETS = {
    "transformers": "at most 1.0",
    "peak memory": "at most 1.1 × the weights' bytes (GPT-2 small: 475 MiB)",
}
MEASURES_MEMORY = True


def cases(tiny: bool) -> list[Case]:
    """Opening alone, and opening and reading."""
    model = TINY if tiny else SMALL
    return [
        Case("open", {"model": model, "read": False}, tolerance=1e-3),
        Case("open and read every weight", {"model": model, "read": True}, tolerance=1e-3),
    ]


def prepare(case: Case, folder: Path) -> None:
    """Write the model."""
    write_gpt2(case.sizes["model"], folder)


def peers() -> list[Peer]:
    """Ours and transformers."""
    return [
        Peer("neuron_lens", lambda case, folder: _opening(open_ours, case, folder)),
        Peer(
            "transformers",
            lambda case, folder: _opening(open_transformers, case, folder),
            environment="transformers",
        ),
    ]


def _opening(open_model: Callable[[Path], Any], case: Case, folder: Path) -> Callable[[], Any]:
    import torch

    def run() -> Any:
        model = open_model(folder)
        if not case.sizes["read"]:
            return None
        # norms need no temporary tensors, which would be counted as memory of loading
        norms = [torch.linalg.vector_norm(parameter.detach()) for parameter in model.parameters()]
        return torch.stack(norms).square().sum()

    return run
