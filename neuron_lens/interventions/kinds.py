"""The kinds of intervention that overwrite, shift or project what a site holds; patches have a file of their own."""

from __future__ import annotations

from typing import Literal, Self

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
