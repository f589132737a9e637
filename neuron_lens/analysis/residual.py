"""Arithmetic of the residual stream's parts: what heads and neurons add, the norm applied to parts, and whether parts
add up.

The stream is a sum of what each part wrote. A norm with its divisor held at the value of the whole is linear, so it
applies to each part (Elhage et al. 2021; nostalgebraist's logit lens recomputes it instead).
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["check_sum", "head_results", "neuron_results", "norm_of_part", "relative_error", "tolerance_for"]


def head_results(z: Tensor, W_O: Tensor) -> Tensor:
    """What each head writes, without the output bias.

    z: [..., head, d_head]. W_O: [head, d_head, d_model]. Returns [..., head, d_model].
    """
    return torch.einsum("...he,hed->...hd", z, W_O)


def neuron_results(post: Tensor, W_out: Tensor, directions: Tensor | None = None) -> Tensor:
    """What each neuron writes: its activation times its row of W_out.

    post: [..., neuron]. W_out: [neuron, d_model]. directions: dot with these instead, [d_model] or [d_model, out].
    Returns [..., neuron, d_model], or [..., neuron] or [..., neuron, out].
    """
    if directions is None:
        return post[..., None] * W_out
    projected = W_out @ directions
    return post * projected if projected.dim() == 1 else post[..., None] * projected


def norm_of_part(part: Tensor, scale: Tensor, *, centre: bool, weight: Tensor | None = None) -> Tensor:
    """A part of the stream as a norm passes it on, with the norm's divisor held at `scale`; without its bias.

    part: [..., d_model]. scale: [..., 1]. centre: a layer norm, which takes the mean away. weight: [d_model].
    """
    if centre:
        part = part - part.mean(-1, keepdim=True)
    normalised = part / scale
    return normalised if weight is None else normalised * weight


def relative_error(parts: Tensor, whole: Tensor) -> float:
    """Largest difference between the sum of parts and the whole, relative to the largest entry of the whole.

    parts: [component, ...]. whole: [...].
    """
    total = parts.double().sum(0)
    largest = float(whole.detach().abs().max()) if whole.numel() else 0.0
    difference = float((total - whole.double()).detach().abs().max()) if whole.numel() else 0.0
    return difference / max(largest, torch.finfo(torch.float32).tiny)


def tolerance_for(dtype: torch.dtype, components: int) -> float:
    """How far rounding alone may carry a sum of this many components: it grows with their number."""
    return 64 * torch.finfo(dtype).eps * max(components, 8) ** 0.5


def check_sum(parts: Tensor, whole: Tensor, what: str, tolerance: float | None = None) -> float:
    """The relative error of a decomposition. Raises RequestError past the tolerance (None: that of the dtype)."""
    error = relative_error(parts, whole)
    allowed = tolerance_for(whole.dtype, parts.shape[0]) if tolerance is None else tolerance
    if not error <= allowed:
        raise RequestError(
            f"{what} does not add up to the stream: relative error {error:.2g}, tolerance {allowed:.2g}. Was the stream "
            "itself edited by a hook, or do the weights differ from those the cache was made with?"
        )
    return error
