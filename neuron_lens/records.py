"""What was seen of a unit: frozen, typed records, plain Python, no torch.

A unit is a neuron, an autoencoder latent, an attention head or a direction at a site. A window is a stretch
of one document as the model read it, with the unit's activation at every token. Records are
closed (an unknown field is an error), hold no NaN (what is missing is `None`), and go to JSON and back
unchanged.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

__all__ = [
    "Histogram",
    "QuantileStratum",
    "Record",
    "TokenWindow",
    "Unit",
    "UnitKind",
    "UnitStatistics",
    "WindowId",
]

UnitKind = Literal["neuron", "latent", "head", "direction"]

# Identity of a window in a corpus: (index of the document, index of its first token in the document).
WindowId = tuple[int, int]


class Record(BaseModel):
    """Base of all records: frozen, closed, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Unit(Record):
    """One part of a model that can be explained.

    `site` is the path of the hook site the activation is read at ("mlp.post_act" for a neuron, "attn.v_out"
    for a head), `index` the place on that site's last axis (for a head: the head; for a latent: its place in
    its autoencoder). `dictionary` names the autoencoder or direction that a latent or direction belongs to,
    with the first digits of its fingerprint; empty for parts of the model itself.
    """

    kind: UnitKind = "neuron"
    layer: NonNegativeInt
    index: NonNegativeInt
    site: str = "mlp.post_act"
    dictionary: str = Field(default="", pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$|^$")

    @property
    def name(self) -> str:
        """A short name that is also a folder name: "layer2_neuron17"."""
        suffix = f"_{self.dictionary}" if self.dictionary else ""
        return f"layer{self.layer}_{self.kind}{self.index}{suffix}"

    def __str__(self) -> str:
        return f"{self.kind} {self.index} of layer {self.layer}"


class TokenWindow(Record):
    """A stretch of one document, as tokens, with the unit's activation at each.

    All per-token fields have one entry a token. `tokens` are the tokens' texts (bytes that are not whole
    characters appear as U+FFFD), `annotations` maps the name of an annotation (such as "lexical_class") to
    its value at every token. Of an attention head, the activation at a token is the norm of what it writes
    there, and `sources` says which token of the window contributes most to that.
    """

    document: str  # the path or name of the document
    document_index: NonNegativeInt
    start: NonNegativeInt  # index of the first token in the document
    character_start: NonNegativeInt  # index of its first character in the document
    context_position: NonNegativeInt  # how many tokens the model had read before the window
    tokens: tuple[str, ...] = Field(min_length=1)
    ids: tuple[int, ...]
    activations: tuple[float, ...]
    preceding: tuple[str, ...] = ()  # the last few tokens before the window, for reading
    annotations: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    sources: tuple[int, ...] | None = None  # index of the token attended to, -1 outside the window (heads)

    @model_validator(mode="after")
    def _one_entry_a_token(self) -> Self:
        fields: dict[str, tuple[Any, ...]] = {"ids": self.ids, "activations": self.activations}
        fields |= self.annotations
        if self.sources is not None:
            fields["sources"] = self.sources
            if not all(-1 <= source <= place for place, source in enumerate(self.sources)):
                raise ValueError("sources must be -1 or the index of a token not after the one that attends")
        for name, values in fields.items():
            if len(values) != len(self.tokens):
                raise ValueError(f"{name} holds {len(values)} values for {len(self.tokens)} tokens")
        return self

    @property
    def identity(self) -> WindowId:
        """What tells this window from every other window of the corpus."""
        return (self.document_index, self.start)

    @property
    def max_activation(self) -> float:
        """The largest activation in the window."""
        return max(self.activations)


class Histogram(Record):
    """Counts between edges (one more edge than counts); the outer bins also hold what lies outside."""

    edges: tuple[float, ...]
    counts: tuple[NonNegativeInt, ...]

    @model_validator(mode="after")
    def _edges_enclose_counts(self) -> Self:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"{len(self.counts)} counts need {len(self.counts) + 1} edges, got {len(self.edges)}"
            )
        return self


class UnitStatistics(Record):
    """Figures over every token of the corpus, not only over kept windows.

    `variance` is that of the population; `skewness` and `kurtosis` are the third and fourth standardised
    moments (kurtosis of a normal distribution: 3), `None` for a constant unit. `density` is the share of
    tokens whose activation is above `firing_threshold`.
    """

    n_tokens: NonNegativeInt
    mean: float
    variance: float
    skewness: float | None
    kurtosis: float | None
    minimum: float
    maximum: float
    firing_threshold: float
    density: float
    histogram: Histogram


class QuantileStratum(Record):
    """Windows whose largest activation lies in [low, high), the `index`-th of the equal-count strata."""

    index: NonNegativeInt
    low: float
    high: float
    windows: tuple[TokenWindow, ...]
