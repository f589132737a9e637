"""What a harvest keeps, and how a model is given rows of text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.corpus import WindowShape

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["HarvestSettings", "fitting_shape", "model_fingerprint", "model_inputs"]


@dataclass(frozen=True, kw_only=True)
class HarvestSettings:
    """What is kept: windows per part (train, validation, test).

    Attributes:
        random: of the uniform sample, shared by all units of a source.
        top: with the largest activation, of each unit.
        fired: a uniform sample of those in which the unit fires at all, of each unit whose activation is zero
            almost everywhere (latents): the quantiles of what a uniform sample hardly ever meets.
        near: near misses of each kind, of each unit; see `near_misses`.
        reread: the share of the corpus that the model reads a second time, at most, for the near misses of each
            source (rows that several sources want are read once): windows of similar units' top lists are far harder
            negatives than those of the uniform sample, which are all there is with 0.
        neighbours: how many most similar units are listed for each unit.
        batch_rows: rows the model reads at once; changes results by rounding only.
        shard_tokens: after so many tokens all that is held goes to disk, so that a killed pass goes on there.
    """

    shape: WindowShape = field(default_factory=WindowShape)
    random: tuple[int, int, int] = (1024, 256, 256)
    top: tuple[int, int, int] = (24, 12, 16)
    fired: tuple[int, int, int] = (16, 8, 12)
    near: tuple[int, int, int] = (6, 3, 6)
    reread: float = 0.05
    neighbours: int = 8
    seed: int = 0
    site: str = "mlp.post_act"
    batch_rows: int = 16
    shard_tokens: int = 2_000_000

    def __post_init__(self) -> None:
        if self.batch_rows < 1 or self.shard_tokens < 1:
            raise RequestError(
                f"batch_rows ({self.batch_rows}) and shard_tokens ({self.shard_tokens}) must be at least 1"
            )
        if not 0 <= self.reread <= 1:
            raise RequestError(f"reread ({self.reread}) is a share of the corpus: expected 0 to 1")
        for name in ("random", "top", "fired", "near"):
            sizes = getattr(self, name)
            if len(sizes) != 3 or min(sizes) < 0:
                raise RequestError(f"{name} {sizes}: expected three counts, for train, validation and test")

    def plain(self) -> dict[str, Any]:
        """What the result depends on, as JSON gives it back."""
        plain = asdict(self)
        for name in ("batch_rows", "shard_tokens", "site"):
            plain.pop(name)  # how the work is cut up changes nothing, and the site is the source's
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def model_fingerprint(model: Transformer) -> str:
    """A hash of the config and of every weight."""
    digest = hashlib.blake2b(model.config.model_dump_json().encode(), digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fitting_shape(model: Transformer) -> WindowShape:
    """The default shape of windows for a model's context, with room for a beginning-of-sequence token."""
    return WindowShape.fitting(model.config.n_ctx - (_bos_id(model) is not None))


def _bos_id(model: Transformer) -> int | None:
    """The token every text begins with, or None for models that were not trained so."""
    tokenizer = model.tokenizer
    return tokenizer.bos_id if tokenizer is not None and tokenizer.adds_bos else None


def model_inputs(model: Transformer, rows: Sequence[np.ndarray[Any, Any]]) -> tuple[Tensor, Tensor, int]:
    """Rows of ids as the model reads them: tokens and padding `[batch, pos]`, and where the rows' own
    tokens begin.

    Models whose tokenizer starts texts with a beginning-of-sequence token get one before every row.
    """
    bos = _bos_id(model)
    first = 0 if bos is None else 1
    longest = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), first + longest, dtype=torch.long)
    pad = torch.ones_like(tokens, dtype=torch.bool)
    for place, row in enumerate(rows):
        if bos is not None:
            tokens[place, 0] = bos
        tokens[place, first : first + len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
        pad[place, : first + len(row)] = False
    device = model.embed.weight.device
    return tokens.to(device), pad.to(device), first
