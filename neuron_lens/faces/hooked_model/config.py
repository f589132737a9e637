"""How a model is loaded for HookedModel."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from neuron_lens.interventions.places import Frozen

__all__ = ["HookedModelConfig"]

AUTOMATIC = ("auto", "balanced")


class HookedModelConfig(Frozen):
    """Which model, where, and how prompts of unequal length are padded.

    Attributes:
        model_name: a shipped or hub name, a folder, or a remote path, as `neuron_lens.loading.load` takes them.
        device_map: "cpu", "cuda" or another torch device; "auto" and "balanced" mean the GPU where there is one, else the CPU.
        torch_dtype: of the parameters; None for the checkpoint's own.
        padding_side: where rows shorter than others are padded. Results do not depend on it.
        seed: of random positions.
        attn_implementation, batch_size: accepted for compatibility; patterns are always available, and batches have any size.
    """

    model_name: str
    device_map: str = "cpu"
    torch_dtype: Any = None
    padding_side: Literal["left", "right"] = "left"
    seed: int = 0
    attn_implementation: Literal["custom_eager", "eager"] = "custom_eager"
    batch_size: int = 1

    @field_validator("torch_dtype")
    @classmethod
    def _is_dtype(cls, given: Any) -> Any:
        import torch

        if given is not None and not isinstance(given, str | torch.dtype):
            raise ValueError("a torch dtype or its name")
        return given

    @field_validator("device_map")
    @classmethod
    def _is_device(cls, given: str) -> str:
        import torch

        if given not in AUTOMATIC:
            try:
                torch.device(given)
            except RuntimeError:
                raise ValueError("'cpu', 'cuda', another torch device, 'auto' or 'balanced'") from None
        return given

    def device(self) -> str:
        """The torch device that device_map means."""
        import torch

        if self.device_map in AUTOMATIC:
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device_map
