"""A FactoredMatrix behaves as its product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.weights import FactoredMatrix

SIZES = st.integers(1, 5)


def close(given: object, expected: Tensor) -> None:
    product = given.AB if isinstance(given, FactoredMatrix) else given
    assert isinstance(product, Tensor) and product.shape == expected.shape
    assert torch.allclose(product, expected, atol=1e-9)


def make(leading: list[int], left: int, inner: int, right: int) -> FactoredMatrix:
    torch.manual_seed(left * 100 + inner * 10 + right)
    return FactoredMatrix(
        torch.randn(*leading, left, inner, dtype=torch.float64),
        torch.randn(*leading, inner, right, dtype=torch.float64),
    )


@given(st.lists(st.integers(1, 3), max_size=2), SIZES, SIZES, SIZES)
def test_algebra(leading: list[int], left: int, inner: int, right: int) -> None:
    matrix = make(leading, left, inner, right)
    full = matrix.AB
    other = torch.randn(*leading, right, 4, dtype=torch.float64)
    vector, row = torch.randn(right, dtype=torch.float64), torch.randn(left, dtype=torch.float64)
    close(matrix @ other, full @ other)
    close(matrix @ FactoredMatrix(other, other.mT), full @ other @ other.mT)
    close(matrix @ vector, full @ vector)
    close(row @ matrix, row @ full)
    close(
        other.mT.new_ones(*leading, 3, left) @ matrix,
        torch.ones(*leading, 3, left, dtype=torch.float64) @ full,
    )
    close(matrix.T, full.mT)
    close(matrix * 3.0, full * 3)
    close(2 * matrix, full * 2)
    assert matrix.shape == full.shape and matrix.ndim == full.dim()


@given(st.lists(st.integers(1, 3), max_size=2), SIZES, SIZES, SIZES)
def test_decompositions(leading: list[int], left: int, inner: int, right: int) -> None:
    matrix = make(leading, left, inner, right)
    full, (u, s, v) = matrix.AB, matrix.svd()
    close(u * s[..., None, :] @ v.mT, full)
    close(matrix.norm(), full.flatten(-2).norm(dim=-1))
    close(matrix.make_even(), full)
    close(matrix.collapse_l().mT @ matrix.collapse_l(), full.mT @ full)
    close(matrix.collapse_r() @ matrix.collapse_r().mT, full @ full.mT)
    if left == right:
        close(matrix.eigenvalues.sum(-1).real, full.diagonal(dim1=-2, dim2=-1).sum(-1))


def test_indexing() -> None:
    matrix = make([3, 2], 4, 2, 5)
    full = matrix.AB
    close(matrix[1], full[1])
    close(matrix[1, 0], full[1, 0])
    close(matrix[:, 1], full[:, 1])
    close(matrix[0, 1, 2], full[0, 1, 2:3])
    close(matrix[0, 1, -1], full[0, 1, 3:])
    close(matrix[0, 1, :, 4], full[0, 1, :, 4:])
    close(matrix[..., 1:3, ::2], full[..., 1:3, ::2])
    close(matrix[None], full[None])
    close(matrix[torch.tensor([2, 0])], full[[2, 0]])
    close(matrix.unsqueeze(0), full[None])
    close(matrix.get_corner(2), full[:2, :2, :2, :2])
    with pytest.raises(RequestError, match="5 indices"):
        matrix[0, 0, 0, 0, 0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(RequestError, match="do not fit"):
        FactoredMatrix(torch.ones(2, 3), torch.ones(2, 3))
    matrix = make([], 2, 1, 3)
    with pytest.raises(RequestError, match="square"):
        _ = matrix.eigenvalues
    with pytest.raises(RequestError, match="cannot multiply"):
        matrix @ torch.ones(2, 2)
