"""Composition of heads from their weights alone (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits")."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.weights import FactoredMatrix

__all__ = ["composition_scores", "pairwise_composition"]


def pairwise_composition(left: FactoredMatrix, right: FactoredMatrix) -> Tensor:
    """‖left right‖ / (‖left‖ ‖right‖) in Frobenius norms, over broadcast leading dimensions. [...]"""
    product = left @ right
    assert isinstance(product, FactoredMatrix), "matrices stay factored"
    return product.norm() / (left.norm() * right.norm())


def composition_scores(writers: FactoredMatrix, readers: FactoredMatrix) -> Tensor:
    """The score of every pair of heads, 0 unless the reader's layer is later. Both [layer, head, d_model, d_model].

    Returns [layer, head, layer, head], the writer first. Computed layer by layer: the pairs do not all fit in memory.
    """
    layers, heads = writers.shape[:2]
    scores = torch.zeros(layers, heads, layers, heads, dtype=writers.A.dtype, device=writers.A.device)
    # norms from the small factors: ‖A B‖² = trace(BᵀAᵀA B), after making the products' factors orthogonal
    left = FactoredMatrix(*_reduced_left(writers))
    right = FactoredMatrix(*_reduced_right(readers))
    for layer in range(layers - 1):
        later = right[layer + 1 :]
        one = left[layer]
        core = one.B[:, None, None] @ later.A[None]  # [head, later, head, d_head, d_head]
        product = one.A[:, None, None] @ core @ later.B[None]
        scores[layer, :, layer + 1 :] = product.flatten(-2).norm(dim=-1)
    norms = writers.norm()[:, :, None, None] * readers.norm()
    return scores / norms


def _reduced_left(matrix: FactoredMatrix) -> tuple[Tensor, Tensor]:
    """The left factor replaced by its small triangular part: the same norms of all products on the right."""
    triangular = torch.linalg.qr(matrix.A).R
    return triangular, matrix.B


def _reduced_right(matrix: FactoredMatrix) -> tuple[Tensor, Tensor]:
    triangular = torch.linalg.qr(matrix.B.mT).R.mT
    return matrix.A, triangular
