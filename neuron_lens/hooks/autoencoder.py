"""An autoencoder spliced into a forward pass, as a hook with sites of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.hooks.tree import FwdBwdHooks, HookCollection

__all__ = ["AutoencoderHooks"]

GradientPath = Literal["both", "reconstruction", "error"]


class AutoencoderHooks(HookCollection):
    """A hook that replaces x by its reconstruction, with the sub-sites `latents`, `reconstruction` and `error`.

    With `add_error`, the output is hooked reconstruction + error, where error = x − decode(latents before any
    hook): without hooks it is the identity, and an edit of a latent moves the output by exactly the latent's
    decoder direction times the change. Without it, the output is the hooked reconstruction, and `error` hooks
    observe x − reconstruction (what they return is not used).

    Args:
        encode: x [batch, pos, d_in] -> latents [batch, pos, d_latent].
        decode: latents -> reconstruction, of x's shape.
        add_error: see above.
        gradient: with `add_error`, the path gradients take from the output back to x: "both" (of an unedited
            splice: exactly the identity's), "reconstruction" (the error is a constant, as in SAELens), or
            "error" (the reconstruction is a constant). Without `add_error` there is only the reconstruction.

    The error is computed and added in float32 when x is of a shorter type, so that an unedited splice is
    bit-equal there too.
    """

    latents: FwdBwdHooks
    reconstruction: FwdBwdHooks
    error: FwdBwdHooks

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        add_error: bool = False,
        *,
        gradient: GradientPath = "both",
    ) -> None:
        super().__init__()
        if gradient not in ("both", "reconstruction", "error"):
            raise HookError(f"gradient path {gradient!r}: expected 'both', 'reconstruction' or 'error'")
        self.encode, self.decode, self.add_error, self.gradient = encode, decode, add_error, gradient
        self.add_subhooks("latents", FwdBwdHooks(("batch", "pos", "d_latent")))
        self.add_subhooks("reconstruction", FwdBwdHooks(("batch", "pos", "d_model")))
        self.add_subhooks("error", FwdBwdHooks(("batch", "pos", "d_model")))

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        latents = self.encode(x)
        if self.latents.has_any():
            # a copy: hooks may edit it in place, and the error needs what the encoder said
            unedited, latents = latents, self.latents(latents.clone(), **context)
        else:
            unedited = latents
        reconstruction = self.decode(latents)
        plain = reconstruction if latents is unedited else self.decode(unedited)
        if plain.shape != x.shape:
            raise HookError(
                f"the autoencoder decodes to {list(plain.shape)}, but the site has {list(x.shape)}"
            )
        if not self.add_error:
            hooked = self._hooked_reconstruction(reconstruction, plain, context)
            if self.error.has_any():
                self.error(x - reconstruction, **context)
            return hooked.to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        error = x.to(wide) - plain.to(wide)
        if self.gradient == "reconstruction":
            error = error.detach()
        elif self.gradient == "error":
            # x itself is the error's only live part: decode(encode(x)) counts as a constant on both sides
            error = x.to(wide) - plain.detach().to(wide)
            reconstruction = reconstruction.detach()
        hooked = self._hooked_reconstruction(reconstruction, plain, context)
        return (hooked.to(wide) + self.error(error, **context)).to(x.dtype)

    def _hooked_reconstruction(
        self, reconstruction: Tensor, plain: Tensor, context: dict[str, Any]
    ) -> Tensor:
        if not self.reconstruction.has_any():
            return reconstruction
        return self.reconstruction(
            reconstruction.clone() if reconstruction is plain else reconstruction, **context
        )
