"""What the strongest directions of a head or an MLP say in the vocabulary (Millidge and Black 2022, "The Singular Value
Decompositions of Transformer Weight Matrices are Highly Interpretable")."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.weights import FactoredMatrix

__all__ = ["unembedded_directions"]


def unembedded_directions(matrix: Tensor | FactoredMatrix, unembedding: Tensor, count: int) -> Tensor:
    """The `count` strongest directions on the side of the stream, unembedded. The signs are arbitrary.

    matrix: [any, d_model]. unembedding: [d_model, d_vocab]. Returns [d_vocab, count].
    """
    directions = (
        matrix.V
        if isinstance(matrix, FactoredMatrix)
        else torch.linalg.svd(matrix.float(), full_matrices=False).Vh.mT
    )
    return (directions[:, :count].float().T @ unembedding.float()).T
