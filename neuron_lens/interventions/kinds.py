"""The kinds of intervention that overwrite, shift or project what a site holds."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions.declared import Intervention, Sourced, as_tensor
from neuron_lens.interventions.places import At
from neuron_lens.interventions.tensors import Activations, TensorData
from neuron_lens.transformer import TransformerConfig

__all__ = [
    "Add",
    "AddRecorded",
    "Clamp",
    "Freeze",
    "MeanAblate",
    "Patch",
    "ProjectOut",
    "ResampleAblate",
    "Scale",
    "Set",
    "Zero",
]


class Zero(Intervention):
    """Replace by zeros (zero ablation)."""

    kind: Literal["zero"] = "zero"

    def changed(self, x: Tensor, at: At) -> Tensor:
        return x.new_zeros(())


class Set(Intervention):
    """Replace by `value`: a number, or a tensor that broadcasts to the site's axes (from the last one)."""

    kind: Literal["set"] = "set"
    value: TensorData

    def changed(self, x: Tensor, at: At) -> Tensor:
        return as_tensor(self.value, x)

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        self._check_broadcast(config, path, self.value.tensor, "value")


class Scale(Intervention):
    """Multiply by `factor`."""

    kind: Literal["scale"] = "scale"
    factor: float = Field(allow_inf_nan=False)

    def changed(self, x: Tensor, at: At) -> Tensor:
        return x * self.factor


class Add(Intervention):
    """Steer: add `scale` times a vector (activation addition, Turner et al. 2023, arXiv 2308.10248).

    vector: broadcasts to the site's axes (from the last one).
    length: "as_given" adds the vector itself; "unit" a vector of length 1 in its direction; "matched" one as long as
        the activation it is added to, position by position.
    keep_norm: the result is rescaled to the length the activation had.
    """

    kind: Literal["add"] = "add"
    vector: TensorData
    scale: float = Field(default=1.0, allow_inf_nan=False)
    length: Literal["as_given", "unit", "matched"] = "as_given"
    keep_norm: bool = False

    @model_validator(mode="after")
    def _has_direction(self) -> Self:
        vector = self.vector.tensor
        if self.length != "as_given" and (vector.dim() == 0 or bool((vector.norm(dim=-1) == 0).any())):
            raise ValueError(f"length={self.length!r} needs a vector with a direction, not a number or zeros")
        return self

    def changed(self, x: Tensor, at: At) -> Tensor:
        vector = as_tensor(self.vector, x)
        if self.length != "as_given":
            vector = vector / vector.norm(dim=-1, keepdim=True)
        if self.length == "matched":
            vector = vector * x.norm(dim=-1, keepdim=True)
        moved = x + self.scale * vector
        if self.keep_norm:
            tiny = torch.finfo(x.dtype).tiny
            moved = moved * (x.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True).clamp_min(tiny))
        return moved

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        self._check_broadcast(config, path, self.vector.tensor, "vector")


class Clamp(Intervention):
    """Limit to the interval from `low` to `high`; None leaves that side open."""

    kind: Literal["clamp"] = "clamp"
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _is_interval(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("give low, high or both: without them nothing is clamped")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self

    def changed(self, x: Tensor, at: At) -> Tensor:
        return x.clamp(self.low, self.high)


class ProjectOut(Intervention):
    """Remove what lies in the span of some directions of the last axis (directional ablation).

    directions: [directions, width] or [width]; they need not be orthogonal or of length 1.
    """

    kind: Literal["project_out"] = "project_out"
    directions: TensorData

    @field_validator("directions")
    @classmethod
    def _spans(cls, given: TensorData) -> TensorData:
        tensor = given.tensor
        if tensor.dim() not in (1, 2) or bool((tensor.norm(dim=-1) == 0).any()):
            raise ValueError(
                f"directions are [width] or [directions, width] and not zero; got {list(tensor.shape)}"
            )
        return given

    def changed(self, x: Tensor, at: At) -> Tensor:
        directions = self.directions.tensor.to(device=x.device, dtype=torch.float64)
        # right singular vectors of the stack span it, whatever its rank
        _, size, basis = torch.linalg.svd(directions.reshape(-1, directions.shape[-1]), full_matrices=False)
        basis = basis[size > size[0] * 1e-10].to(x.dtype)
        kept: Tensor = x - (x @ basis.T) @ basis
        return kept

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        self._check_broadcast(
            config,
            path,
            self.directions.tensor.reshape(-1, self.directions.tensor.shape[-1])[0],
            "directions",
        )
        if self.units is not None:
            raise RequestError(f"{self.label()}: a projection mixes all units; leave units out")


class Patch(Sourced):
    """Replace by what another run had there (activation patching, causal tracing, interchange).

    source: activations of the other run; None takes from the same run, at `source_positions`.
    source_positions: take from these positions instead: one for all selected positions, or one for each of `positions`.
    source_layer: take from this layer instead. source_site: take from this site (of the same shape) instead.
    source_row: take from this row of the source for every row.
    """

    kind: Literal["patch"] = "patch"
    source: Activations | None = None  # type: ignore[assignment]
    source_positions: tuple[int, ...] | None = None
    source_layer: int | None = None
    source_site: str | None = None
    source_row: int | None = None

    @field_validator("source_positions", mode="before")
    @classmethod
    def _one_or_more(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int) and not isinstance(given, bool) else given

    @model_validator(mode="after")
    def _says_from_where(self) -> Self:
        if self.source is None:
            if self.source_positions is None:
                raise ValueError(
                    "give source (another run's activations), or source_positions to take from the same run"
                )
            if self.source_layer is not None or self.source_site is not None or self.source_row is not None:
                raise ValueError("another layer, site or row is taken from a recorded run: give source")
        many = self.source_positions is not None and len(self.source_positions) > 1
        if many and not (
            isinstance(self.positions, tuple) and len(self.positions) == len(self.source_positions or ())
        ):
            raise ValueError(
                "give one source position, or positions as a list with as many entries as source_positions"
            )
        return self

    def source_place(self, path: str, layer: int | None) -> tuple[str, int | None]:
        return self.source_site or path, layer if self.source_layer is None else self.source_layer

    def depends_on_place(self) -> bool:
        return self.source_positions is not None and len(self.source_positions) > 1

    def looks_back_to(self, length: int) -> int | None:
        if self.source is not None or self.source_positions is None:
            return None
        return min(p % length if p < 0 else p for p in self.source_positions)

    def changed(self, x: Tensor, at: At) -> Tensor:
        if self.source_positions is not None:
            return self._moved(x, at)
        source = self.aligned(x, at, self.source_place(at.site.path, at.layer))
        return source if self.source_row is None else source[self.source_row : self.source_row + 1]

    def _moved(self, x: Tensor, at: At) -> Tensor:
        """The source's positions at the places of the target's."""
        dim = at.dim("pos")
        wanted = self.source_positions or ()
        if self.source is None:
            source, start, end = x, at.start, at.ends
        else:
            source, start = self.source[self.source_place(at.site.path, at.layer)].to(x.device, x.dtype), 0
            end = source.shape[dim]
            if self.source_row is not None:
                source = source[self.source_row : self.source_row + 1]
        columns = [self._column(p, end, start, source.shape[dim]) for p in wanted]
        if len(columns) == 1:
            return source.narrow(dim, columns[0], 1)
        assert isinstance(self.positions, tuple), "checked when built"
        targets = [self._column(p, at.ends, at.start, 2**62) for p in self.positions]
        inside = [(t, c) for t, c in zip(targets, columns, strict=True) if 0 <= t < x.shape[dim]]
        index = torch.tensor([t for t, _ in inside], device=x.device)
        taken = source.index_select(dim, torch.tensor([c for _, c in inside], device=x.device))
        shape = list(x.shape)
        shape[dim] = len(inside)
        return x.index_copy(dim, index, taken.expand(shape))

    def _column(self, position: int, end: int | Tensor | None, start: int, size: int) -> int:
        if not isinstance(end, int):
            raise RequestError(
                f"{self.label()}: source_positions need rows of equal length; use PerRow patches of recorded runs"
            )
        column = (position + end if position < 0 else position) - start
        if column >= size or (size < 2**62 and column < 0):
            raise RequestError(
                f"{self.label()}: position {position} is not in the run it is taken from ({size} positions)"
            )
        return column

    def _check_values(self, config: TransformerConfig, path: str) -> None:
        if self.source is not None:
            super()._check_values(config, path)


class AddRecorded(Sourced):
    """Add what a source holds, position by position: a difference of two runs, steering that differs along the prompt.

    source: what is added, by (site, layer), [batch or 1, pos, …]; nothing is added where it has no such position.
    """

    kind: Literal["add_recorded"] = "add_recorded"

    def changed(self, x: Tensor, at: At) -> Tensor:
        return x + self.aligned(x, at, (at.site.path, at.layer))


class MeanAblate(Sourced):
    """Replace by a mean over other inputs (mean ablation).

    source: means by (site, layer), [1, 1 or pos, …]; `mean_activations` makes them.
    """

    kind: Literal["mean_ablate"] = "mean_ablate"

    def changed(self, x: Tensor, at: At) -> Tensor:
        return self.aligned(x, at, (at.site.path, at.layer))


class ResampleAblate(Sourced):
    """Replace by the activation of another input, drawn at random for each row (resample ablation).

    source: activations [inputs, pos, …] of the inputs to draw from. seed: makes the draw the same every time; it
    depends on the seed and the number of rows only.
    """

    kind: Literal["resample_ablate"] = "resample_ablate"
    seed: int = 0

    def changed(self, x: Tensor, at: At) -> Tensor:
        rows = x.shape[at.dim("batch")]
        source = self.source[at.site.path, at.layer]
        drawn = torch.randint(source.shape[0], (rows,), generator=torch.Generator().manual_seed(self.seed))
        chosen = self.model_copy(
            update={"source": Activations({(at.site.path, at.layer): source[drawn.to(source.device)]})}
        )
        return chosen.aligned(x, at, (at.site.path, at.layer))


FROZEN_SITES: dict[str, tuple[str, ...]] = {
    "attention_pattern": ("attn.qk_probs",),
    "norm_scale": ("resid.torso.ln_attn.scale", "resid.torso.ln_mlp.scale", "resid.ln_f.scale"),
    "mlp_output": ("resid.torso.delta_mlp",),
    "attention_output": ("resid.torso.delta_attn",),
}


class Freeze(Sourced):
    """Hold something at what it was in a reference run, so that only direct effects remain.

    site: "attention_pattern", "norm_scale" (all norms before the sublayers, and the final one), "mlp_output",
        "attention_output"; or the path of any one site.
    source: the reference run's activations of those sites, for instance `capture(model, tokens, frozen_sites(…))`.
    """

    kind: Literal["freeze"] = "freeze"

    def sites(self) -> tuple[str, ...]:
        named = FROZEN_SITES.get(self.site, (self.site,))
        # the final norm belongs to no layer: a freeze of some layers leaves it alone
        return named[:2] if self.site == "norm_scale" and self.layers is not None else named

    def changed(self, x: Tensor, at: At) -> Tensor:
        return self.aligned(x, at, (at.site.path, at.layer))


def frozen_sites(*what: str) -> list[str]:
    """The sites that `Freeze` of these names acts at, for `capture`."""
    return [path for name in what for path in FROZEN_SITES.get(name, (name,))]
