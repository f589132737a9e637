"""Random initialisation of one parameter in the classic layouts, by the names people import.

A matrix is [in, out], and the weights of heads [head, in, out]: fan-in is `in`, fan-out `head · out`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from neuron_lens.errors import RequestError

__all__ = [
    "calc_fan_in_and_fan_out",
    "init_kaiming_normal_",
    "init_kaiming_uniform_",
    "init_xavier_normal_",
    "init_xavier_uniform_",
]


def calc_fan_in_and_fan_out(tensor: Tensor) -> tuple[int, int]:
    """Fan-in and fan-out of a bias [out], a matrix [in, out] or heads [head, in, out]. Raises RequestError for others."""
    shape = tensor.shape
    if not 1 <= len(shape) <= 3:
        raise RequestError(f"fan-in and fan-out are known for 1 to 3 dimensions; got {list(shape)}")
    fan_in = 1 if len(shape) == 1 else shape[-2]
    return fan_in, shape[-1] * (shape[0] if len(shape) == 3 else 1)


def init_xavier_uniform_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform with deviation gain · √(2 / (fan-in + fan-out)) (Glorot and Bengio 2010), in place."""
    return _uniform(param, gain * (2.0 / sum(calc_fan_in_and_fan_out(param))) ** 0.5)


def init_xavier_normal_(param: Tensor, gain: float = 1.0) -> Tensor:
    """Normal with deviation gain · √(2 / (fan-in + fan-out)) (Glorot and Bengio 2010), in place."""
    return nn.init.normal_(param, 0.0, gain * (2.0 / sum(calc_fan_in_and_fan_out(param))) ** 0.5)


def init_kaiming_uniform_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """Uniform with deviation gain · g / √fan, g of the nonlinearity before (He et al. 2015), in place."""
    return _uniform(param, _kaiming(param, a, nonlinearity, gain, mode))


def init_kaiming_normal_(
    param: Tensor, a: float = 0, nonlinearity: Any = "relu", gain: float = 1.0, mode: str = "fan_in"
) -> Tensor:
    """Normal with deviation gain · g / √fan, g of the nonlinearity before (He et al. 2015), in place."""
    return nn.init.normal_(param, 0.0, _kaiming(param, a, nonlinearity, gain, mode))


def _kaiming(param: Tensor, a: float, nonlinearity: Any, gain: float, mode: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise RequestError(f"mode must be 'fan_in' or 'fan_out'; got {mode!r}")
    fan = calc_fan_in_and_fan_out(param)[mode == "fan_out"]
    return gain * nn.init.calculate_gain(nonlinearity, a) / float(fan) ** 0.5


def _uniform(param: Tensor, deviation: float) -> Tensor:
    return nn.init.uniform_(param, -(3**0.5) * deviation, 3**0.5 * deviation)
