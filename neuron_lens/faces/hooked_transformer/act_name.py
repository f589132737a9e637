"""Short names of activations: `get_act_name("k", 6)` is `blocks.6.attn.hook_k`."""

from __future__ import annotations

import re

from neuron_lens.errors import RequestError

__all__ = ["get_act_name"]

_ALIASES = {"attn": "pattern", "attn_logits": "attn_scores", "key": "k", "query": "q", "value": "v"}
_ALIASES |= {"mlp_pre": "pre", "mlp_mid": "mid", "mlp_post": "post"}
_SUBLAYERS = {"a": "attn", "m": "mlp", "b": "", "block": "", "blocks": "", "attention": "attn"}
_OF_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_OF_MLP = ("pre", "post", "mid", "pre_linear")
_OF_NORMS = ("scale", "normalized")


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """The full name of an activation.

    name: short ("q", "resid_pre", "pattern", "scale"), short with a layer and sublayer in it ("k6", "pre5", "scale4ln1"),
        or already full.
    layer: block; None for what is outside blocks. layer_type: sublayer ("attn", "a", "mlp", "m", "ln1", "ln2").
    """
    if not isinstance(name, str):
        raise RequestError(f"expected the name of an activation; got {name!r}")
    if ("." in name or name.startswith("hook_")) and layer is None and layer_type is None:
        return name
    packed = re.fullmatch(r"([a-z_]+?)(\d+)([a-z]?.*)", name)
    if packed is not None and layer is None:
        name, layer, rest = packed[1].rstrip("_"), int(packed[2]), packed[3]
        layer_type = rest or layer_type
    layer_type = _SUBLAYERS.get(layer_type or "", layer_type)
    name = _ALIASES.get(name, name)
    if name in _OF_ATTENTION:
        layer_type = "attn"
    elif name in _OF_MLP:
        layer_type = "mlp"
    elif name in _OF_NORMS and layer is None:
        layer_type = "ln_final"
    prefix = "" if layer is None else f"blocks.{layer}."
    return f"{prefix}{f'{layer_type}.' if layer_type else ''}hook_{name}"
