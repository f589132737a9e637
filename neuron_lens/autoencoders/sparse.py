"""Latents of which few are active: values with indices, and decoding as a weighted sum of decoder rows.

With k of d_latent latents active, the sum reads k rows instead of multiplying with the whole decoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from neuron_lens.errors import RequestError

__all__ = [
    "SparseLatents",
    "batch_topk_of_product",
    "sum_of_rows",
    "topk_of_product",
    "with_selected_gradient",
]


class SparseLatents(NamedTuple):
    """The active latents of each position; indices of one position are distinct.

    A tuple of two tensors, so that it passes through torch.func and torch.compile.
    """

    values: Tensor  # [..., active]
    indices: Tensor  # [..., active], int64, in [0, d_latent)

    def to_dense(self, d_latent: int) -> Tensor:
        """The latents as one tensor [..., d_latent], zero where not listed. Differentiable in `values`."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], d_latent)
        return zeros.scatter(-1, self.indices, self.values)


def sum_of_rows(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Σ_j values[..., j] * rows[indices[..., j]].

    Args:
        values: [..., active], of the dtype of `rows`.
        indices: [..., active], int64.
        rows: [d_latent, d_out].

    Returns:
        [..., d_out]. Differentiable any number of times, forward and backward, in `values` and `rows`; works
        under torch.func and torch.compile.
    """
    if values.shape != indices.shape:
        raise RequestError(f"values {list(values.shape)} and indices {list(indices.shape)} differ in shape")
    if torch.compiler.is_compiling():  # the compiler knows embedding_bag's own gradient, and no custom jvp
        return _bag(values, indices, rows)
    result = _SumOfRows.apply(values, indices, rows)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


def _bag(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    active = values.shape[-1]
    flat = F.embedding_bag(
        indices.reshape(-1, active), rows, per_sample_weights=values.reshape(-1, active), mode="sum"
    )
    return flat.reshape(*values.shape[:-1], rows.shape[-1])


class _SumOfRows(torch.autograd.Function):
    """embedding_bag with a gradient that can itself be differentiated, batched and pushed forward.

    torch's own kernel has neither a second derivative nor forward mode nor a batching rule. The gradients go
    one active latent at a time, so that no [..., active, d_out] tensor is ever made; where nobody will
    differentiate them (the usual backward pass), by faster kernels that cannot be differentiated.
    """

    @staticmethod
    def forward(values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
        return _bag(values, indices, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, indices, rows = ctx.saved_tensors
        if not torch.is_grad_enabled() and not torch._C._functorch.is_functorch_wrapped_tensor(grad):
            return (
                _grad_values(grad, indices, rows) if ctx.needs_input_grad[0] else None,
                None,
                _grad_rows(grad, values, indices, rows) if ctx.needs_input_grad[2] else None,
            )
        each = range(values.shape[-1])
        grad_values = grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_values = torch.stack([(rows[indices[..., j]] * grad).sum(-1) for j in each], dim=-1)
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(rows.dtype, torch.float32)  # thousands of bfloat16 terms would be lost
            grad_rows = torch.zeros_like(rows, dtype=wide)
            for j in each:
                term = (values[..., j, None] * grad).reshape(-1, rows.shape[-1])
                grad_rows = grad_rows.index_add(0, indices[..., j].reshape(-1), term.to(wide))
            grad_rows = grad_rows.to(rows.dtype)
        return grad_values, None, grad_rows

    @staticmethod
    def jvp(ctx: Any, values_t: Tensor | None, _: None, rows_t: Tensor | None) -> Tensor:
        values, indices, rows = ctx.saved_tensors
        parts = []
        if values_t is not None:
            parts.append(sum_of_rows(values_t, indices, rows))
        if rows_t is not None:
            parts.append(sum_of_rows(values, indices, rows_t))
        return sum(parts[1:], start=parts[0])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, indices: Tensor, rows: Tensor
    ) -> tuple[Tensor, int]:
        values, indices = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in ((values, in_dims[0]), (indices, in_dims[1]))
        )
        if in_dims[2] is not None:  # every batch entry has rows of its own: stack them and shift the indices
            rows = rows.movedim(in_dims[2], 0)
            first = torch.arange(info.batch_size, device=rows.device) * rows.shape[1]
            indices = indices + first.reshape(-1, *[1] * (indices.ndim - 1))
            rows = rows.flatten(0, 1)
        return sum_of_rows(values, indices, rows), 0


# Numbers of a product that are ranked at a time. On a CPU 25 MB stay near enough for the ranking to cost next to
# nothing beside the product (1,024 positions, 24,576 latents: 485 ms, the product alone 480, all at once 510).
_PART = 6 * 2**20


def topk_of_product(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of x @ W + b and their indices, without a graph and, on a CPU, never holding the whole product.

    Args:
        x: [..., d_in]. W: [d_in, d_latent]. b: [d_latent].

    Returns:
        values and indices [..., k], in no order.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        flat, W, b = x.reshape(-1, x.shape[-1]).to(dtype), W.to(dtype), b.to(dtype)
        n_parts = max(1, -(-len(flat) * len(b) // _PART)) if kind == "cpu" else 1
        size = max(k, -(-len(b) // n_parts))
        space = flat.new_empty(len(flat) * min(size, len(b)))
        values, indices = [], []
        for first in range(0, len(b), size):
            some = slice(first, min(first + size, len(b)))
            width = some.stop - first
            h = torch.addmm(b[some], flat, W[:, some], out=space[: len(flat) * width].view(len(flat), width))
            best = h.topk(min(k, width), dim=-1, sorted=False)
            values.append(best.values)
            indices.append(best.indices + first)
        found, index = torch.cat(values, -1), torch.cat(indices, -1)
        if len(values) > 1:
            best = found.topk(k, dim=-1, sorted=False)
            found, index = best.values, index.gather(-1, best.indices)
        return found.reshape(*x.shape[:-1], k), index.reshape(*x.shape[:-1], k)


def batch_topk_of_product(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k * batch largest of relu(x @ W + b) over all rows of x [batch, d_in], without a graph.

    Returns:
        values and indices [batch, most], where `most` is what the fullest row needs; zeros behind the others' values.
    """
    count, width = k * len(x), len(b)
    for most in (4 * k, 16 * k, width):  # a row rarely has several times its share
        values, indices = topk_of_product(x, W, b, min(most, width))
        values = values.relu()
        chosen = values.flatten().topk(min(count, values.numel()), sorted=False)
        # complete when no row was cut off above the smallest value that is kept
        if most >= width or bool((values.amin(-1) <= chosen.values.min()).all()):
            break
    kept = torch.zeros_like(values).flatten().scatter(0, chosen.indices, chosen.values).view_as(values)
    fullest = max(1, int((kept > 0).sum(-1).max()))
    best = kept.topk(fullest, dim=-1, sorted=False)
    return best.values, indices.gather(-1, best.indices)


def with_selected_gradient(
    values: Tensor, x: Tensor, indices: Tensor, W_enc: Tensor, b_enc: Tensor
) -> Tensor:
    """`values`, with the gradient of values[i, j] = x[i] @ W_enc[:, indices[i, j]] + b_enc[indices[i, j]].

    For values picked out of a product with all of W_enc that was made without a graph: the gradient then takes
    `active` columns a row instead of two more such products. It can itself not be differentiated.

    Args:
        values: [batch, active]. x: [batch, d_in]. indices: [batch, active], int64.
        W_enc: [d_in, d_latent]; fastest where its transpose is contiguous. b_enc: [d_latent].
    """
    result = _Selected.apply(values, x, indices, W_enc, b_enc)  # type: ignore[no-untyped-call]
    assert isinstance(result, Tensor)
    return result


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, indices: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        ctx.save_for_backward(x, indices, W_enc)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None, Tensor | None, Tensor | None]:
        x, indices, W_enc = ctx.saved_tensors
        grad = grad.to(W_enc.dtype)
        _, needs_x, _, needs_W, needs_b = ctx.needs_input_grad
        by_bias = grad.new_zeros(W_enc.shape[1]) if needs_b else None
        return (
            None,
            _bag(grad, indices, W_enc.T).to(x.dtype) if needs_x else None,
            None,
            _grad_rows(x, grad, indices, W_enc.T).T if needs_W else None,
            None if by_bias is None else by_bias.index_add(0, indices.reshape(-1), grad.reshape(-1)),
        )


_CHUNK = 2**20  # numbers gathered at a time, few enough to stay in a processor's cache


def _grad_values(grad: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """grad · rows[indices[..., j]] for every j [..., active]."""
    active = indices.shape[-1]
    flat, flat_indices = grad.reshape(-1, rows.shape[-1], 1), indices.reshape(-1, active)
    size = max(1, _CHUNK // (active * rows.shape[-1]))
    parts = [
        # index_select copies whole rows, which rows[some] does not
        torch.bmm(rows.index_select(0, some.reshape(-1)).view(len(some), active, -1), each)
        for some, each in zip(flat_indices.split(size), flat.split(size), strict=True)
    ]
    return torch.cat(parts).reshape(indices.shape) if parts else grad.new_zeros(indices.shape)


def _grad_rows(grad: Tensor, values: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """Σ values[i, j] * grad[i] over the (i, j) that chose each row [d_latent, d_out]: one bag for each row."""
    wide = torch.promote_types(rows.dtype, torch.float32)  # thousands of bfloat16 terms would be lost
    order = indices.reshape(-1).argsort()
    counts = torch.bincount(indices.reshape(-1), minlength=len(rows))
    summed = F.embedding_bag(
        order // indices.shape[-1],
        grad.reshape(-1, rows.shape[-1]).to(wide),
        counts.cumsum(0) - counts,
        per_sample_weights=values.reshape(-1)[order].to(wide),
        mode="sum",
    )
    return summed.to(rows.dtype)
