"""The sites that published autoencoders name, as paths of the hook tree.

A name that is not known gives no site, never a guess: the loaders then leave `site_in` empty and say so in
the notes of the provenance, where the published name is kept.
"""

from __future__ import annotations

import re

from neuron_lens.autoencoders.config import Site

__all__ = ["published_name", "site_from_hookpoint", "site_from_name"]

# TransformerLens' names, inside a block (the form also used by Llama Scope and circuit-tracer).
_IN_BLOCK = {
    "hook_resid_pre": "resid.torso.pre_attn",
    "hook_resid_mid": "resid.torso.post_attn",
    "hook_resid_post": "resid.torso.post_mlp",
    "hook_attn_out": "resid.torso.delta_attn",
    "hook_mlp_out": "resid.torso.delta_mlp",
    "hook_mlp_in": "resid.torso.mlp_in",
    "ln1.hook_normalized": "resid.torso.ln_attn.post_scale",
    "ln2.hook_normalized": "resid.torso.ln_mlp.post_scale",
    "mlp.hook_in": "resid.torso.post_ln_mlp",
    "mlp.hook_out": "resid.torso.delta_mlp",
    "mlp.hook_pre": "mlp.pre_act",
    "mlp.hook_post": "mlp.post_act",
    "attn.hook_z": "attn.v_out",
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
}
_OUTSIDE = {"hook_embed": "emb.tok", "hook_pos_embed": "emb.pos"}

# Hugging Face modules, by what they return (or, for a transcoder, what they are given).
_MODULE_OUTPUT = {
    "": "resid.torso.post_mlp",
    "mlp": "resid.torso.delta_mlp",
    "attn": "resid.torso.delta_attn",
    "self_attn": "resid.torso.delta_attn",
    "attention": "resid.torso.delta_attn",
}
_MODULE_INPUT = {
    "": "resid.torso.pre_attn",
    "mlp": "resid.torso.post_ln_mlp",
    "attn": "resid.torso.post_ln_attn",
    "self_attn": "resid.torso.post_ln_attn",
    "attention": "resid.torso.post_ln_attn",
}


def site_from_name(name: str, layer: int | None = None, head: int | None = None) -> Site | None:
    """The site of a TransformerLens hook name, `blocks.3.hook_mlp_out`, or `hook_mlp_out` with `layer`."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if block:
        layer, name = int(block[1]), block[2]
    if name in _OUTSIDE:
        return Site(path=_OUTSIDE[name])
    path = _IN_BLOCK.get(name)
    return None if path is None else Site(path=path, layer=layer, head=head)


def site_from_hookpoint(hookpoint: str, *, of_input: bool = False) -> Site | None:
    """The site of a Hugging Face module path, `layers.3.mlp` or `h.0.attn` or `embed_tokens`."""
    if hookpoint in ("embed_tokens", "wte", "embed_in"):
        return None if of_input else Site(path="emb.tok")
    block = re.fullmatch(r"(?:model\.|transformer\.|gpt_neox\.)?(?:layers|h|blocks)\.(\d+)\.?(.*)", hookpoint)
    path = (_MODULE_INPUT if of_input else _MODULE_OUTPUT).get(block[2]) if block else None
    return None if block is None or path is None else Site(path=path, layer=int(block[1]))


def published_name(site: Site) -> str | None:
    """The TransformerLens hook name of a site, or None where it has none."""
    if site.layer is None:
        return next((name for name, path in _OUTSIDE.items() if path == site.path), None)
    name = next((name for name, path in _IN_BLOCK.items() if path == site.path), None)
    return None if name is None else f"blocks.{site.layer}.{name}"
