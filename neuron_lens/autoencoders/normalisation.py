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
    """What decoding must know of the input: output = decoded * scale + offset.

    Always two tensors, so that it passes through torch.func; scalars 1 and 0 where there is nothing to know.
    """

    scale: Tensor  # [..., 1]
    offset: Tensor  # [..., 1] or [..., d_out]


def normalise(x: Tensor, config: AutoencoderConfig) -> tuple[Tensor, DecodeState]:
    """The input as the encoder reads it [..., d_in], and how to undo that on the output.

    Statistics are computed in float32 at least, whatever x is.

    - constant_norm_rescale: x √d_in / ‖x‖ (SAELens); an all-zero x stays zero.
    - layer_norm: (x − mean) / (std + 1e-5) with the unbiased std; undone by y * std + mean, without the
      epsilon (OpenAI's sparse_autoencoder and SAELens).
    - scale: x * scale_in; undone by dividing by scale_out, which needs nothing of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    nothing = DecodeState(x.new_ones((), dtype=wide), x.new_zeros((), dtype=wide))
    if config.normalisation == "none":
        return x, nothing
    x = x.to(wide)
    if config.normalisation == "scale":
        return x * config.scale_in, nothing
    if config.normalisation == "constant_norm_rescale":
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        root = config.d_in**0.5
        return x * (root / norm), nothing._replace(scale=norm / root)
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    # not .std(), which warns on empty input and has no gradient at constant x
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (config.d_in - 1) ** 0.5
    return centred / (std + _LAYER_NORM_EPSILON), DecodeState(std, mean)
