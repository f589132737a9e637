"""The hook that fills a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_lens.cache import Slice
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.hook_point import HookPoint

__all__ = ["CachingHook"]


class CachingHook:
    """Keeps what passes a point under the point's name (gradients under `<name>_grad`), detached and not copied.

    HookedTransformer gives a copy to every hook that runs where a CachingHook is about, so that an edit in place
    cannot reach what was kept.
    """

    def __init__(
        self,
        cache: dict[str, Any],
        *,
        device: Any = None,
        remove_batch_dim: bool = False,
        pos_slice: Slice | None = None,
        gradient: bool = False,
    ) -> None:
        self.cache, self.device, self.remove_batch_dim = cache, device, remove_batch_dim
        self.pos_slice = pos_slice
        self.gradient = gradient

    def __call__(self, tensor: Tensor, *, hook: HookPoint) -> None:
        kept = tensor.detach()
        joined = hook.axes is not None and hook.axes[:1] == ("token",)  # rows of the batch in one axis
        if self.remove_batch_dim and not joined and kept.shape[0] != 1:
            raise RequestError(
                f"remove_batch_dim needs a batch of one sequence; {hook.name} has {kept.shape[0]} rows"
            )
        if self.pos_slice is not None:
            kept = self._sliced(kept, hook)
        if self.remove_batch_dim and not joined:
            kept = kept[0]
        if self.device is not None:
            kept = kept.to(self.device)
        name = f"{hook.name}_grad" if self.gradient else str(hook.name)
        self.cache[name] = kept

    def _sliced(self, kept: Tensor, hook: HookPoint) -> Tensor:
        assert self.pos_slice is not None, "only called with a slice"
        if hook.axes is None:
            return self.pos_slice.apply(kept, dim=-2) if kept.dim() > 1 else kept
        return self.pos_slice.apply(kept, dim=hook.axes.index("pos")) if "pos" in hook.axes else kept
