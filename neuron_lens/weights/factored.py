"""A low-rank matrix kept as its two factors.

The product A B is [..., l, r] with an inner width m that is often far smaller (a head's W_Q W_Kᵀ is d_model × d_model of
rank d_head). Singular values, eigenvalues, norms and products with others are computed from the m-sized parts.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["FactoredMatrix"]


class FactoredMatrix:
    """A [..., l, m] times B [..., m, r], not multiplied out.

    Leading dimensions broadcast. `@` with a matrix or another FactoredMatrix stays factored, with a vector gives a
    vector. The factors are not edited: results that are cached (`svd`) stay true.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        if A.dim() < 2 or B.dim() < 2 or A.shape[-1] != B.shape[-2]:
            raise RequestError(
                f"the factors do not fit: A is {list(A.shape)} and B is {list(B.shape)}; "
                "expected [..., l, m] and [..., m, r]"
            )
        try:
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except RuntimeError as error:
            raise RequestError(
                f"leading dimensions of A {list(A.shape)} and B {list(B.shape)} do not broadcast"
            ) from error
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.has_leading_dims = bool(leading)
        self.shape = torch.Size([*leading, self.ldim, self.rdim])

    @property
    def AB(self) -> Tensor:
        """The product itself, [..., l, r]."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:
        """The product in the other order, [..., m, m] (needs l = r); it has the same non-zero eigenvalues."""
        if self.ldim != self.rdim:
            raise RequestError(f"BA needs a square matrix; this one is {self.ldim} x {self.rdim}")
        return self.B @ self.A

    @property
    def T(self) -> FactoredMatrix:
        """The transpose of the last two dimensions."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @property
    def ndim(self) -> int:
        """Dimensions of the product."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.A, self.B

    def __matmul__(self, other: Tensor | FactoredMatrix) -> Tensor | FactoredMatrix:
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.shape[-1 if other.dim() == 1 else -2] != self.rdim:
            raise RequestError(f"cannot multiply {list(self.shape)} with {list(other.shape)}")
        if other.dim() == 1:
            return (self.A @ (self.B @ other).unsqueeze(-1)).squeeze(-1)
        # the smaller of the two products becomes the new inner factor
        if self.rdim > self.mdim:
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Tensor) -> Tensor | FactoredMatrix:
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.shape[-1] != self.ldim:
            raise RequestError(f"cannot multiply {list(other.shape)} with {list(self.shape)}")
        if other.dim() == 1:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        if self.ldim > self.mdim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: float | Tensor) -> FactoredMatrix:
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise RequestError(f"only scalars multiply a FactoredMatrix; got a tensor {list(scalar.shape)}")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        # SVD of each factor, then of the small matrix between them
        left, left_scale, left_inner = torch.linalg.svd(self.A, full_matrices=False)
        right_inner, right_scale, right = torch.linalg.svd(self.B, full_matrices=False)
        middle = (left_scale[..., None] * left_inner) @ (right_inner * right_scale[..., None, :])
        u, s, vh = torch.linalg.svd(middle, full_matrices=False)
        return left @ u, s, (vh @ right).mT

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [..., l, k], S [..., k], V [..., r, k] with U diag(S) Vᵀ the product and k = min(l, m, r). Cached."""
        return self._svd

    @property
    def U(self) -> Tensor:
        """Left singular vectors as columns, [..., l, k]."""
        return self._svd[0]

    @property
    def S(self) -> Tensor:
        """Singular values, largest first, [..., k]."""
        return self._svd[1]

    @property
    def V(self) -> Tensor:
        """Right singular vectors as columns, [..., r, k]."""
        return self._svd[2]

    @property
    def Vh(self) -> Tensor:
        """The same as `V`: the classic interface gave V under this name. Prefer `V`."""
        return self._svd[2]

    @property
    def eigenvalues(self) -> Tensor:
        """The eigenvalues that can be non-zero: those of BA, complex, [..., m]."""
        return torch.linalg.eig(self.BA).eigenvalues

    def norm(self) -> Tensor:
        """Frobenius norm, from the singular values. [...]"""
        return self.S.square().sum(-1).sqrt()

    def make_even(self) -> FactoredMatrix:
        """The same product with the singular values shared evenly: U sqrt(S) and sqrt(S) Vᵀ."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., :, None] * self.V.mT)

    def collapse_l(self) -> Tensor:
        """diag(S) Vᵀ, [..., k, r]: the product up to a rotation on the left."""
        return self.S[..., :, None] * self.V.mT

    def collapse_r(self) -> Tensor:
        """U diag(S), [..., l, k]: the product up to a rotation on the right."""
        return self.U * self.S[..., None, :]

    def unsqueeze(self, k: int) -> FactoredMatrix:
        """A new leading dimension of length 1 at `k`."""
        return FactoredMatrix(self.A.unsqueeze(k), self.B.unsqueeze(k))

    def get_corner(self, n: int = 3) -> Tensor:
        """The first n rows and columns of the product (and n of every leading dimension)."""
        leading = tuple(slice(n) for _ in self.shape[:-2])
        return self.A[(*leading, slice(n))] @ self.B[(*leading, slice(None), slice(n))]

    def __getitem__(self, index: Any) -> FactoredMatrix:
        """Index leading dimensions, then rows and columns. Rows and columns indexed by an int are kept, of length 1."""
        parts = index if isinstance(index, tuple) else (index,)
        leading = len(self.shape) - 2
        parts = _without_ellipsis(parts, len(self.shape))
        used = sum(part is not None for part in parts)
        if used > len(self.shape):
            raise RequestError(f"{used} indices for a FactoredMatrix of {len(self.shape)} dimensions")
        if used <= leading:
            return FactoredMatrix(self.A[parts], self.B[parts])
        first = parts[: leading + sum(part is None for part in parts[:leading])]
        rows, columns = (*parts[len(first) :], slice(None))[:2]
        return FactoredMatrix(self.A[first][..., _kept(rows), :], self.B[first][..., _kept(columns)])

    def __repr__(self) -> str:
        return f"FactoredMatrix: shape {tuple(self.shape)}, inner width {self.mdim}"


def _kept(part: Any) -> Any:
    """An int index as a slice of length 1."""
    if not isinstance(part, int):
        return part
    return slice(part, part + 1 if part != -1 else None)


def _without_ellipsis(parts: tuple[Any, ...], ndim: int) -> tuple[Any, ...]:
    if not any(part is Ellipsis for part in parts):
        return parts
    at = next(i for i, part in enumerate(parts) if part is Ellipsis)
    missing = ndim - sum(part is not None for part in parts) + 1
    return (*parts[:at], *[slice(None)] * missing, *parts[at + 1 :])
