"""Cross-layer transcoders: latents of a layer help write the MLP outputs of that layer and all later ones.

    latents_i = activation(x_i @ W_enc[i] + b_enc[i])
    output_l  = b_dec[l] + Σ_{i ≤ l} latents_i @ W_dec[i][:, l − i]   [+ x_l @ W_skip[l]]

(Ameisen et al. 2025, "Circuit Tracing".) Layers may be given one at a time, as a forward pass meets them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neuron_lens.autoencoders.activations import build_activation
from neuron_lens.autoencoders.config import CrossLayerTranscoderConfig
from neuron_lens.autoencoders.self_check import SelfCheck
from neuron_lens.errors import RequestError

__all__ = ["CrossLayerTranscoder"]


class CrossLayerTranscoder(nn.Module):
    """Parameters, with i a layer: W_enc[i] [d_in, d_latent], b_enc[i] [d_latent], b_dec[i] [d_out],
    W_dec[i] [d_latent, n_layers − i, d_out] (axis 1: how many layers later it writes), W_skip[i]
    [d_in, d_out] when the config has_skip, and `activations[i]`.

    Computed in the dtype of the weights; `forward` and `decode` given x return x's.
    """

    def __init__(
        self,
        config: CrossLayerTranscoderConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.self_check: tuple[SelfCheck, ...] | None = None  # of each layer; filled in by the loader
        layers, d_in, d_latent, d_out = config.n_layers, config.d_in, config.d_latent, config.d_out
        with torch.device(device or "cpu"):
            self.W_enc = _zeros(layers, lambda _: (d_in, d_latent))
            self.b_enc = _zeros(layers, lambda _: (d_latent,))
            self.W_dec = _zeros(layers, lambda i: (d_latent, layers - i, d_out))
            self.b_dec = _zeros(layers, lambda _: (d_out,))
            self.W_skip = _zeros(layers if config.has_skip else 0, lambda _: (d_in, d_out))
            self.activations = nn.ModuleList(build_activation(config) for _ in range(layers))
        self.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype everything is computed in."""
        dtype: torch.dtype = self.b_dec[0].dtype
        return dtype

    def forward(self, x: Tensor) -> Tensor:
        """The predicted outputs [layer, ..., d_out] for the inputs of all layers [layer, ..., d_in]."""
        if x.shape[0] != self.config.n_layers:
            raise RequestError(
                f"the inputs {list(x.shape)} hold {x.shape[0]} layers, this transcoder {self.config.n_layers}"
            )
        latents = [self.encode(x[layer], layer) for layer in range(self.config.n_layers)]
        outputs = [self.decode(latents[: layer + 1], x=x[layer]) for layer in range(self.config.n_layers)]
        return torch.stack(outputs)

    def encode(self, x: Tensor, layer: int) -> Tensor:
        """The latents [..., d_latent] of one layer, from its input x [..., d_in]."""
        self._check_layer(layer)
        if x.shape[-1] != self.config.d_in:
            raise RequestError(
                f"the activations {list(x.shape)} are {x.shape[-1]} wide, not {self.config.d_in}"
            )
        h = F.linear(x.to(self.dtype), self.W_enc[layer].T, self.b_enc[layer])
        latents = self.activations[layer](h)
        assert isinstance(latents, Tensor), "activations map tensors to tensors"
        return latents

    def decode(self, latents: Sequence[Tensor], *, x: Tensor | None = None) -> Tensor:
        """The output [..., d_out] of layer len(latents) − 1, from the latents of it and all layers before.

        Args:
            latents: of layers 0, 1, …, each [..., d_latent], edited or not.
            x: the layer's own input [..., d_in]; needed when there is a skip term.
        """
        layer = len(latents) - 1
        self._check_layer(layer)
        if self.config.has_skip and x is None:
            raise RequestError("this transcoder has a skip term: decode needs the layer's input, x=…")
        out: Tensor = self.b_dec[layer]
        for source, active in enumerate(latents):
            out = out + active.to(self.dtype) @ self.W_dec[source][:, layer - source]
        if self.config.has_skip and x is not None:
            out = out + x.to(self.dtype) @ self.W_skip[layer]
        return out if x is None else out.to(x.dtype)

    def decoder_rows(self, layer: int, latent: int) -> Tensor:
        """What one latent writes to its own layer and each later one [n_layers − layer, d_out]."""
        self._check_layer(layer)
        if not 0 <= latent < self.config.d_latent:
            raise RequestError(
                f"latent {latent} was asked for; a layer has latents 0 to {self.config.d_latent - 1}"
            )
        rows: Tensor = self.W_dec[layer][latent]
        return rows

    def extra_repr(self) -> str:
        """Shown when the module is printed."""
        config = self.config
        return (
            f"{config.n_layers} layers of {config.d_in} -> {config.d_latent} -> {config.d_out}, "
            f"{config.activation}"
        )

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.config.n_layers:
            raise RequestError(f"there is no layer {layer}: expected 0 to {self.config.n_layers - 1}")


def _zeros(count: int, shape: Callable[[int], tuple[int, ...]]) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(torch.zeros(shape(i))) for i in range(count))
