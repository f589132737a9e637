"""The table of extraction fields: the site each reads, and the key of what it keeps. Data, and lookups in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from neuron_lens.errors import RequestError, did_you_mean

__all__ = ["FIELDS", "Field", "Place", "named_place", "newer_key"]

Kind = Literal["stream", "packed", "head", "kv_of_head", "kv_head", "projected", "pattern"]


@dataclass(frozen=True)
class Field:
    """One kind of activation.

    site: path in the tree. key: its name in the cache, {l} and {h} filled in.
    kind: how keys are made of the site's tensor: "stream" as it is; "packed" heads side by side; "head" one key for each head;
        "kv_of_head" one for each query head, of the key/value head it reads; "kv_head" one for each key/value head; "projected"
        one for each query head, through its part of the output projection; "pattern" [query, key] for each head.
    """

    site: str
    key: str
    kind: Kind

    @property
    def per_head(self) -> bool:
        """True when keys name a head."""
        return "{h}" in self.key


FIELDS: dict[str, Field] = {
    "extract_embed": Field("resid.post_emb", "input_embeddings", "stream"),
    "extract_resid_in": Field("resid.torso.pre_attn", "resid_in_{l}", "stream"),
    "extract_resid_in_post_layernorm": Field(
        "resid.torso.post_ln_attn", "resid_in_post_layernorm_{l}", "stream"
    ),
    "extract_attn_in": Field("resid.torso.post_ln_attn", "attn_in_{l}", "stream"),
    "extract_queries": Field("attn.q", "queries_L{l}", "packed"),
    "extract_keys": Field("attn.k", "keys_L{l}", "packed"),
    "extract_values": Field("attn.v", "values_L{l}", "packed"),
    "extract_head_queries": Field("attn.q", "head_queries_L{l}H{h}", "head"),
    "extract_head_keys": Field("attn.k", "head_keys_L{l}H{h}", "kv_of_head"),
    "extract_head_values": Field("attn.v", "head_values_L{l}H{h}", "kv_of_head"),
    "extract_kv_head_keys": Field("attn.k", "kv_head_keys_L{l}H{h}", "kv_head"),
    "extract_kv_head_values": Field("attn.v", "kv_head_values_L{l}H{h}", "kv_head"),
    "extract_head_queries_projected": Field("attn.q", "projected_query_L{l}H{h}", "projected"),
    "extract_head_keys_projected": Field("attn.k", "projected_key_L{l}H{h}", "projected"),
    "extract_head_values_projected": Field("attn.v", "projected_value_L{l}H{h}", "projected"),
    "extract_attn_scores": Field("attn.qk_logits", "scores_L{l}H{h}", "pattern"),
    "extract_attn_pattern": Field("attn.qk_probs", "pattern_L{l}H{h}", "pattern"),
    "extract_value_weighted_pattern": Field("attn.qk_probs", "value_weighted_pattern_L{l}H{h}", "pattern"),
    "extract_head_z": Field("attn.v_out", "head_z_L{l}H{h}", "head"),
    "extract_head_out": Field("attn.result", "head_out_L{l}H{h}", "head"),
    "extract_attn_out": Field("resid.torso.delta_attn", "attn_out_{l}", "stream"),
    "extract_resid_mid": Field("resid.torso.post_attn", "resid_mid_{l}", "stream"),
    "extract_mlp_in": Field("resid.torso.post_ln_mlp", "mlp_in_{l}", "stream"),
    "extract_mlp_out": Field("resid.torso.delta_mlp", "mlp_out_{l}", "stream"),
    "extract_resid_out": Field("resid.torso.post_mlp", "resid_out_{l}", "stream"),
}

_BY_KEY = [
    (re.compile(re.escape(f.key).replace(r"\{l\}", r"(?P<l>\d+)").replace(r"\{h\}", r"(?P<h>\d+)")), name)
    for name, f in FIELDS.items()
]
_OLDER_KEYS = re.compile(r"(values|keys|queries)_(\d+)")


@dataclass(frozen=True)
class Place:
    """What a key names: a field, its layer and head (None where it has none)."""

    name: str
    layer: int | None
    head: int | None

    @property
    def field(self) -> Field:
        """The field's row of the table."""
        return FIELDS[self.name]


def newer_key(key: str) -> str:
    """A key of the earlier generation (`values_3`) as it is called now (`values_L3`); others as they are."""
    match = _OLDER_KEYS.fullmatch(key)
    return f"{match[1]}_L{match[2]}" if match else key


def named_place(key: str) -> Place:
    """What a key such as `head_out_L3H5` names. Raises RequestError with the nearest kinds when it names nothing."""
    for pattern, name in _BY_KEY:
        match = pattern.fullmatch(newer_key(key))
        if match:
            found = match.groupdict()
            return Place(
                name,
                int(found["l"]) if found.get("l") else None,
                int(found["h"]) if found.get("h") else None,
            )
    stem = re.sub(r"\d+", lambda _: "{}", key)
    known = {re.sub(r"\{[lh]\}", "{}", f.key): f.key for f in FIELDS.values()}
    raise RequestError(f"no activation is called {key!r}; {did_you_mean(stem, known)}")
