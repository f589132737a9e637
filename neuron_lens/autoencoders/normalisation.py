"""Normalising what goes in, and undoing it on what comes out.

Undoing needs facts of the input; they are handed over as a value, never kept on the module, so that decoding
is a pure function of its arguments: two batches may be in flight at once, and a transform may replay it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from neuron_lens.autoencoders.config import AutoencoderConfig

__all__ = ["DecodeState", "normalise"]

_LAYER_NORM_EPSILON = 1e-5


class DecodeState(NamedTuple):
    """What decoding must know of the input: output = decoded * scale + offset. None stands for 1 and 0."""

    scale: Tensor | None = None  # [..., 1]
    offset: Tensor | None = None  # [..., 1] or [..., d_out]


def normalise(x: Tensor, config: AutoencoderConfig) -> tuple[Tensor, DecodeState]:
    """The input as the encoder reads it [..., d_in], and how to undo that on the output.

    Statistics are computed in float32 at least, whatever x is.

    - constant_norm_rescale: x √d_in / ‖x‖ (SAELens); an all-zero x stays zero.
    - layer_norm: (x − mean) / (std + 1e-5) with the unbiased std; undone by y * std + mean, without the
      epsilon (OpenAI's sparse_autoencoder and SAELens).
    - scale: x * scale_in; undone by dividing by scale_out, which needs nothing of x.
    """
    if config.normalisation == "none":
        return x, DecodeState()
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if config.normalisation == "scale":
        return x * config.scale_in, DecodeState()
    if config.normalisation == "constant_norm_rescale":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        root = config.d_in**0.5
        return x * (root / norm), DecodeState(scale=norm / root)
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    std = centred.std(dim=-1, keepdim=True)
    return centred / (std + _LAYER_NORM_EPSILON), DecodeState(scale=std, offset=mean)
