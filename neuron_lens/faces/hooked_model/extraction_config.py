"""What to extract: a frozen, closed configuration. Both generations of field names are accepted."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.fields import FIELDS
from neuron_lens.interventions.places import Frozen

__all__ = ["ExtractionConfig"]

# Names of the earlier generation -> the fields they stand for.
OLDER_NAMES: dict[str, tuple[str, ...]] = {
    "extract_values_vectors_projected": ("extract_head_values_projected",),
    "extract_avg_attn_pattern": ("extract_attn_pattern", "avg_over_example"),
    "extract_avg_values_vectors_projected": ("extract_value_weighted_pattern", "avg_over_example"),
    "extract_avg": ("avg",),
}


class ExtractionConfig(Frozen):
    """Which activations to keep; everything is off but the logits.

    Shapes: B rows, P selected positions (G groups with `avg`), D the stream's width, H heads, K key/value
        heads, dh a head's width.

    Attributes:
        extract_embed: `input_embeddings` [B, P, D], what enters block 0.
        extract_resid_in, extract_resid_mid, extract_resid_out: `resid_in_{l}`, `resid_mid_{l}`,
            `resid_out_{l}` [B, P, D]: the stream entering block l, between attention and MLP, leaving it.
        extract_resid_in_post_layernorm, extract_attn_in: `resid_in_post_layernorm_{l}`, `attn_in_{l}`: what attention reads.
        extract_mlp_in: `mlp_in_{l}`: what the MLP reads.
        extract_attn_out, extract_mlp_out: `attn_out_{l}`, `mlp_out_{l}`: what each adds to the stream.
        extract_queries, extract_keys, extract_values: `queries_L{l}` [B, P, H·dh], `keys_L{l}`, `values_L{l}`
            [B, P, K·dh], before rotary.
        extract_head_queries, extract_head_keys, extract_head_values: `head_queries_L{l}H{h}` and so on [B, P,
            dh], h a query head; keys and values are those head h reads, shared within its group.
        extract_kv_head_keys, extract_kv_head_values: `kv_head_keys_L{l}H{k}` and so on [B, P, dh], k a key/value head.
        extract_head_z: `head_z_L{l}H{h}` [B, P, dh]: the head's mix of values, before the output projection.
        extract_head_out: `head_out_L{l}H{h}` [B, P, D]: the head's output, without the projection's bias.
        extract_head_values_projected, extract_head_keys_projected, extract_head_queries_projected: `projected_value_L{l}H{h}`,
            `projected_key_L{l}H{h}`, `projected_query_L{l}H{h}` [B, P, D]: the head's vector through its part
            of the output projection, without bias.
        extract_attn_pattern: `pattern_L{l}H{h}` [B, P, P], queries and keys both the selected positions; with
            `attn_pattern_row_positions` [B, R, P], or block by block [B, row groups, G] when `attn_pattern_avg` is not "none".
        extract_attn_scores: `scores_L{l}H{h}`: the same before the softmax, scaled and masked (-inf).
        extract_value_weighted_pattern: `value_weighted_pattern_L{l}H{h}` [B, P, P]: each entry times ‖v_key
            W_O‖ of the key's position.
        extract_last_layernorm: `last_layernorm` = {"mean", "variance", "second_moment"}, each [B, P], of the
            stream entering the final norm.
        save_input_ids: `input_ids`, for each group a long tensor [B, positions].
        save_logits: `logits` [B, P, d_vocab].
        layers: only these layers; None for all. (Attributes of whole layers and heads alike.)
        attn_heads: "all", or a list of {"layer": int, "head": int or "all"}: restricts everything that is per head.
        attn_pattern_avg: "mean", "sum" or "baseline_ratio" of each block of row group × column group; see
            `neuron_lens.analysis.attention_blocks`. Needs attn_pattern_row_positions.
        attn_pattern_row_positions: groups of query positions, in the grammar of positions; columns are the target groups.
        avg: mean over each position group.
        avg_over_example: mean over examples, kept as `avg_{key}` [1, P, …] in place of `{key}` and weighted
            rightly when caches are joined; logits, input ids and `last_layernorm` stay as they are.
        keep_gradient: also `{key}_gradients` for every extracted activation, of its shape: the derivative, for each row, of its
            last logit of `vocabulary_index`, averaged or summed as the activation is. What is made of a head's own vector or
            pattern moves with that alone: gradient · projected equals gradient · vector, gradient · weighted equals gradient ·
            pattern. (`last_layernorm`, logits and ids have none.)
    """

    extract_embed: bool = False
    extract_resid_in: bool = False
    extract_resid_mid: bool = False
    extract_resid_out: bool = False
    extract_resid_in_post_layernorm: bool = False
    extract_attn_in: bool = False
    extract_mlp_in: bool = False
    extract_attn_out: bool = False
    extract_mlp_out: bool = False
    extract_queries: bool = False
    extract_keys: bool = False
    extract_values: bool = False
    extract_head_queries: bool = False
    extract_head_keys: bool = False
    extract_head_values: bool = False
    extract_kv_head_keys: bool = False
    extract_kv_head_values: bool = False
    extract_head_z: bool = False
    extract_head_out: bool = False
    extract_head_values_projected: bool = False
    extract_head_keys_projected: bool = False
    extract_head_queries_projected: bool = False
    extract_attn_pattern: bool = False
    extract_attn_scores: bool = False
    extract_value_weighted_pattern: bool = False
    extract_last_layernorm: bool = False
    save_input_ids: bool = False
    save_logits: bool = True
    layers: tuple[int, ...] | None = None
    attn_heads: tuple[tuple[int, int | None], ...] | None = None
    attn_pattern_avg: Literal["none", "mean", "sum", "baseline_ratio"] = "none"
    attn_pattern_row_positions: tuple[Any, ...] | None = None
    avg: bool = False
    avg_over_example: bool = False
    keep_gradient: bool = False

    def __init__(self, **fields: Any) -> None:
        for older, newer in OLDER_NAMES.items():
            if fields.pop(older, False):
                fields.update(dict.fromkeys(newer, True))
        unknown = next((name for name in fields if name not in type(self).model_fields), None)
        if unknown is not None:
            raise RequestError(
                f"ExtractionConfig has no field {unknown!r}; {did_you_mean(unknown, type(self).model_fields)}"
            )
        super().__init__(**fields)

    @field_validator("layers", mode="before")
    @classmethod
    def _as_tuple(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return (given,)
        return tuple(given) if isinstance(given, list | range) else given

    @field_validator("attn_heads", mode="before")
    @classmethod
    def _pairs(cls, given: Any) -> Any:
        """(layer, head) pairs; head None for all heads of the layer."""
        if given is None or given == "all":
            return None
        if not isinstance(given, list | tuple) or not given:
            raise ValueError(
                '"all", or a list of {"layer": 3, "head": 5}, with "all" for all heads of a layer'
            )
        pairs = []
        for entry in given:
            if isinstance(entry, dict) and set(entry) == {"layer", "head"}:
                entry = (entry["layer"], None if entry["head"] == "all" else entry["head"])
            if not isinstance(entry, list | tuple) or len(entry) != 2:
                raise ValueError('each entry is {"layer": int, "head": int or "all"}')
            pairs.append(tuple(entry))
        return tuple(pairs)

    @field_validator("attn_pattern_row_positions", mode="before")
    @classmethod
    def _groups(cls, given: Any) -> Any:
        if isinstance(given, str | int):
            raise ValueError("a list of position groups, such as ['last']")
        return tuple(given) if isinstance(given, list) else given

    @model_validator(mode="after")
    def _agree(self) -> ExtractionConfig:
        if self.attn_pattern_avg != "none" and self.attn_pattern_row_positions is None:
            raise ValueError(
                "attn_pattern_avg averages blocks: give attn_pattern_row_positions for their rows"
            )
        if self.attn_pattern_row_positions is not None and not self.extract_attn_pattern:
            raise ValueError("attn_pattern_row_positions needs extract_attn_pattern=True")
        if self.keep_gradient and self.attn_pattern_avg == "baseline_ratio":
            raise ValueError(
                "keep_gradient with attn_pattern_avg='baseline_ratio' has no meaning: use 'mean' or 'sum'"
            )
        if self.keep_gradient and not self.fields():
            raise ValueError("keep_gradient gives gradients of extracted activations: extract at least one")
        return self

    def fields(self) -> tuple[str, ...]:
        """The extraction fields that are on, in the order of the model's computation."""
        return tuple(name for name in FIELDS if getattr(self, name))

    def is_not_empty(self) -> bool:
        """True when anything but logits is asked for."""
        return bool(self.fields()) or self.extract_last_layernorm or self.save_input_ids

    def to_dict(self) -> dict[str, Any]:
        """A copy as plain values."""
        return self.model_dump(mode="json")
