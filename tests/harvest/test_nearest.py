"""The nearest units are those a comparison of all pairs finds, however they are sought."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neuron_lens.harvest import nearest
from neuron_lens.harvest.nearest import nearest_units

N_TOKENS, N_UNITS, COUNT = 400, 60, 4


def _activations(silent: int) -> torch.Tensor:
    """Ranked activations of units with common causes; the first few are never active."""
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(N_TOKENS, 5, generator=generator) @ torch.randn(5, N_UNITS, generator=generator)
    drawn = causes + torch.randn(N_TOKENS, N_UNITS, generator=generator)
    drawn[:, :silent] = -torch.inf
    values, units = drawn.topk(6, dim=1)
    return torch.zeros(N_TOKENS, N_UNITS).scatter_(1, units, values.clamp(min=0)).half()


def _sampled(matrix: torch.Tensor, is_sparse: bool) -> Any:
    threshold = 0.25 * matrix.float().amax(0).numpy()
    held = matrix.float().to_sparse_coo().coalesce() if is_sparse else matrix
    return SimpleNamespace(matrix=held, threshold=threshold)


@pytest.mark.parametrize("is_sparse", [True, False])
@pytest.mark.parametrize("silent", [0, 20])
@pytest.mark.parametrize("at_once", [1, 2**20])
def test_nearest_units_are_those_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch, is_sparse: bool, silent: int, at_once: int
) -> None:
    monkeypatch.setattr(nearest, "_PAIRS", at_once)
    monkeypatch.setattr(nearest, "_COMPARED", at_once)
    matrix = _activations(silent)
    written = torch.randn(N_UNITS, 8, generator=torch.Generator().manual_seed(1))
    found = nearest_units(_sampled(matrix, is_sparse), written, COUNT)
    own = matrix.double().numpy()
    alive = own.std(0) > 0
    pearson = np.zeros((N_UNITS, N_UNITS))
    pearson[np.ix_(alive, alive)] = np.corrcoef(own[:, alive].T)
    rows = (written / written.norm(dim=1, keepdim=True)).double().numpy()
    cosine = rows @ rows.T
    ranked = np.where(alive[:, None] & alive, pearson, 1e-3 * cosine)
    np.fill_diagonal(ranked, -np.inf)
    expected = np.argsort(-ranked, axis=1)[:, :COUNT]
    assert np.array_equal(found["nearest.unit"], expected)
    fires = own > 0.25 * own.max(0)
    both = (fires[:, :, None] & fires[:, None]).sum(0)
    jaccard = both / np.maximum(fires.sum(0)[:, None] + fires.sum(0) - both, 1)
    for name, all_pairs in (("pearson", pearson), ("cosine", cosine), ("jaccard", jaccard)):
        assert np.allclose(found[f"nearest.{name}"], np.take_along_axis(all_pairs, expected, 1), atol=1e-5)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_units_without_directions_are_compared_by_correlation_alone(is_sparse: bool) -> None:
    matrix = _activations(3)
    before = matrix.clone()
    found = nearest_units(_sampled(matrix, is_sparse), None, COUNT)
    assert set(found) == {"nearest.unit", "nearest.pearson", "nearest.jaccard"}
    assert (found["nearest.unit"] != np.arange(N_UNITS)[:, None]).all()
    assert (found["nearest.pearson"][:3] == 0).all() and torch.equal(matrix, before)
