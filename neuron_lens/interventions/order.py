"""In which order the sites of a transformer are computed: what can be copied from where within one run."""

from __future__ import annotations

__all__ = ["computed_before"]

_NORM = ("post_mean_subtraction", "scale", "post_scale")
_BEFORE_BLOCKS = ("emb.tok", "emb.pos", "resid.post_emb")
_BLOCK = (
    "resid.torso.pre_attn",
    "resid.torso.attn_in",
    "attn.q_in",
    "attn.k_in",
    "attn.v_in",
    *(f"resid.torso.ln_attn.{part}" for part in _NORM),
    "resid.torso.post_ln_attn",
    *(f"attn.{site}" for site in ("q", "k", "v", "rot_q", "rot_k")),
    *(f"attn.{site}" for site in ("qk_logits", "qk_softmax_denominator", "qk_probs", "v_out", "result")),
    *(f"resid.torso.ln_attn_out.{part}" for part in _NORM),
    "resid.torso.delta_attn",
    "resid.torso.post_attn",
    "resid.torso.mlp_in",
    *(f"resid.torso.ln_mlp.{part}" for part in _NORM),
    "resid.torso.post_ln_mlp",
    *(f"mlp.{site}" for site in ("router_logits", "router_probs", "expert_indices", "expert_weights")),
    *(f"mlp.{site}" for site in ("pre_act", "pre_linear", "post_act")),
    *(f"resid.torso.ln_mlp_out.{part}" for part in _NORM),
    "resid.torso.delta_mlp",
    "resid.torso.post_mlp",
)
_BEHIND_BLOCKS = (*(f"resid.ln_f.{part}" for part in _NORM), "resid.post_ln_f", "logits")
_RANK = {
    path: (part, rank)
    for part, paths in enumerate((_BEFORE_BLOCKS, _BLOCK, _BEHIND_BLOCKS))
    for rank, path in enumerate(paths)
}


def computed_before(one: tuple[str, int | None], other: tuple[str, int | None]) -> bool:
    """Whether a site at a layer (None outside the blocks) is computed before another in every forward pass."""
    return _place(one) < _place(other)


def _place(site: tuple[str, int | None]) -> tuple[int, int, int]:
    path, layer = site
    part, rank = _RANK[path]
    return part, layer or 0, rank
