"""One autoencoder of any architecture: encode, decode, and what decoding must know of the input.

The formula is that of `config`. Knows no transformer: x is any float tensor whose last axis is d_in wide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_lens.autoencoders.activations import Gated, RankedActivation, TopK, build_activation
from neuron_lens.autoencoders.activations.base import LatentIndex
from neuron_lens.autoencoders.config import AutoencoderConfig
from neuron_lens.autoencoders.normalisation import DecodeState, normalise
from neuron_lens.autoencoders.self_check import SelfCheck
from neuron_lens.autoencoders.sparse import (
    SparseLatents,
    batch_topk_of_product,
    sum_of_rows,
    topk_of_product,
    with_selected_gradient,
)
from neuron_lens.errors import RequestError

__all__ = ["Autoencoder", "decoder_norms"]

# Below this share of active latents, summing decoder rows beats multiplying with the whole decoder
# (on a CPU, 768 -> 24,576 with 32 active: 3 ms against 330 ms for 1,024 positions).
_SPARSE_SHARE = 1 / 16
_SMALLEST_NORM = 1e-8  # SAELens' floor, for decoder rows that are all zero


class Autoencoder(nn.Module):
    """A sparse autoencoder or transcoder in canonical form.

    Parameters: W_enc [d_in, d_latent], b_enc [d_latent] (None when gated), W_dec [d_latent, d_out],
    b_dec [d_out], `own_b_pre` [d_in] (None unless the config's input_bias is "own"), W_skip [d_in, d_out]
    (None unless has_skip), and those of `activation` (thresholds, gates).

    Dtypes: everything is computed in the dtype of the weights (`self.dtype`; change it with `.to`), save the
    statistics of normalisation, which are float32 at least. `encode` and `decode` return that dtype;
    `forward` returns its input's.

    `decode` is pure. Where the config `needs_state` (the norm of the input, or a skip term), encode with
    `encode_with_state` and hand the state back:

    >>> config = AutoencoderConfig(d_in=4, d_latent=8, activation="topk", k=2, normalisation="layer_norm")
    >>> autoencoder = Autoencoder(config)
    >>> latents, state = autoencoder.encode_with_state(torch.randn(3, 4))
    >>> autoencoder.decode(latents, state).shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        config: AutoencoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.self_check: SelfCheck | None = None  # filled in by the loaders
        with torch.device(device or "cpu"):
            self.activation = build_activation(config)
            self.W_enc = nn.Parameter(torch.empty(config.d_in, config.d_latent))
            self.W_dec = nn.Parameter(torch.empty(config.d_latent, config.d_out))
            self.b_dec = nn.Parameter(torch.zeros(config.d_out))
            self.b_enc = _optional(self.activation.has_encoder_bias, config.d_latent)
            self.own_b_pre = _optional(config.input_bias == "own", config.d_in)
            self.W_skip = _optional(config.has_skip, config.d_in, config.d_out)
        if not self.W_enc.is_meta:
            self.reset_parameters(generator)
        self.to(dtype)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Decoder rows of length 1 in random directions; the encoder its transpose where the widths agree."""
        with torch.no_grad():
            self.W_dec.normal_(generator=generator)
            self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True))
            if self.config.d_in == self.config.d_out:
                self.W_enc.copy_(self.W_dec.T)
            else:
                self.W_enc.normal_(std=self.config.d_in**-0.5, generator=generator)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype everything is computed in."""
        return self.W_dec.dtype

    @property
    def b_pre(self) -> Tensor | None:
        """What is subtracted from the (normalised) input [d_in], or None."""
        return self.b_dec if self.config.input_bias == "decoder_bias" else self.own_b_pre

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction (or prediction) for x [..., d_in], in x's layout and dtype."""
        return self.restore(self.decode(*self.encode_compact(x)), like=x)

    def encode(self, x: Tensor, latents: slice | Sequence[int] | Tensor | None = None) -> Tensor:
        """Latents of x: [..., d_latent], or [..., n] for the n latents asked for.

        Args:
            x: [..., d_in], or [..., head, d_head] when the config flattens heads.
            latents: which ones: a slice or indices. Cheap where each latent stands on its own; where they
                are ranked against each other (top-k, group-max), all are computed and these are picked.

        Raises:
            RequestError: x of another width, or a latent beyond d_latent.
        """
        index = None if latents is None else self._index(latents)
        if index is None or not self.activation.is_elementwise:
            h, _ = self.pre_activations_with_state(x)
            acts = self._activate(h)
            return acts if index is None else acts[..., index]
        h, _ = self.pre_activations_with_state(x, index)
        return self.activation(h, index)

    def encode_with_state(self, x: Tensor) -> tuple[Tensor, DecodeState]:
        """Latents [..., d_latent], and what `decode` must know of x."""
        h, state = self.pre_activations_with_state(x)
        return self._activate(h), state

    def encode_through(
        self, x: Tensor, on_input: Callable[[Tensor], Tensor], on_pre_activations: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, DecodeState]:
        """As `encode_with_state`, with functions on the way.

        Args:
            on_input: given x with head axes flat [..., d_in]; what it returns is encoded.
            on_pre_activations: given what the latents' size is read from [..., d_latent]; what it returns takes
                its place. Of a gated autoencoder that is x W_enc exp(r_mag) + b_mag, and the gate is not changed.
        """
        h, state = self._affine(on_input(self._flat(x)))
        return self._activate(h, on_pre_activations), state

    def encode_sparse(self, x: Tensor, *, sparse_gradient: bool = False) -> tuple[SparseLatents, DecodeState]:
        """The active latents as values and indices [..., k], and what `decode` must know of x.

        Args:
            sparse_gradient: top-k only: the gradient takes the k columns of W_enc that each position selected instead
                of two products with all of it, and cannot be differentiated again; for training.

        Raises RequestError for architectures that do not fix how many latents are active.
        """
        if not isinstance(self.activation, RankedActivation):
            raise RequestError(
                "encode_sparse needs a fixed number of active latents, which "
                f"{self.config.activation!r} does not have; use encode"
            )
        plain = isinstance(self.activation, TopK) and self.config.decoder_norm == "ignore"
        if sparse_gradient and not plain:
            raise RequestError("sparse_gradient is for plain top-k; leave it out")
        if sparse_gradient or (plain and self._graph_free(x)):
            return self._encode_topk(x)
        h, state = self.pre_activations_with_state(x)
        return self._select(h), state

    def _encode_topk(self, x: Tensor) -> tuple[SparseLatents, DecodeState]:
        """Plain top-k by the parts of the product that are ranked; the gradient, if any, is sparse."""
        assert isinstance(self.activation, TopK) and self.b_enc is not None, "top-k has a bias"
        flat = self._flat(x)
        encoder_in, state = self._encoder_input(flat)
        values, indices = topk_of_product(encoder_in, self.W_enc, self.b_enc, self.activation.k)
        if torch.is_grad_enabled():
            values = with_selected_gradient(values, encoder_in, indices, self.W_enc, self.b_enc)
        values = values.relu() if self.activation.relu else values
        return SparseLatents(values, indices), self._with_skip(state, flat)

    def encode_batch_topk(self, x: Tensor, k: int) -> tuple[SparseLatents, DecodeState]:
        """Training of batch top-k: the k * batch largest of relu(h) over a whole batch x [batch, d_in], and the state.

        As `keep_batch_topk`, with as many entries a row as the fullest row needs, zeros behind the others, and a
        gradient that is sparse (see `encode_sparse`).
        """
        assert self.b_enc is not None, "only gated autoencoders have none"
        flat = self._flat(x)
        encoder_in, state = self._encoder_input(flat)
        values, indices = batch_topk_of_product(encoder_in, self.W_enc, self.b_enc, k)
        on = values.detach() > 0
        values = with_selected_gradient(values, encoder_in, indices, self.W_enc, self.b_enc) * on
        return SparseLatents(values, indices), self._with_skip(state, flat)

    def _graph_free(self, x: Tensor) -> bool:
        """Whether nothing will be differentiated, batched or compiled."""
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
            return False
        if torch.autograd.forward_ad._current_level >= 0:
            return False
        parts = (x, self.W_enc, self.b_enc, self.b_pre)
        return not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in parts)

    def encode_compact(self, x: Tensor) -> tuple[Tensor | SparseLatents, DecodeState]:
        """Latents in the form that decodes fastest: sparse where few are active, else dense; and the state."""
        if isinstance(self.activation, RankedActivation) and self._few(self.activation.k):
            return self.encode_sparse(x)
        return self.encode_with_state(x)

    def pre_activations(self, x: Tensor, latents: slice | Sequence[int] | Tensor | None = None) -> Tensor:
        """What the activation is given [..., d_latent], or [..., n] for n latents; when gated, without either bias."""
        return self.pre_activations_with_state(x, None if latents is None else self._index(latents))[0]

    def decode(self, latents: Tensor | SparseLatents, state: DecodeState | None = None) -> Tensor:
        """The reconstruction [..., d_out] of latents [..., d_latent], edited or not.

        Head axes stay flat; `restore` brings the layout of x back. `state` comes from `encode_with_state`.

        Raises:
            RequestError: latents of another width, or no state where the config needs it.
        """
        if state is None and self.config.needs_state:
            raise RequestError(
                f"decoding with normalisation {self.config.normalisation!r}"
                f"{' and a skip term' if self.config.has_skip else ''} needs facts of the input: "
                "latents, state = encode_with_state(x), then decode(latents, state)"
            )
        return self.denormalise(self.decode_normalised(latents), state)

    def decode_normalised(self, latents: Tensor | SparseLatents) -> Tensor:
        """latents @ W_dec + b_dec [..., d_out]: what `denormalise` makes the reconstruction of."""
        return self.decode_rows(self._unscaled(latents)) + self.b_dec

    def decode_rows(self, latents: Tensor | SparseLatents) -> Tensor:
        """latents @ W_dec [..., d_out] alone: no bias, no normalisation, no skip term."""
        if isinstance(latents, SparseLatents):
            return sum_of_rows(latents.values.to(self.dtype), latents.indices, self.W_dec)
        if latents.shape[-1] != self.config.d_latent:
            raise RequestError(
                f"latents {list(latents.shape)} are {latents.shape[-1]} wide, but this autoencoder has "
                f"{self.config.d_latent}"
            )
        return latents.to(self.dtype) @ self.W_dec

    def decode_nested(self, latents: Tensor, state: DecodeState | None = None) -> Tensor:
        """Matryoshka: the reconstructions [group, ..., d_out] from the first group, the first two, … all.

        Raises RequestError when the config has no group_sizes.
        """
        sizes = self.config.group_sizes
        if sizes is None:
            raise RequestError("decode_nested needs a matryoshka autoencoder: this config has no group_sizes")
        ends = torch.tensor(sizes).cumsum(0).tolist()
        kept = [torch.cat([latents[..., :end], torch.zeros_like(latents[..., end:])], dim=-1) for end in ends]
        return torch.stack([self.decode(each, state) for each in kept])

    def restore(self, reconstruction: Tensor, like: Tensor) -> Tensor:
        """A reconstruction [..., d_out] in the layout (head axes) and dtype of the input `like`."""
        if self.config.flatten_heads and self.config.d_out == self.config.d_in:
            reconstruction = reconstruction.reshape(*reconstruction.shape[:-1], *like.shape[-2:])
        return reconstruction.to(like.dtype)

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        config = self.config
        where = f", site={config.site_in.path}[{config.site_in.layer}]" if config.site_in else ""
        return f"{config.d_in} -> {config.d_latent} -> {config.d_out}, {config.activation}{where}"

    def _few(self, active: int) -> bool:
        return active <= self.config.d_latent * _SPARSE_SHARE

    def pre_activations_with_state(
        self, x: Tensor, index: LatentIndex | None = None
    ) -> tuple[Tensor, DecodeState]:
        """What the activation is given [..., d_latent], and what `decode` must know of x."""
        return self._affine(self._flat(x), index)

    def _affine(self, flat: Tensor, index: LatentIndex | None = None) -> tuple[Tensor, DecodeState]:
        """Pre-activations and state of an input whose head axes are flat [..., d_in]."""
        encoder_in, state = self._encoder_input(flat)
        W_enc = self.W_enc if index is None else self.W_enc[:, index]
        b_enc = self.b_enc if self.b_enc is None or index is None else self.b_enc[index]
        return F.linear(encoder_in, W_enc.T, b_enc), self._with_skip(state, flat)

    def _encoder_input(self, flat: Tensor) -> tuple[Tensor, DecodeState]:
        """What is multiplied with W_enc [..., d_in], and the state without the skip term."""
        normed, state = normalise(flat, self.config)
        encoder_in = normed.to(self.dtype)
        return (encoder_in if self.b_pre is None else encoder_in - self.b_pre), state

    def _with_skip(self, state: DecodeState, flat: Tensor) -> DecodeState:
        if self.W_skip is None:
            return state
        return state._replace(offset=state.offset + flat.to(self.dtype) @ self.W_skip)

    def _flat(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise RequestError(f"an autoencoder reads floating point activations, not {x.dtype}")
        width, heads = self.config.d_in, self.config.flatten_heads
        last = x.shape[-2:] if heads else x.shape[-1:]
        if len(last) != 1 + heads or last.numel() != width:
            axes = "[..., head, d_head] with head * d_head" if heads else "[..., d_in] with d_in"
            raise RequestError(
                f"the activations {list(x.shape)} do not fit this autoencoder, which reads {axes} = {width}; "
                "is it spliced into another site, or made for another model?"
            )
        return x.flatten(-2) if heads else x

    def _rank_by(self, h: Tensor) -> Tensor | None:
        """What ranks the latents, where it is not what they are."""
        return None if self.config.decoder_norm == "ignore" else h * decoder_norms(self.W_dec)

    def _select(self, h: Tensor) -> SparseLatents:
        assert isinstance(self.activation, RankedActivation), "only ranked activations select"
        rank_by = self._rank_by(h)
        if self.config.decoder_norm == "scale_latents":
            assert rank_by is not None, "scaling by decoder norms ranks by them too"
            return self.activation.select(rank_by)
        return self.activation.select(h, rank_by)

    def _activate(self, h: Tensor, on_sizes: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        if isinstance(self.activation, Gated) and on_sizes is not None:
            return self.activation.open_gates(h, on_sizes(self.activation.magnitudes(h)))
        h = h if on_sizes is None else on_sizes(h)
        if isinstance(self.activation, RankedActivation):
            return self._select(h).to_dense(self.config.d_latent)
        return self.activation(h)

    def _unscaled(self, latents: Tensor | SparseLatents) -> Tensor | SparseLatents:
        """Latents in the unit of W_dec's own rows."""
        if self.config.decoder_norm != "scale_latents":
            return latents
        inverse = 1 / decoder_norms(self.W_dec)
        if isinstance(latents, SparseLatents):
            return latents._replace(values=latents.values * inverse[latents.indices])
        return latents * inverse

    def denormalise(self, out: Tensor, state: DecodeState | None) -> Tensor:
        """The reconstruction [..., d_out] of what `decode_normalised` gave: scale, mean and skip term come back."""
        if self.config.normalisation == "scale":
            out = out / self.config.scale_out
        if state is not None and self.config.needs_state:
            out = out * state.scale + state.offset
        return out.to(self.dtype)

    def _index(self, latents: slice | Sequence[int] | Tensor) -> LatentIndex:
        """A slice as it is; indices as int64, checked and counted from the front."""
        width = self.config.d_latent
        if isinstance(latents, slice):
            if latents.step is not None and latents.step < 1:
                raise RequestError(f"a slice of latents has a positive step, not {latents.step}")
            if latents.stop is not None and latents.stop > width:
                raise RequestError(f"latents up to {latents.stop} were asked for; there are {width}")
            return latents
        index: Tensor = torch.as_tensor(latents, device=self.W_enc.device)
        if index.ndim != 1 or index.dtype not in (torch.int64, torch.int32):
            raise RequestError(
                f"latents are given as a slice or a list of indices, not {index.dtype} {list(index.shape)}"
            )
        beyond = index[(index < -width) | (index >= width)]
        if beyond.numel():
            raise RequestError(
                f"latent {int(beyond[0])} was asked for; this autoencoder has latents 0 to {width - 1}"
            )
        counted: Tensor = torch.where(index < 0, index + width, index)
        return counted.long()


def decoder_norms(W_dec: Tensor) -> Tensor:
    """The length of each decoder row [d_latent], at least 1e-8."""
    return W_dec.norm(dim=-1).clamp(min=_SMALLEST_NORM)


def _optional(wanted: bool, *shape: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(shape)) if wanted else None
