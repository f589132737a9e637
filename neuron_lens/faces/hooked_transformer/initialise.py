"""Random weights of a model built from a configuration, by the classic modes."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import ConfigError
from neuron_lens.faces.hooked_transformer.state_names import state_names
from neuron_lens.transformer import Transformer

__all__ = ["INIT_MODES", "initialise"]

INIT_MODES = ("gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP")


@torch.no_grad()
def initialise(engine: Transformer, mode: str, spread: float, seed: int | None) -> None:
    """Draw every matrix by `mode`; biases are 0, norms 1.

    gpt2: N(0, spread²). xavier: gain `spread`, by fan-in and fan-out (Glorot and Bengio 2010). kaiming: gain
    spread · √2, by fan-in (He et al. 2015). muP: 1 for embeddings, 1 / fan-in for the unembedding, 1 / √fan-in else
    (arXiv 2203.03466). seed: None draws from torch's own generator.
    """
    if mode not in INIT_MODES:
        raise ConfigError(f"init_mode must be one of {', '.join(INIT_MODES)}; got {mode!r}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    own = dict(engine.named_parameters())
    for row in state_names(engine.config):
        parameter = own.get(row.engine)
        if parameter is None:
            continue
        kind = row.classic.rpartition(".")[2].lstrip("_")
        if kind.startswith("W_"):
            parameter.copy_(
                row.to_engine(_drawn(row.to_classic(parameter), row.classic, mode, spread, generator))
            )
        elif kind == "w":
            parameter.fill_(0.0 if engine.config.norm_offset else 1.0)
        else:
            parameter.zero_()


def _drawn(like: Tensor, name: str, mode: str, spread: float, generator: torch.Generator | None) -> Tensor:
    fan_in, fan_out = like.shape[-2], like.shape[-1]
    if like.dim() == 3 and name.endswith("W_O"):
        fan_in *= like.shape[0]
    elif like.dim() == 3:
        fan_out *= like.shape[0]
    deviation = {
        "gpt2": spread,
        "xavier": spread * (2.0 / (fan_in + fan_out)) ** 0.5,
        "kaiming": spread * (2.0 / fan_in) ** 0.5,
        "muP": 1.0 if "embed.W_E" in name or "W_pos" in name else fan_in ** (-1.0 if "W_U" in name else -0.5),
    }[mode.partition("_")[0]]
    if mode.endswith("normal") or mode == "gpt2":
        return torch.randn(like.shape, generator=generator) * deviation
    return (torch.rand(like.shape, generator=generator) * 2 - 1) * 3**0.5 * deviation
