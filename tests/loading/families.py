"""Tiny random models of every family, saved by transformers: what the loading code is held to.

A case is a family (a file of model_defs/) and the settings of one shape, a row of families.json. Weights are made
strong, norms and biases too, so that a part read wrongly shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# what most shapes share, under the names of GPT-2 and under those of nearly all others
_OLD = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 61, "n_positions": 64}
_PLAIN = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_GATED = {**_PLAIN, "intermediate_size": 72}
_SIZES = {"old": _OLD, "plain": _PLAIN, "gated": _GATED, "own": {}}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of a family. shard: split the file at this size. dtype: of the saved weights."""

    family: str
    about: str
    model_type: str
    settings: dict[str, Any] = field(hash=False)
    shard: str | None = None
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.family}-{self.about.replace(' ', '-')}"

    def config(self) -> Any:
        """The configuration object of transformers."""
        from transformers import AutoConfig

        return AutoConfig.for_model(self.model_type, **self.settings)

    def model(self) -> Any:
        """The model of transformers, with strong random weights."""
        from transformers import AutoModelForCausalLM

        with quiet():
            model = AutoModelForCausalLM.from_config(self.config(), attn_implementation="eager").eval()
        generator = torch.Generator().manual_seed(len(str(self)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.to(self.dtype)

    def save(self, folder: Path) -> Path:
        """Save the model as transformers does; returns the folder."""
        with quiet():
            self.model().save_pretrained(folder, **({"max_shard_size": self.shard} if self.shard else {}))
        return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and advice of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _read_cases() -> list[Case]:
    rows = json.loads(Path(__file__).with_name("families.json").read_text(encoding="utf-8"))
    for row in rows:
        row["settings"] = {**_SIZES[row.pop("sizes", "own")], **row["settings"]}
        row["dtype"] = getattr(torch, row.get("dtype", "float32"))
    return [Case(**row) for row in rows]


CASES = _read_cases()
