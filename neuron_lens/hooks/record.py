"""Recorders: hooks that keep what passes, and the store they fill.

A kept tensor is the live one (no copy) unless a conversion was asked for; the store remembers its in-place
version, so that a tensor somebody changed afterwards raises when it is read instead of lying.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuron_lens.errors import HookError, did_you_mean
from neuron_lens.hooks.chain import Handle, Hook, Hooks, version_of
from neuron_lens.hooks.conditions import AtLayers, AtPositions

if TYPE_CHECKING:
    from neuron_lens.hooks.tree import HookCollection

__all__ = ["Recorder", "Recording"]

Key = str | tuple[str, int] | tuple[str, int, int]


class Recording(Mapping[Key, Tensor]):
    """What recording hooks kept: `recording["mlp.post_act", layer]`, or `recording["logits"]` outside blocks; inside
    experts, `recording["mlp.expert_post_act", layer, expert]`.

    A second forward overwrites the first. `stop()` takes the hooks out of the tree again.
    """

    def __init__(self, tree: HookCollection, *, dtype: Any, device: Any, detach: bool) -> None:
        self._tree = tree
        self._dtype, self._device, self._detach = dtype, device, detach
        self._kept: dict[Key, tuple[Tensor, int]] = {}
        self._handles: list[Handle] = []

    def attach(self, chain: Hooks, hook: Hook, layers: Iterable[int] | int | None, positions: Any) -> None:
        """Append a recording hook to a chain, behind the conditions asked for."""
        if positions is not None:
            hook = AtPositions(positions).append(hook)
        if layers is not None:
            hook = AtLayers(layers if isinstance(layers, int) else list(layers)).append(hook)
        self._handles.append(chain.append(hook, handle=True))

    def keep(self, name: str, x: Tensor, layer: int | None, expert: int | None = None) -> None:
        """Keep `x` under a name, layer and expert; called by the hooks."""
        kept = x.detach() if self._detach else x
        if self._dtype is not None or self._device is not None:
            kept = kept.to(device=self._device, dtype=self._dtype, non_blocking=False)
        key: Key = name
        if layer is not None:
            key = (name, layer) if expert is None else (name, layer, expert)
        self._kept[key] = (kept, version_of(kept))

    def __getitem__(self, key: Key) -> Tensor:
        wanted = _shown(key)
        if key not in self._kept:
            have = [_shown(other) for other in self._kept]
            raise KeyError(
                f"nothing recorded for {wanted!r}; {did_you_mean(wanted, have) if have else 'no forward has run'}"
            )
        tensor, version = self._kept[key]
        if version >= 0 and version_of(tensor) != version:
            raise HookError(
                f"the recorded activation {wanted} was edited in place after it "
                f"was recorded; return a new tensor from the hook that edits it, or record with dtype= or device= to copy"
            )
        return tensor

    def __iter__(self) -> Iterator[Key]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget what was kept; the hooks stay."""
        self._kept.clear()

    def stop(self) -> None:
        """Take the recording hooks out of the tree; what was kept stays readable."""
        while self._handles:
            self._handles.pop().remove()

    def __repr__(self) -> str:
        return f"Recording of {len(self)} tensors: {', '.join(str(key) for key in self)}"


class Recorder:
    """The hook that fills a `Recording`."""

    def __init__(self, recording: Recording, name: str) -> None:
        self.recording, self.name = recording, name

    def __call__(self, x: Tensor, layer: int | None = None, expert: int | None = None) -> None:
        self.recording.keep(self.name, x, layer, expert)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recorder) and self.recording is other.recording and self.name == other.name

    __hash__ = None  # type: ignore[assignment]


def _shown(key: Key) -> str:
    """A key in messages."""
    if isinstance(key, str):
        return key
    return ", ".join(
        [key[0], *(f"{word} {n}" for word, n in zip(("layer", "expert"), key[1:], strict=False))]
    )
