"""Where activation patching takes its values from: any mapping of a clean run's activations, by sites or short names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.interventions.declared import site_named
from neuron_lens.interventions.tensors import Activations

__all__ = ["SHORT_NAMES", "needed_activations", "same_length", "site_of"]

# TransformerLens's short names of activations, and the sites they stand for.
SHORT_NAMES: dict[str, str] = {
    "resid_pre": "resid.torso.pre_attn",
    "resid_mid": "resid.torso.post_attn",
    "resid_post": "resid.torso.post_mlp",
    "attn_out": "resid.torso.delta_attn",
    "mlp_out": "resid.torso.delta_mlp",
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "rot_q": "attn.rot_q",
    "rot_k": "attn.rot_k",
    "z": "attn.v_out",
    "attn_scores": "attn.qk_logits",
    "pattern": "attn.qk_probs",
    "result": "attn.result",
    "pre": "mlp.pre_act",
    "pre_linear": "mlp.pre_linear",
    "post": "mlp.post_act",
}


def site_of(activation: str) -> str:
    """The site of a short name ("z"), or of its own path. Raises RequestError when there is none."""
    if activation in SHORT_NAMES:
        return SHORT_NAMES[activation]
    if "." in activation:
        return site_named(activation).path
    raise RequestError(f"no activation is called {activation!r}; {did_you_mean(activation, SHORT_NAMES)}")


def _short_of(site: str) -> str | None:
    return next((short for short, path in SHORT_NAMES.items() if path == site), None)


def needed_activations(clean: Mapping[Any, Tensor], site: str, layers: Iterable[int]) -> Activations:
    """A site's activations out of any mapping: by (site, layer), else by (short name, layer) as caches have them.

    Raises RequestError when a layer is missing.
    """
    short, found = _short_of(site), {}
    for layer in layers:
        for key in ((site, layer), (short, layer)):
            try:
                found[site, layer] = clean[key]
                break
            except (KeyError, RequestError):
                continue
        else:
            raise RequestError(
                f"the clean run's activations lack {site}, layer {layer} (or {short!r}); "
                f"record it: capture(model, tokens, {site!r})"
            )
    return Activations(found)


def same_length(activation: Tensor, site: str, length: int) -> None:
    """Raises RequestError when a clean activation has other positions than the corrupted prompts."""
    pos = (site_named(site).axes or ()).index("pos")
    if activation.shape[pos] != length:
        raise RequestError(
            f"the clean run has {activation.shape[pos]} positions and the corrupted one {length}: patching aligns them "
            f"position by position; choose prompts of equal length"
        )
