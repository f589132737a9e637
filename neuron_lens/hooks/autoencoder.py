"""An autoencoder spliced into a forward pass, as a hook with sites of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.hooks.chain import edited_in_place, version_of
from neuron_lens.hooks.tree import FwdBwdHooks, HookCollection

__all__ = ["AutoencoderHooks", "GradientPath"]

GradientPath = Literal["both", "reconstruction", "error"]


class AutoencoderHooks(HookCollection):
    """A hook that replaces x by its reconstruction, with the sub-sites `latents`, `reconstruction` and `error`.

    With `add_error`, the output is hooked reconstruction + error, where error = x − decode(latents before any
    hook): without hooks it is the identity, and an edit of a latent moves the output by exactly the latent's
    decoder direction times the change. Without it, the output is the hooked reconstruction, and `error` hooks
    observe x − reconstruction (what they return is not used).

    Args:
        encode: x [batch, pos, d_in] -> latents [batch, pos, d_latent]; or -> (latents, state), when decoding
            must know facts of x: `decode` is then called as decode(latents, state).
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
        encode: Callable[..., Any],
        decode: Callable[..., Tensor],
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
        return self.write(x, self.read(x, **context), **context)

    def read(self, x: Tensor, **context: Any) -> Any:
        """What the encoder makes of x: latents, or (latents, state)."""
        return self.encode(x)

    def write(self, x: Tensor, encoded: Any, **context: Any) -> Tensor:
        """What the site that holds x becomes, given what was read, here or at another site."""
        latents, state = self._parts(encoded)
        edited = self._changed(self.latents, latents, context)
        reconstruction = self._decoded(latents if edited is None else edited, state, x, context)
        same = edited is None and not self._changed_elsewhere(encoded, context)
        plain = reconstruction if same or not self.add_error else self._plain(encoded, x)
        return self._put_back(x, reconstruction, plain, context)

    def _put_back(self, x: Tensor, reconstruction: Tensor, plain: Tensor, context: dict[str, Any]) -> Tensor:
        """What takes x's place. plain: the reconstruction without any hook; not looked at without `add_error`."""
        if not self.add_error:
            hooked = self._hooked_reconstruction(reconstruction, context)
            if self.error.has_any():
                self.error(x - reconstruction, **context)
            return hooked.to(x.dtype)
        if self.gradient == "error":
            # x itself is the error's only live part: decode(encode(x)) counts as a constant on both sides
            reconstruction, plain = reconstruction.detach(), plain.detach()
        wide = torch.promote_types(x.dtype, torch.float32)
        error = self._error_term(x.to(wide), plain.to(wide), context)
        if self.gradient == "reconstruction":
            error = error.detach()
        hooked = self._hooked_reconstruction(reconstruction, context)
        return (hooked.to(wide) + self.error(error, **context)).to(x.dtype)

    def _parts(self, encoded: Any) -> tuple[Any, list[Any]]:
        """The latents and the state, if any, of what `read` returned."""
        latents, *state = encoded if type(encoded) is tuple else (encoded,)
        return latents, state

    def _changed(self, site: FwdBwdHooks, value: Any, context: dict[str, Any]) -> Tensor | None:
        """A value after the hooks of its site; None when nothing was hooked, or nothing changed or will be traced."""
        if not site.acts_at(context.get("layer")):
            return None
        given = self._editable(value)
        version = version_of(given)
        hooked = site(given, **context)
        if hooked is given and not edited_in_place(given, version) and not given.requires_grad:
            return None
        return hooked

    def _editable(self, latents: Any) -> Tensor:
        """A copy: hooks may edit it in place, and the error needs what the encoder said."""
        copied: Tensor = latents.clone()
        return copied

    def _changed_elsewhere(self, encoded: Any, context: dict[str, Any]) -> bool:
        """Whether hooks of other sites than the latents may have changed the reconstruction."""
        return False

    def _plain(self, encoded: Any, x: Tensor) -> Tensor:
        """The reconstruction without any hook."""
        return self._decoded(*self._parts(encoded), x)

    def _decoded(
        self, latents: Any, state: list[Any], x: Tensor, context: dict[str, Any] | None = None
    ) -> Tensor:
        """The reconstruction; context: for hooks inside the decoder, None for none."""
        return self._fitting(self.decode(latents, *state), x)

    def _fitting(self, decoded: Tensor, x: Tensor) -> Tensor:
        if decoded.shape != x.shape:
            raise HookError(
                f"the autoencoder decodes to {list(decoded.shape)}, but the site has {list(x.shape)}"
            )
        return decoded

    def _error_term(self, x: Tensor, plain: Tensor, context: dict[str, Any]) -> Tensor:
        """What is added to the reconstruction; x and plain are float32 at least."""
        return x - plain

    def _hooked_reconstruction(self, reconstruction: Tensor, context: dict[str, Any]) -> Tensor:
        if not self.reconstruction.has_any():
            return reconstruction
        return self.reconstruction(reconstruction.clone(), **context)
