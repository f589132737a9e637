"""Edits of the latents of an autoencoder spliced into the model: its error is added back, so only the edit acts."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import field_validator, model_validator
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtUnits, AutoencoderHooks
from neuron_lens.interventions.declared import Intervention, as_tensor
from neuron_lens.interventions.places import At
from neuron_lens.interventions.tensors import TensorData

__all__ = ["EditLatents"]


class EditLatents(Intervention):
    """Change some latents where an autoencoder reads: x + decode(edited) − decode(latents).

    autoencoder: name under which `to_hooks(…, autoencoders={name: …})` finds it (anything with `encode` and `decode`).
    latents: which latents; an edit of all of them is asked for as None.
    operation: "set" to value, "scale" by it, "add" it, "cap" at it (min of latent and value), "clamp" between `low` and
        `high` (either may be left out), or "ablate" (set to zero).
    value, low, high: a number, or one for each of `latents`; those the operation does not use are left out.
    """

    kind: Literal["edit_latents"] = "edit_latents"
    autoencoder: str
    latents: tuple[int, ...] | None = None
    operation: Literal["set", "scale", "add", "cap", "clamp", "ablate"] = "set"
    value: TensorData | None = None
    low: TensorData | None = None
    high: TensorData | None = None

    @field_validator("latents", mode="before")
    @classmethod
    def _one_latent(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _uses_what_is_given(self) -> Self:
        bounds = self.low is not None or self.high is not None
        if (self.operation not in ("clamp", "ablate")) != (self.value is not None):
            verb = "needs a value" if self.value is None else "takes no value"
            raise ValueError(f"operation {self.operation!r} {verb}")
        if (self.operation == "clamp") != bounds:
            raise ValueError(
                "operation 'clamp' needs low, high or both"
                if not bounds
                else "low and high are for operation 'clamp'"
            )
        return self

    def changed(self, x: Tensor, at: At) -> Tensor:
        known = at.autoencoders or {}
        if self.autoencoder not in known:
            raise RequestError(
                f"{self.label()}: no autoencoder is called {self.autoencoder!r}; pass autoencoders={{{self.autoencoder!r}: …}} "
                f"(given: {', '.join(known) or 'none'})"
            )
        autoencoder = known[self.autoencoder]
        # some must know facts of x to decode, and hand them over beside the latents
        encode = getattr(autoencoder, "encode_with_state", autoencoder.encode)
        splice = AutoencoderHooks(encode, autoencoder.decode, add_error=True)
        where = self._edit if self.latents is None else AtUnits(self.latents).append(self._edit)
        splice.append_to_path("latents.fwd", where)
        flat: Tensor = splice(x.reshape(-1, *x.shape[-2:]))
        return flat.view(x.shape)

    def _edit(self, latents: Tensor) -> Tensor:
        if self.operation == "ablate":
            return torch.zeros_like(latents)
        if self.operation == "clamp":
            if self.low is not None:
                latents = latents.maximum(as_tensor(self.low, latents))
            return latents if self.high is None else latents.minimum(as_tensor(self.high, latents))
        assert self.value is not None, "the validator has seen to it"
        value = as_tensor(self.value, latents)
        if self.operation == "set":
            return value.expand_as(latents)
        if self.operation == "scale":
            return latents * value
        return latents + value if self.operation == "add" else latents.minimum(value)
