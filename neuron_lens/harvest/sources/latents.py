"""Latents of a sparse autoencoder or transcoder, encoded where it reads the model.

Only the latents asked for are kept, with some to compare them with, so that a wide dictionary costs what is
asked of it. Windows are cut before they are encoded: context is read, not encoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.autoencoders import Autoencoder, splice
from neuron_lens.autoencoders.activations import RankedActivation
from neuron_lens.errors import RequestError
from neuron_lens.harvest.sources.base import Caught, Cut, UnitSource, dense_latents
from neuron_lens.harvest.sources.embeddings import through_norm
from neuron_lens.hooks import TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["NEAREST_KEPT", "LatentSource", "dictionary_of"]

NEAREST_KEPT = 4  # latents of the most similar decoder rows that are kept beside each one asked for


def dictionary_of(autoencoder: Autoencoder, name: str = "sae") -> str:
    """What an autoencoder's latents are filed under: a name and the first digits of a hash of its weights."""
    digest = hashlib.blake2b(digest_size=4)
    digest.update(autoencoder.config.model_dump_json(exclude={"provenance"}).encode())
    for key, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"{name}-{digest.hexdigest()}"


class LatentSource(UnitSource):
    """Latents of one autoencoder.

    Args:
        latents: those to keep; None for all. For every latent named, its neighbour and the NEAREST_KEPT of the
            most similar decoder rows are kept too: controls and near misses are found among them.
        layer: where it reads, for an autoencoder that does not say.

    Raises:
        RequestError: a site it does not say or the model does not have, a width that does not fit, or a
            latent that does not exist.
    """

    kind = "latent"
    is_sparse = True

    def __init__(
        self,
        model: Transformer,
        autoencoder: Autoencoder,
        latents: Sequence[int] | None = None,
        *,
        dictionary: str | None = None,
        layer: int | None = None,
    ) -> None:
        site = autoencoder.config.site_in
        if site is None or (site.layer is None and layer is None):
            raise RequestError(
                "this autoencoder does not say which site and layer of a model it was made for; load it with "
                "overrides={'site_in': Site(path=…, layer=…)}"
            )
        own_layer = site.layer if site.layer is not None else layer
        assert own_layer is not None, "one of the two is known"
        if layer is not None and layer != own_layer:
            raise RequestError(f"this autoencoder reads layer {own_layer}, not layer {layer}")
        self.autoencoder, self._read = autoencoder, site
        n_latents = autoencoder.config.d_latent
        wanted = None if latents is None else list(latents)
        beyond = [index for index in wanted or () if not 0 <= index < n_latents]
        if beyond:
            raise RequestError(
                f"latent {beyond[0]} does not exist: this autoencoder has 0 to {n_latents - 1}"
            )
        super().__init__(
            model,
            site=site.path,
            layer=own_layer,
            n_units=n_latents,
            indices=None if wanted is None else _with_company(autoencoder, wanted),
            dictionary=dictionary or dictionary_of(autoencoder),
        )
        self._require_width()

    @property
    def name(self) -> str:
        """With a hash of which latents are kept, where they are not all: each choice is a harvest of its own."""
        if len(self.indices) == self.n_units:
            return super().name
        digest = hashlib.blake2b(repr(self.indices).encode(), digest_size=4).hexdigest()
        return f"{super().name}_{digest}"

    def take(self, cut: Cut) -> Caught:
        """The latents of the cut windows."""
        caught = self._pop(self.site)
        if self._read.head is not None:
            caught = caught.select(-2, self._read.head)
        return _CaughtLatents(self.autoencoder, cut(caught), self.indices)

    def replacing(self, index: int, value: float | Tensor, where: Tensor) -> TransformerHooks:
        """Set one latent, the autoencoder's error kept: only the edit acts."""

        def replace(latents: Tensor) -> Tensor:
            latents = latents.clone()
            new = torch.as_tensor(value, dtype=latents.dtype, device=latents.device)
            latents[..., index] = torch.where(where, new, latents[..., index])
            return latents

        hooks = TransformerHooks()
        own = self.autoencoder.config.site_in
        layers = self.layer if own is None or own.layer is None else None
        splice(hooks, self.autoencoder, layers=layers).latents.append_fwd(replace)
        return hooks

    def written(self) -> Tensor | None:
        """Decoder rows, where the site written is the stream, or leads into it through one matrix."""
        site = self.autoencoder.config.site_out or self._read
        rows = self._kept(self.autoencoder.W_dec.detach())
        block: Any = self.model.blocks[self.layer if site.layer is None else site.layer]
        if site.path.startswith("resid.torso.") and rows.shape[-1] == self.model.config.d_model:
            straight = ("pre_attn", "delta_attn", "post_attn", "delta_mlp", "post_mlp")
            return rows if site.path.removeprefix("resid.torso.") in straight else None
        if site.path == "mlp.post_act" and self.model.config.mlp not in ("none", "experts"):
            return rows @ block.mlp.down.weight.detach().float().T
        if site.path == "attn.v_out" and rows.shape[-1] == block.attn.out.weight.shape[1]:
            return rows @ block.attn.out.weight.detach().float().T
        return None

    def read(self) -> Tensor | None:
        """Encoder columns, where the site holds the stream, as it is or behind a norm."""
        if self._read.head is not None:
            return None
        return through_norm(self.model, self._kept(self.autoencoder.W_enc.detach().T), self.site, self.layer)

    def _kept(self, rows: Tensor) -> Tensor:
        """Of rows, one a latent, those of the kept ones, float32; no copy where all are."""
        return (rows if len(self.indices) == self.n_units else rows[list(self.indices)]).float()

    def _require_width(self) -> None:
        config = self.model.config
        widths = {"mlp.post_act": config.d_mlp, "mlp.pre_act": config.d_mlp}
        expected = config.d_model if self.site.startswith("resid.") else widths.get(self.site)
        if expected is not None and self.autoencoder.config.d_in != expected:
            raise RequestError(
                f"this autoencoder reads activations {self.autoencoder.config.d_in} wide, but {self.site} of "
                f"this model is {expected} wide: it was made for another model"
            )


class _CaughtLatents(Caught):
    """Encoded a range at a time where each latent stands on its own, once where they are ranked."""

    is_cut = True

    def __init__(self, autoencoder: Autoencoder, x: Tensor, indices: tuple[int, ...]) -> None:
        self._autoencoder, self._x = autoencoder, x
        self._all = len(indices) == autoencoder.config.d_latent
        self._indices = torch.tensor(indices, device=x.device)
        self._sparse = None
        if isinstance(autoencoder.activation, RankedActivation):
            # Window by window: the pre-activations of a wide dictionary do not fit for a whole batch.
            parts = [autoencoder.encode_sparse(window)[0] for window in x]
            self._sparse = (
                torch.stack([part.values for part in parts]),
                torch.stack([part.indices for part in parts]),
            )

    def columns(self, first: int, last: int) -> Tensor:
        """Activations `[window, length, last - first]`."""
        wanted = self._indices[first:last]
        if self._sparse is None:
            return torch.stack([self._autoencoder.encode(window, wanted) for window in self._x])
        values, indices = self._sparse
        if not self._all:
            # The place among the latents asked for, or one past the end.
            places = torch.searchsorted(wanted, indices).clamp(max=len(wanted) - 1)
            indices = torch.where(wanted[places] == indices, places, len(wanted))
            return dense_latents(values, indices, 0, len(wanted))
        return dense_latents(values, indices, first, last)

    def partners(self, first: int, last: int) -> Tensor | None:
        """Latents have none."""
        return None


def _with_company(autoencoder: Autoencoder, latents: Sequence[int]) -> list[int]:
    """The latents, each with its neighbour and those of the most similar decoder rows."""
    rows = torch.nn.functional.normalize(autoencoder.W_dec.detach().float(), dim=-1)
    n = len(rows)
    kept = set(latents) | {min(index ^ 1, n - 1) for index in latents}
    chosen = torch.tensor(sorted(set(latents)), dtype=torch.long)
    for part in chosen.split(256):
        likeness = rows[part] @ rows.T
        likeness[torch.arange(len(part)), part] = -torch.inf
        kept.update(likeness.topk(min(NEAREST_KEPT, n - 1), dim=-1).indices.flatten().tolist())
    return sorted(kept)
