"""The classic key-value cache over the engine's."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.config import HookedTransformerConfig
from neuron_lens.transformer import KVCache, TransformerConfig

__all__ = ["HookedTransformerKeyValueCache"]


class HookedTransformerKeyValueCache:
    """Keys and values of the tokens read so far, handed to `forward` as `past_kv_cache`.

    Frozen, it is read and not extended, so that many continuations share one prompt. It needs the model's
    configuration, so it is made whole on its first use.
    """

    def __init__(self, cfg: HookedTransformerConfig, device: Any, batch_size: int = 1) -> None:
        self.cfg, self.device, self.batch_size = cfg, device, batch_size
        self.frozen = False
        self.inner: KVCache | None = None
        self._announced: Tensor | None = None

    @classmethod
    def init_cache(cls, cfg: HookedTransformerConfig, device: Any = None, batch_size: int = 1) -> Self:
        """An empty cache for a batch of this many rows."""
        return cls(cfg, cfg.device if device is None else device, batch_size)

    def engine_cache(self, config: TransformerConfig, dtype: torch.dtype, device: torch.device) -> KVCache:
        """The engine's cache, made on first use."""
        if self.inner is None:
            self.inner = KVCache(config, self.batch_size, dtype=dtype, device=device)
        self.inner.frozen = self.frozen
        return self.inner

    def freeze(self) -> Self:
        """Stop extending."""
        self.frozen = True
        return self

    def unfreeze(self) -> Self:
        """Extend with every forward again."""
        self.frozen = False
        return self

    @property
    def length(self) -> int:
        """Columns held, padding included."""
        return 0 if self.inner is None else self.inner.length

    def past_keys(self, layer: int) -> Tensor:
        """Keys at a layer (after rotary), [batch, pos, kv_head, d_head]"""
        return self._held().keys[layer][:, :, : self.length].transpose(1, 2)

    def past_values(self, layer: int) -> Tensor:
        """Values at a layer, [batch, pos, kv_head, d_head]"""
        return self._held().values[layer][:, :, : self.length].transpose(1, 2)

    @property
    def previous_attention_mask(self) -> Tensor:
        """1 where a column held is a token, 0 where padding, [batch, pos]"""
        if self.inner is None or self.inner.positions is None:
            return torch.ones(self.batch_size, self.length, dtype=torch.long, device=self.device)
        return (self.inner.positions >= 0).long()

    def append_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """The mask of what is held and what comes next, from the latter's [batch, pos]: [batch, held + pos]

        Unless frozen, the next forward that is given no attention_mask takes this one. Calls replace each other.
        """
        held = self.previous_attention_mask
        if attention_mask.dim() != 2 or attention_mask.shape[0] != len(held):
            raise RequestError(f"expected a mask [{len(held)}, pos]; got {list(attention_mask.shape)}")
        whole = torch.cat((held, attention_mask.to(held)), -1)
        if not self.frozen:
            self._announced = whole
        return whole

    def take_announced(self) -> Tensor | None:
        """What `append_attention_mask` left for the next forward, once."""
        announced, self._announced = self._announced, None
        return announced

    def _held(self) -> KVCache:
        if self.inner is None:
            raise RequestError("the key-value cache is empty: run the model with past_kv_cache=cache first")
        return self.inner
