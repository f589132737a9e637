"""Interventions as users of HookedModel write them: a cache key, positions by name, and what is done there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator
from torch import Tensor

from neuron_lens import interventions as engine
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.arguments import several
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.fields import Place, named_place
from neuron_lens.interventions.places import Frozen

__all__ = ["Batch", "Intervention", "Operation", "requests_of"]

Operation = Literal["auto", "zero", "scale", "set", "add", "mean", "resample"]
ATTENTION_TYPES = (
    "columns",
    "rows",
    "grid",
    "columns_pre_softmax",
    "rows_pre_softmax",
    "grid_pre_softmax",
    "keep_self",
)
RENAMED_TYPES = {"colums_pre_softmax": "columns_pre_softmax", "keep_self_attn": "keep_self"}
# Types that are grids between these queries and keys.
BLOCKS = {"block_img_txt": (("all-text",), ("all-image",)), "block_img_img": (("all-image",), ("all-image",))}


@dataclass(frozen=True, eq=False)
class Batch:
    """Prompts as the model takes them.

    tokens: [batch, pos]. pad: true where a column is padding, None without. pivots: where inputs-partition-k cuts, for all
        rows or row by row. tokenizer, seed: for positions by text and random ones.
    """

    tokens: Tensor
    pad: Tensor | None
    pivots: Any = None
    tokenizer: Any = None
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """What the resolver of positions takes besides tokens and pad."""
        return {"pivot_positions": self.pivots, "tokenizer": self.tokenizer, "seed": self.seed}


class Intervention(Frozen):
    """Something done to one activation, in the words of the cache's keys. Compiled to `neuron_lens.interventions`.

    Attributes:
        activation: a key, as extraction names it: `resid_out_3`, `head_out_L3H5`, `pattern_L0H1`. Keys and values of a query head
            (`head_values_L0H1`) are those it reads, which its group shares under grouped attention;
            `kv_head_values_L0H0` names them by their own index. `projected_…` takes zero and scale only, done
            to the head's own vector.
        type: "full": at the positions. At patterns and scores: "columns" (the positions are keys), "rows"
            (queries), "grid" (a pair: queries, keys), each also `…_pre_softmax`; "keep_self": the queries see
            only themselves; "block_img_txt" and "block_img_img": the grids from text, or from images, to images.
            The causal mask is never undone.
        token_positions: groups in the grammar of positions; a pair of such lists for grids.
        operation: "zero"; "scale" by multiplication_value; "set" to patching_values; "add" patching_values; "mean": the
            mean over the source's examples; "resample": another example of the source, drawn with `seed`. "auto": set
            when there are values, the mean when there is a source, else scale (by 0 unless said otherwise).
        patching_values: a number, a vector [width], or values of the selected positions [positions, width] or [batch or 1,
            positions, width]. At patterns and scores a number or [queries, keys] or [batch or 1, queries, keys], of the
            selected ones in the order of the request, or of all positions of the longest row. What is written or added there
            stands at the prompt's own queries and keys; entries of later keys must be 0 (scores: -inf). "ablation" is zero.
        source: a cache that holds the activation at as many positions, for mean and resample (before the softmax:
            `scores_…` in place of `pattern_…`).
        multiplication_value: factor of scale.
        apply_softmax: what is left of an ablated pattern is renormalised.
    """

    activation: str
    type: str = "full"
    token_positions: Any = Field(default=("all",))
    patching_values: Any = None
    multiplication_value: float = Field(default=0.0, allow_inf_nan=False)
    apply_softmax: bool = False
    operation: Operation = "auto"
    source: Any = None
    seed: int = 0

    def __init__(self, **fields: Any) -> None:
        kind = fields.get("type")
        if isinstance(kind, str):
            kind = kind.replace("-", "_")
            stem = kind.removesuffix("_pre_softmax")
            if stem in BLOCKS:
                if "token_positions" in fields:
                    raise RequestError(
                        f"Intervention: type {fields['type']!r} names its positions; leave token_positions out, or use 'grid'"
                    )
                fields |= {"token_positions": BLOCKS[stem]}
                kind = kind.replace(stem, "grid")
            fields["type"] = RENAMED_TYPES.get(kind, kind)
        super().__init__(**fields)

    @field_validator("type")
    @classmethod
    def _known_type(cls, given: str) -> str:
        if given not in ("full", *ATTENTION_TYPES):
            raise ValueError(f"one of full, {', '.join((*ATTENTION_TYPES, *BLOCKS))}")
        return given

    @field_validator("token_positions")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple) or not len(given):
            raise ValueError("a list with at least one group, such as ['last']; for grids a pair of lists")
        return given

    @field_validator("source")
    @classmethod
    def _is_cache(cls, given: Any) -> Any:
        if given is not None and not isinstance(given, ActivationCache):
            raise ValueError("an ActivationCache, as extract_cache gives it")
        return given

    @field_validator("patching_values")
    @classmethod
    def _is_value(cls, given: Any) -> Any:
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if given is not None and not isinstance(given, Tensor) and given != "ablation" and not number:
            raise ValueError("a number, a tensor or 'ablation'")
        return given

    @model_validator(mode="after")
    def _agree(self) -> Intervention:
        place = self.place
        pattern = place.field.kind == "pattern"
        if place.name == "extract_value_weighted_pattern":
            raise ValueError(
                f"{self.activation} is computed from the pattern: intervene at pattern_… or head_values_…"
            )
        if not pattern and self.type != "full":
            raise ValueError(f"type {self.type!r} is for patterns; {self.activation} takes 'full'")
        if self.type.startswith("grid") and len(self.token_positions) != 2:
            raise ValueError("a grid takes a pair: the groups of its queries and of its keys")
        if self.does in ("mean", "resample") and self.source is None:
            raise ValueError(f"{self.does!r} needs source: a cache of other examples")
        if self.does in ("set", "add") and (
            self.patching_values is None or isinstance(self.patching_values, str)
        ):
            raise ValueError(f"{self.does!r} needs patching_values: a number or a tensor")
        if place.field.kind == "projected" and self.does not in ("zero", "scale"):
            raise ValueError(
                f"{self.activation} is the head's own vector seen through its output matrix: {self.does!r} has to be done to "
                f"head_{place.field.key.split('_')[1]}s_… instead"
            )
        if self.apply_softmax and (not pattern or self.does != "zero"):
            raise ValueError("apply_softmax renormalises an ablated pattern: it goes with zero, at patterns")
        return self

    @property
    def place(self) -> Place:
        """What `activation` names."""
        return named_place(self.activation)

    @property
    def does(self) -> str:
        """The operation, with "auto" decided."""
        if self.operation == "scale" and self.multiplication_value == 0:
            return "zero"
        if self.operation != "auto":
            return self.operation
        if self.patching_values is not None:
            return "zero" if isinstance(self.patching_values, str) else "set"
        if self.source is not None:
            return "mean"
        return "scale" if self.multiplication_value != 0 else "zero"


def requests_of(given: Any) -> list[Any]:
    """Interventions as a list, ours and declared ones of `neuron_lens.interventions`; none for None.

    Raises RequestError for anything else.
    """
    if given is None:
        return []
    single = isinstance(given, Intervention | engine.Intervention)
    listed = [given] if single else several("interventions", given, "a list of Intervention objects")
    for request in listed:
        if not isinstance(request, Intervention | engine.Intervention):
            raise RequestError(f"interventions are Intervention objects; got {request!r:.80}")
    return listed
