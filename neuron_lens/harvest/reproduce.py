"""Do recorded activations reproduce? Some of a harvest's windows go through the model again.

Recorded values are float16, so that they differ from the model's by 2^-11 of their size; batches of other shapes add
rounding of their own. What differs by more than TOLERANCE of the unit's largest activation does not reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.ablation import window_inputs
from neuron_lens.harvest.settings import model_inputs
from neuron_lens.harvest.shard import LayerHarvest
from neuron_lens.harvest.sources import UnitSource
from neuron_lens.hooks import TransformerHooks
from neuron_lens.windows import TextWindows

__all__ = ["TOLERANCE", "Reproduction", "recomputed", "reproduce"]

TOLERANCE = 2e-3


@dataclass(frozen=True)
class Reproduction:
    """How far recorded activations of one source are from the model's: `worst` and where, in shares of the unit's
    largest activation; `n_units` and `n_values` that were compared."""

    source: str
    n_units: int
    n_values: int
    worst: float
    worst_unit: int

    @property
    def passed(self) -> bool:
        """Whether everything reproduced."""
        return self.worst <= TOLERANCE

    def __str__(self) -> str:
        said = "reproduce" if self.passed else "DO NOT REPRODUCE"
        return (
            f"{self.source}: {self.n_values:,} activations of {self.n_units} units {said}: largest difference "
            f"{self.worst:.2g} of the largest activation (unit {self.worst_unit}), tolerance {TOLERANCE:g}"
        )


@torch.inference_mode()
def recomputed(
    source: UnitSource, windows: TextWindows, rows: list[int], indices: list[int]
) -> NDArray[np.float32]:
    """Activations of some units in some windows, from the model: `[unit, window, length]`."""
    model = source.model
    inputs, begins = window_inputs(windows, rows)
    tokens, pad, first = model_inputs(model, inputs)
    hooks = TransformerHooks()
    source.attach(hooks)
    model(tokens, hooks=hooks, pad=pad if pad.any() else None, stop_at_layer=source.layer + 1)
    columns = first + torch.from_numpy(begins)[:, None] + torch.arange(windows.length)
    columns = columns.clamp(max=tokens.shape[1] - 1).to(tokens.device)
    place = torch.arange(len(rows), device=tokens.device)[:, None]

    def cut(x: Tensor) -> Tensor:
        return x[place, columns]

    caught = source.take(cut)
    found = []
    for index in indices:
        column = source.column(index)
        values = caught.columns(column, column + 1)
        found.append((values if caught.is_cut else cut(values))[..., 0].float().cpu().numpy())
    return np.stack(found)


def reproduce(
    source: UnitSource, folder: Path, fingerprint: str, *, n_units: int = 8, n_windows: int = 8, seed: int = 0
) -> Reproduction:
    """Compare units and windows, drawn with a seed, of the harvest of `source` in `folder`.

    Raises RequestError when there is no harvest, or it is of a model with another fingerprint.
    """
    harvest = LayerHarvest.open(folder)
    if harvest is None:
        raise RequestError(f"there is no harvest in {folder} that this version reads; harvest it again")
    if harvest.manifest["key"].get("model") != fingerprint:
        raise RequestError(
            f"{folder} was harvested from another model: its weights or configuration changed since"
        )
    rng = np.random.default_rng(seed)
    units = [int(index) for index in rng.permutation(harvest.indices)[:n_units]]
    worst, worst_unit, n_values = 0.0, units[0], 0
    for index in units:
        kept = harvest.unit(index)
        # The uniform sample, and where the unit is most active.
        listed = [(int(row), kept.random[slot]) for slot, row in enumerate(kept.random_rows)]
        drawn = [listed[place] for place in rng.permutation(len(listed))[:n_windows]]
        drawn += [(int(row), kept.top[slot]) for slot, row in enumerate(kept.top_rows[: n_windows // 2])]
        rows = [row for row, _ in drawn]
        windows = harvest.windows.select(np.array(rows))
        again = recomputed(source, windows, list(range(len(rows))), [index])[0]
        present = windows.present
        recorded = np.stack([values for _, values in drawn])
        scale = max(float(np.abs(kept.moments[4:]).max()), 1e-6)
        difference = float(np.abs(again - recorded)[present].max(initial=0.0)) / scale
        n_values += int(present.sum())
        if difference > worst or not np.isfinite(difference):
            worst, worst_unit = (difference if np.isfinite(difference) else float("inf")), index
    return Reproduction(source.name, len(units), n_values, worst, worst_unit)
