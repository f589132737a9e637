"""Where a receiver reads the stream, and the hook that lets it read something more."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["MLP_IN", "READ_AT_SITES", "STREAM_OUT", "ReadsMore", "read_site"]

MLP_IN, STREAM_OUT = "resid.torso.mlp_in", "resid.torso.post_mlp"
# Receivers that read at a site of their own; units share one with the rest of their part.
READ_AT_SITES = "q", "k", "v", "mlp", "logits"


def read_site(reads: str, layer: int | None, n_layers: int) -> tuple[str, int]:
    """The site that holds what "q", "k", "v", "mlp" or "logits" read, and its layer."""
    if layer is None:
        return STREAM_OUT, n_layers - 1
    return (MLP_IN if reads == "mlp" else f"attn.{reads}_in"), layer


class ReadsMore:
    """x plus a difference [batch, pos, d_model]; where heads have copies of their own, at some of them."""

    def __init__(self, difference: Tensor, heads: Sequence[int] | None = None) -> None:
        self.difference, self.heads = difference, None if heads is None else list(heads)

    def __call__(self, x: Tensor) -> Tensor:
        if self.heads is None:
            return x + self.difference
        moved = x.clone()
        moved[:, :, self.heads] += self.difference[:, :, None]
        return moved
