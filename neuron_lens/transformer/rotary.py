"""Rotary position embedding: tables of cosines and sines, and the rotation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from neuron_lens.transformer.config import RotaryConfig, RotaryScaling

__all__ = ["RotaryTable", "rotary_frequencies", "rotary_table", "rotate"]


class RotaryTable(NamedTuple):
    """Cosines and sines for the positions of one pass, [batch or 1, pos, 1, dims]."""

    cos: Tensor
    sin: Tensor


def rotary_frequencies(
    config: RotaryConfig, *, local: bool, lengths: Tensor | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each pair, and the factor that cosines and sines are multiplied by.

    The frequencies are [dims / 2]; for LongRoPE, which changes its factors with the length, [row, 1, dims / 2].

    local: for layers with a window, which may have a base of their own and then are not scaled.
    lengths: positions read so far in each row [row]; only LongRoPE asks, and without them takes the short factors.
    """
    base = config.local_base if local and config.local_base is not None else config.base
    frequencies = 1.0 / base ** (torch.arange(0, config.dims, 2, dtype=torch.int64).float() / config.dims)
    if config.scaling is None or (local and config.local_base is not None):
        return frequencies, 1.0
    scaling = config.scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.kind == "yarn":
        return _yarn(frequencies, scaling, base, config.dims)
    factors = torch.tensor(scaling.short_factors)
    if lengths is not None:
        long = (lengths.cpu() > scaling.original_context)[:, None, None]
        factors = torch.where(long, torch.tensor(scaling.long_factors), factors)
    attention = scaling.attention_factor
    if attention is None:
        stretch = scaling.factor
        attention = (
            math.sqrt(1 + math.log(stretch) / math.log(scaling.original_context)) if stretch > 1 else 1.0
        )
    return frequencies / factors, attention


def _llama3(frequencies: Tensor, scaling: RotaryScaling) -> Tensor:
    """Long wavelengths are stretched, short ones kept, those between blended (Llama 3.1)."""
    wavelength = 2 * math.pi / frequencies
    low = scaling.original_context / scaling.low_freq_factor
    high = scaling.original_context / scaling.high_freq_factor
    share = (scaling.original_context / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    blended = (1 - share) * frequencies / scaling.factor + share * frequencies
    return torch.where(
        wavelength > low, frequencies / scaling.factor, torch.where(wavelength < high, frequencies, blended)
    )


def _yarn(frequencies: Tensor, scaling: RotaryScaling, base: float, dims: int) -> tuple[Tensor, float]:
    """Blend of stretched and kept frequencies along a ramp of dimensions (YaRN, section 3)."""

    def dimension_of(rotations: float) -> float:
        return dims * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = ((torch.arange(dims // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies / scaling.factor * ramp + frequencies * (1 - ramp), attention


def rotary_table(config: RotaryConfig, positions: Tensor, *, local: bool, dtype: torch.dtype) -> RotaryTable:
    """The table for some absolute positions, [batch or 1, pos]; computed in float32."""
    lengths = None
    if config.scaling is not None and config.scaling.kind == "longrope":
        lengths = positions.amax(-1) + 1  # of each row, so that padding changes nothing
    frequencies, factor = rotary_frequencies(config, local=local, lengths=lengths)
    angles = positions[..., None].float() * frequencies.to(positions.device)
    repeat = torch.cat if config.pairing == "halves" else _interleave
    full = repeat((angles, angles), -1)[:, :, None]
    return RotaryTable((full.cos() * factor).to(dtype), (full.sin() * factor).to(dtype))


def rotate(x: Tensor, table: RotaryTable, config: RotaryConfig) -> Tensor:
    """Turn the first `dims` dimensions of each head by the position's angles. x: [batch, pos, head, d_head]"""
    if config.dims == x.shape[-1]:
        return x * table.cos + _quarter_turn(x, config) * table.sin
    turned, kept = x[..., : config.dims], x[..., config.dims :]
    turned = turned * table.cos + _quarter_turn(turned, config) * table.sin
    return torch.cat((turned, kept), -1)


def _quarter_turn(x: Tensor, config: RotaryConfig) -> Tensor:
    if config.pairing == "halves":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _interleave(parts: tuple[Tensor, Tensor], dim: int) -> Tensor:
    return torch.stack(parts, dim).flatten(-2)
