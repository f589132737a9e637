"""What weights look like after loading, so that a wrong orientation or scale is seen at once.

A transposed or mis-scaled matrix often has the right shape. Given activations of the site, the share of their
variance that the reconstruction explains tells most of it; without, norms are recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from neuron_lens.errors import CheckpointError

if TYPE_CHECKING:
    from neuron_lens.autoencoders.autoencoder import Autoencoder
    from neuron_lens.autoencoders.clt import CrossLayerTranscoder

__all__ = ["SelfCheck", "check_autoencoder", "check_cross_layer", "explained_variance", "refuse_non_finite"]


class SelfCheck(BaseModel):
    """Facts of loaded weights. Lengths are Euclidean norms over the input or output width."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    decoder_row_norm: tuple[float, float, float]  # smallest, median, largest
    encoder_column_norm: tuple[float, float, float]
    zero_decoder_rows: int  # latents that write nothing
    # the median cosine between a latent's encoder column and decoder row (equal widths only); near zero in a
    # trained autoencoder, it means that a matrix is transposed or shuffled
    encoder_decoder_cosine: float | None
    explained_variance: float | None = None  # of the activations given, 1 is all
    mean_active: float | None = None  # latents active per position there ("L0")


def check_autoencoder(
    autoencoder: Autoencoder,
    activations: Tensor | None = None,
    target: Tensor | None = None,
    *,
    min_explained_variance: float = 0.0,
) -> SelfCheck:
    """Check the weights, and on given activations the reconstruction.

    Args:
        autoencoder: what was loaded.
        activations: [..., d_in] of its own site, optional.
        target: [..., d_out] that a transcoder should predict; the activations themselves by default.
        min_explained_variance: the least share of the target's variance that counts as loaded right.

    Raises:
        CheckpointError: weights that are not finite; a decoder of zeros; a reconstruction that explains
            less than the given share.
    """
    refuse_non_finite(dict(autoencoder.state_dict()), "the autoencoder")
    with torch.no_grad():
        rows, columns = autoencoder.W_dec.float().norm(dim=-1), autoencoder.W_enc.float().norm(dim=0)
        if not rows.any():
            raise CheckpointError("the decoder is all zeros: these weights are of an untrained autoencoder")
        cosine = None
        if autoencoder.config.d_in == autoencoder.config.d_out:
            dots = torch.einsum("il,li->l", autoencoder.W_enc.float(), autoencoder.W_dec.float())
            cosine = float((dots / (rows * columns).clamp(min=1e-12)).median())
        variance = active = None
        if activations is not None:
            variance, active = _on_activations(autoencoder, activations, target)
            _require(variance, min_explained_variance, "the given activations")
    return SelfCheck(
        decoder_row_norm=_spread(rows),
        encoder_column_norm=_spread(columns),
        zero_decoder_rows=int((rows == 0).sum()),
        encoder_decoder_cosine=cosine,
        explained_variance=variance,
        mean_active=active,
    )


def check_cross_layer(
    transcoder: CrossLayerTranscoder,
    activations: Tensor | None = None,
    target: Tensor | None = None,
    *,
    min_explained_variance: float = 0.0,
) -> tuple[SelfCheck, ...]:
    """Check a cross-layer transcoder's weights, and on given activations its predictions; one entry a layer.

    A latent's decoder norm is that of all it writes, to its own layer and later ones together.

    Args:
        activations: [layer, ..., d_in] of the sites it reads, optional.
        target: [layer, ..., d_out] that it should predict; goes with activations.
        min_explained_variance: the least share of a layer's variance that counts as loaded right.

    Raises:
        CheckpointError: weights that are not finite; decoders of zeros; a layer predicted worse than that.
    """
    refuse_non_finite(dict(transcoder.state_dict()), "the cross-layer transcoder")
    if (activations is None) != (target is None):
        raise CheckpointError("a transcoder is checked on both: give activations and target, or neither")
    checks = []
    with torch.no_grad():
        predicted = None if activations is None else transcoder(activations.to(transcoder.W_enc[0].device))
        for layer in range(transcoder.config.n_layers):
            rows = transcoder.W_dec[layer].float().flatten(1).norm(dim=-1)
            if not rows.any():
                raise CheckpointError(f"the decoder of layer {layer} is all zeros: it was not trained")
            variance = active = None
            if activations is not None and target is not None and predicted is not None:
                variance = explained_variance(predicted[layer].cpu(), target[layer].cpu())
                latents = transcoder.encode(activations[layer].to(predicted.device), layer)
                active = float((latents != 0).sum(dim=-1).double().mean())
                _require(variance, min_explained_variance, f"the outputs of layer {layer}")
            checks.append(
                SelfCheck(
                    decoder_row_norm=_spread(rows),
                    encoder_column_norm=_spread(transcoder.W_enc[layer].float().norm(dim=0)),
                    zero_decoder_rows=int((rows == 0).sum()),
                    encoder_decoder_cosine=None,
                    explained_variance=variance,
                    mean_active=active,
                )
            )
    return tuple(checks)


def explained_variance(reconstruction: Tensor, target: Tensor) -> float:
    """1 − ‖target − reconstruction‖² / ‖target − mean over positions‖², both [..., d_out]."""
    wanted = target.double().reshape(-1, target.shape[-1])
    error = (wanted - reconstruction.double().reshape(wanted.shape)).square().sum()
    return float(1 - error / (wanted - wanted.mean(dim=0)).square().sum())


def refuse_non_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError naming every tensor that holds NaN or an infinity."""
    counts = {
        name: int((~torch.isfinite(tensor)).sum())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    }
    if counts:
        listed = ", ".join(f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items())
        raise CheckpointError(f"{what} has values that are NaN or infinite: {listed}; the file is damaged")


def _require(variance: float, least: float, what: str) -> None:
    if not variance >= least:
        raise CheckpointError(
            f"the reconstruction explains {variance:.3f} of the variance of {what}, expected at least {least}: they are "
            "of another site, model or scale, or the format was read wrongly"
        )


def _on_activations(autoencoder: Autoencoder, x: Tensor, target: Tensor | None) -> tuple[float, float]:
    x = x.to(autoencoder.W_dec.device)
    wanted = x if target is None else target.to(x.device)
    latents, state = autoencoder.encode_with_state(x)
    reconstruction = autoencoder.decode(latents, state)
    if wanted.numel() != reconstruction.numel():
        raise CheckpointError(
            f"the target {list(wanted.shape)} does not fit what is predicted, {list(reconstruction.shape)}"
        )
    share = explained_variance(reconstruction, wanted.reshape(reconstruction.shape))
    return share, float((latents != 0).sum(dim=-1).double().mean())


def _spread(norms: Tensor) -> tuple[float, float, float]:
    return float(norms.min()), float(norms.median()), float(norms.max())
