"""Prompts and models that the tests of HookedModel share: one and several rows, both paddings, equal and grouped heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interventions.models import tiny_model
from torch import Tensor

from neuron_lens.faces.hooked_model import HookedModel
from neuron_lens.faces.hooked_model.fields import FIELDS

ROWS = [[3, 9, 1, 14, 7, 20, 2], [5, 11, 8, 2], [6, 1, 19, 4, 13]]
EVERY_FIELD = (*FIELDS, "extract_last_layernorm", "save_input_ids")


def face(family: str = "gpt2") -> HookedModel:
    """A tiny random model: "gpt2" has as many key as query heads and biases, "llama" shares keys and values in groups."""
    return HookedModel(tiny_model(family))


def inputs(case: str) -> Any:
    """Prompts: "one" row, "several" of equal length, or padded on the "left" or "right"."""
    if case == "one":
        return torch.tensor(ROWS[:1])
    if case == "several":
        return torch.tensor([row[:4] for row in ROWS])
    longest = max(map(len, ROWS))
    ids, mask = [], []
    for row in ROWS:
        filler = [0] * (longest - len(row))
        ids.append(filler + row if case == "left" else row + filler)
        real = [1] * len(row)
        mask.append(filler + real if case == "left" else real + filler)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def near(a: Tensor, b: Tensor) -> bool:
    """Equal to rounding."""
    return bool(torch.allclose(a, b, atol=2e-5, rtol=1e-4))


both_families = pytest.mark.parametrize("family", ["gpt2", "llama"])
all_inputs = pytest.mark.parametrize("case", ["one", "several", "left", "right"])
