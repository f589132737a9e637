"""The clean run of a sweep: what no cell changes is computed once, here, and shared by all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.hooks import Run, TransformerHooks
from neuron_lens.transformer import KVCache

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["CleanRun", "SharedPrompts"]


class SharedPrompts:
    """The prompts that every cell runs, and what a pass over some of their columns is told.

    tokens: [rows, pos]. pad: true where a column is padding [rows, pos], or None.
    """

    def __init__(self, tokens: Tensor, pad: Tensor | None) -> None:
        self.tokens = tokens
        self.pad = pad if pad is not None and bool(pad.any()) else None
        self.rows, self.length = tokens.shape
        whole = Run(self.rows, self.length, pad=self.pad)
        # absolute position of each column [rows, pos], -1 where padding; real tokens of each row
        self.positions = whole.positions(tokens.device)
        self.ends = whole.ends(tokens.device)

    def run(self, cells: int, first: int, stop: int, config: object, carried: dict[Any, Any]) -> Run:
        """A pass over columns first … stop − 1 of every row, the rows repeated for each cell.

        carried: what hooks leave for later hooks of the same cell, whose layers are run in passes of their own.
        """
        tokens = self.tokens[:, first:stop].repeat(cells, 1)
        rows, columns = tokens.shape
        if self.pad is None:
            return Run(rows, columns, tokens, None, first, self.length, config=config, carried=carried)
        assert isinstance(self.ends, Tensor), "padded rows have ends of their own"
        starts = (self.positions[:, :first] >= 0).sum(-1).repeat(cells) if first else 0
        pad = self.pad[:, first:stop].repeat(cells, 1)
        return Run(
            rows, columns, tokens, pad, starts, self.ends.repeat(cells), config=config, carried=carried
        )


class CleanRun:
    """What the unedited run leaves: the stream entering each block, keys and values, logits at the columns read.

    stream: n_layers + 1 tensors [rows, pos, d_model]; the last leaves the last block.
    columns: those whose logits are read [rows, columns]; None for all. vocab: the entries read; None for all.
    """

    def __init__(
        self, model: Transformer, prompts: SharedPrompts, columns: Tensor | None, vocab: Tensor | None
    ) -> None:
        self.prompts, tokens = prompts, prompts.tokens
        weight = model.embed.weight
        self.cache = KVCache(
            model.config, prompts.rows, prompts.length, dtype=weight.dtype, device=tokens.device
        )
        hooks = TransformerHooks()
        kept = hooks.record("resid.torso.pre_attn")
        hooks.append_to_path("resid.torso.post_mlp.fwd2", self._keep_last)
        hooks.append_to_path("resid.post_emb.fwd2", self._keep_last)
        self.logits: Tensor = model(
            tokens, hooks=hooks, pad=prompts.pad, kv_cache=self.cache, logits_at=columns, logits_of=vocab
        )
        layers = range(model.config.n_layers)
        self.stream = [kept["resid.torso.pre_attn", layer] for layer in layers] + [self._last]

    def _keep_last(self, x: Tensor) -> None:
        self._last = x

    def prefix(self, columns: int, cells: int) -> PrefixCache | None:
        """Keys and values of the first columns, for `cells` copies of all rows; None when there are no columns."""
        return PrefixCache(self.cache, self.prompts, columns, cells) if columns else None

    def joined(self, layer: int, x: Tensor | None, first: int, stop: int, cells: int) -> Tensor | None:
        """The rows so far, and what enters a layer cleanly in some columns for each cell that joins there.

        At layer 0 that are tokens, and no rows can have come before.
        """
        if not cells:
            return x
        if layer == 0 and len(self.stream) > 1:
            return self.prompts.tokens[:, first:stop].repeat(cells, 1)
        clean = self.stream[layer][:, first:stop]
        fresh = clean.repeat(cells, 1, 1)
        return fresh if x is None else torch.cat((x, fresh))


class PrefixCache(KVCache):
    """A frozen cache of the first columns of another, whose rows are repeated as one block for each cell."""

    def __init__(self, whole: KVCache, prompts: SharedPrompts, columns: int, cells: int) -> None:
        self.capacity = self.length = columns
        self.frozen = True
        self.positions = None if prompts.pad is None else prompts.positions[:, :columns].repeat(cells, 1)
        self.batch = whole.batch * cells
        self._whole, self._cells = whole, cells

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._behind(self._whole.keys[layer], keys), self._behind(self._whole.values[layer], values)

    def _behind(self, whole: Tensor, new: Tensor) -> Tensor:
        old = whole[:, :, : self.length]
        repeated = old.expand(self._cells, *old.shape).reshape(self.batch, *old.shape[1:])
        return torch.cat((repeated, new), 2)
