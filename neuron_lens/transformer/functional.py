"""The arithmetic of attention and activations as pure functions, so that there is one copy of each formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "alibi_slopes", "clamped_swiglu", "softcap"]


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2)."""
    return F.gelu(x, approximate="tanh")


def gelu_quick(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)² (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


def solu(x: Tensor) -> Tensor:
    """x · softmax(x) over neurons (Elhage et al. 2022, "Softmax Linear Units")."""
    return x * x.softmax(-1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "gelu_quick": gelu_quick,
    "relu": F.relu,
    "relu_squared": relu_squared,
    "silu": F.silu,
    "solu": solu,
}


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(x / cap) (Gemma 2, arXiv 2408.00118); x itself when there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """(up + 1) · gate · sigmoid(1.702 gate), with gate clamped from above and up from both sides (GPT-OSS)."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def alibi_slopes(n_heads: int) -> Tensor:
    """Slope of each head's linear distance penalty (ALiBi, arXiv 2108.12409). [head]

    For head counts that are no power of two, the slopes of the next lower power are followed by every other slope
    of the next higher one.
    """
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    extra = [2 ** (-4 * (2 * i + 1) / power) for i in range(n_heads - power)]
    return torch.tensor(slopes + extra, device="cpu")  # also where a model is laid out on the meta device
