"""A small training loop for models built from a configuration."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.model import HookedTransformer

__all__ = ["HookedTransformerTrainConfig", "train"]

_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class HookedTransformerTrainConfig:
    """How to train.

    num_epochs: passes over the data. batch_size: used when the data are rows, not batches. lr, weight_decay, and
    optimizer_name: "Adam", "AdamW" or "SGD". warmup_steps: the learning rate rises linearly over these many.
    max_grad_norm: clip gradients to this norm. max_steps: stop early. seed: of the order of rows. print_every: steps
    between log lines.
    """

    num_epochs: int = 1
    batch_size: int = 8
    lr: float = 1e-3
    seed: int = 0
    optimizer_name: str = "Adam"
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    max_steps: int | None = None
    print_every: int = 50


def train(
    model: HookedTransformer,
    config: HookedTransformerTrainConfig,
    dataset: Tensor | Iterable[dict[str, Tensor]],
) -> list[float]:
    """Train on rows of ids [row, pos], or on batches {"tokens": [batch, pos]}. Returns the loss of each step."""
    kinds = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
    if config.optimizer_name not in kinds:
        raise RequestError(f"optimizer_name must be one of {', '.join(kinds)}; got {config.optimizer_name!r}")
    optimiser = kinds[config.optimizer_name](
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    warm = max(config.warmup_steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / warm))
    losses: list[float] = []
    for tokens in _batches(dataset, config):
        loss = model(tokens.to(model.device), return_type="loss")
        optimiser.zero_grad()
        loss.backward()
        if config.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % config.print_every == 0:
            _log.info("step %d: loss %.4f", len(losses), losses[-1])
        if len(losses) == config.max_steps:
            break
    return losses


def _batches(
    dataset: Tensor | Iterable[dict[str, Tensor]], config: HookedTransformerTrainConfig
) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.num_epochs):
        if isinstance(dataset, Tensor):
            for rows in torch.randperm(len(dataset), generator=generator).split(config.batch_size):
                yield dataset[rows]
        else:
            for batch in dataset:
                yield batch["tokens"]
