"""What an autoencoder is, apart from its weights: the canonical form that every format is translated into.

    h       = (norm_in(x) − b_pre) @ W_enc + b_enc             pre-activations  [..., d_latent]
    latents = activation(h)                                     [..., d_latent]
    output  = norm_out(latents @ W_dec + b_dec) + x @ W_skip    [..., d_out]

A sparse autoencoder reads and writes one site; a transcoder reads one site and predicts another. Knows no
torch and no files.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuron_lens.errors import ConfigError

__all__ = [
    "Activation",
    "AutoencoderConfig",
    "CrossLayerTranscoderConfig",
    "DecoderNorm",
    "InputBias",
    "Normalisation",
    "Provenance",
    "Site",
]

Activation = Literal["relu", "gated", "topk", "abs_topk", "batch_topk", "jumprelu", "groupmax"]
Normalisation = Literal["none", "constant_norm_rescale", "layer_norm", "scale"]
InputBias = Literal["none", "decoder_bias", "own"]
DecoderNorm = Literal["ignore", "scale_latents", "select_only"]

_NEED_K = ("topk", "abs_topk", "groupmax")


class Frozen(BaseModel):
    """Base of configurations: closed, unchangeable, and wrong values are one ConfigError that names them all."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = [
                ": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")])
                for each in error.errors()
            ]
            raise ConfigError(f"{type(self).__name__}: {'; '.join(problems)}") from error


class Site(Frozen):
    """A place in a model: a path of the hook tree, and which layer (None: outside the blocks)."""

    path: str  # "resid.torso.post_mlp"
    layer: int | None = None
    head: int | None = None  # the one head it reads, when the site has a head axis


class Provenance(Frozen):
    """Where an autoencoder came from, so that a result can name its source."""

    format: str  # the loader's name, "saelens"
    path: str
    files: tuple[str, ...] = ()  # names of the files read, relative to `path`
    source_config: dict[str, Any] = Field(default_factory=dict)  # the file's own config, unchanged
    notes: tuple[str, ...] = ()  # what the loader had to infer or convert


class AutoencoderConfig(Frozen):
    """The shape and arithmetic of one autoencoder or transcoder. See the module docstring for the formula."""

    d_in: int = Field(gt=0)  # width that is read
    d_latent: int = Field(gt=0)
    d_out: int = Field(default=0, gt=0)  # width that is written; d_in when not given
    activation: Activation
    k: int | None = Field(default=None, gt=0)  # latents kept (topk, abs_topk, batch_topk), groups (groupmax)
    # topk, jumprelu: whether what was selected is still clipped at zero
    relu_after_selection: bool = True
    group_sizes: tuple[int, ...] | None = None  # matryoshka: latents of each nested group, in order
    # b_pre, subtracted from the (normalised) input: nothing, b_dec itself, or a vector of its own
    input_bias: InputBias = "none"
    # topk, abs_topk: "scale_latents" multiplies pre-activations by ||W_dec row|| and divides when decoding;
    # "select_only" ranks by the product and keeps the pre-activation itself
    decoder_norm: DecoderNorm = "ignore"
    normalisation: Normalisation = "none"
    scale_in: float = 1.0  # normalisation "scale": x * scale_in goes in,
    scale_out: float = 1.0  # and the output is divided by scale_out
    has_skip: bool = False
    flatten_heads: bool = False  # x is [..., head, d_head] with head * d_head = d_in
    site_in: Site | None = None
    site_out: Site | None = None  # the same as site_in except for transcoders
    model_name: str | None = None
    context_size: int | None = None  # tokens per sequence in training
    prepend_bos: bool | None = None  # whether sequences began with the beginning-of-sequence token
    provenance: Provenance | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_output(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            if data.get("d_out") is None and "d_in" in data:
                data["d_out"] = data["d_in"]
            if data.get("site_out") is None:
                data["site_out"] = data.get("site_in")
        return data

    @model_validator(mode="after")
    def _agree(self) -> Self:
        wrong = [message for broken, message in self._rules() if broken]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    def _rules(self) -> list[tuple[bool, str]]:
        k, width = self.k, self.d_latent
        ranked = self.activation in ("topk", "abs_topk")
        return [
            (self.activation in _NEED_K and k is None, f"activation {self.activation!r} needs k"),
            (k is not None and k > width, f"k is {k}, but there are only {width} latents"),
            (
                self.activation == "groupmax" and k is not None and width % k != 0,
                f"groupmax splits {width} latents into k = {k} groups, which does not divide",
            ),
            (
                self.group_sizes is not None and sum(self.group_sizes) != width,
                f"group_sizes sum to {sum(self.group_sizes or ())}, not to d_latent {width}",
            ),
            (
                self.group_sizes is not None and min(self.group_sizes, default=0) < 1,
                f"group_sizes {self.group_sizes} must all be positive",
            ),
            (
                self.input_bias == "decoder_bias" and self.d_in != self.d_out,
                f"b_dec ({self.d_out} wide) cannot be subtracted from an input of {self.d_in}; a transcoder "
                "has input_bias 'none' or 'own'",
            ),
            (
                self.decoder_norm != "ignore" and not ranked,
                f"decoder_norm {self.decoder_norm!r} is for topk and abs_topk, not {self.activation!r}: "
                "fold the norms into the weights instead",
            ),
            (
                self.normalisation == "layer_norm" and self.d_in < 2,
                "layer_norm needs a width of at least 2",
            ),
            (self.scale_in <= 0 or self.scale_out <= 0, "scale_in and scale_out must be positive"),
            (
                self.normalisation != "scale" and (self.scale_in, self.scale_out) != (1.0, 1.0),
                f"scale_in and scale_out are for normalisation 'scale', not {self.normalisation!r}",
            ),
        ]

    @property
    def is_transcoder(self) -> bool:
        """Whether it predicts another site than it reads."""
        return self.site_in != self.site_out or self.d_in != self.d_out or self.has_skip

    @property
    def needs_state(self) -> bool:
        """Whether decoding needs facts of the input (its norm, mean or skip term) besides the latents."""
        return self.has_skip or self.normalisation in ("constant_norm_rescale", "layer_norm")


class CrossLayerTranscoderConfig(Frozen):
    """A transcoder whose latents of layer i write to layers i, i + 1, …, n_layers − 1."""

    n_layers: int = Field(gt=0)
    d_in: int = Field(gt=0)
    d_latent: int = Field(gt=0)  # latents of each layer
    d_out: int = Field(gt=0)
    activation: Literal["relu", "topk", "jumprelu"]
    k: int | None = Field(default=None, gt=0)
    relu_after_selection: bool = True
    has_skip: bool = False  # output of layer l gains x_l @ W_skip[l]
    site_in: Site | None = None  # the layer is left out: it is every layer
    site_out: Site | None = None
    model_name: str | None = None
    provenance: Provenance | None = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.activation == "topk" and self.k is None:
            raise ValueError("activation 'topk' needs k")
        if self.k is not None and self.k > self.d_latent:
            raise ValueError(f"k is {self.k}, but there are only {self.d_latent} latents per layer")
        return self
