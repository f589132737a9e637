"""Activation functions under the names people import."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from neuron_lens.transformer.functional import softcap

__all__ = ["apply_softcap", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "relu2", "solu"]


def gelu_new(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 has it."""
    return F.gelu(x, approximate="tanh")


def gelu_fast(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def gelu_pytorch_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def solu(x: Tensor) -> Tensor:
    """x · softmax(x) (Elhage et al. 2022, "Softmax Linear Units")."""
    return x * x.softmax(-1)


def relu2(x: Tensor) -> Tensor:
    """relu(x)²"""
    return x.relu().square()


def apply_softcap(logits: Tensor, softcap_value: float | None) -> Tensor:
    """cap · tanh(logits / cap); the logits themselves when there is no cap or it is not positive."""
    return softcap(logits, softcap_value if softcap_value is not None and softcap_value > 0 else None)
