"""The named conversions of config fields, for what a plain copy cannot say.

Reads both spellings of Hugging Face's files: rotary settings as `rope_theta` and `rope_scaling` (to version 4) or as
`rope_parameters` (from 5), windows by `sliding_window` and a pattern or by `layer_types`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from neuron_lens.loading.definitions import CONVERSIONS

__all__ = ["FUNCTIONS", "Fields", "MissingField"]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
_REQUIRED = object()


class MissingField(Exception):
    """A field that a definition needs is not in config.json; the message is its name."""


class Fields:
    """The fields of a config.json, remembering which were read. `known`: our fields mapped so far."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self.known: Mapping[str, Any] = {}
        self._read: set[str] = set()

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """A field's value, or the default. Raises MissingField without one."""
        self._read.add(name)
        if name in self.raw:
            return self.raw[name]
        if default is _REQUIRED:
            raise MissingField(name)
        return default

    def first(self, names: tuple[str, ...], default: Any = _REQUIRED) -> Any:
        """The value of the first of `names` that is there; all count as read."""
        self._read.update(names)
        for name in names:
            if name in self.raw:
                return self.raw[name]
        if default is _REQUIRED:
            raise MissingField(" or ".join(names))
        return default

    def unread(self) -> list[str]:
        """Fields nobody asked for, sorted."""
        return sorted(set(self.raw) - self._read)


def _activation(fields: Fields, value: Any) -> str:
    if value not in _ACTIVATIONS:
        raise ValueError(f"the activation {value!r} is unknown; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _or_four_d_model(fields: Fields, value: Any) -> Any:
    return 4 * fields.known["d_model"] if value is None else value


def _sqrt(fields: Fields, value: float) -> float:
    return math.sqrt(value)


def _inverse(fields: Fields, value: float) -> float:
    return 1 / value


def _inverse_sqrt(fields: Fields, value: float) -> float:
    return 1 / math.sqrt(value)


def _windows(
    fields: Fields,
    value: None,
    *,
    size: str,
    default: int | None = None,
    types: str = "layer_types",
    enabled: str | None = None,
    from_layer: str | None = None,
    full_every: int | None = None,
    full_every_from: tuple[str, ...] = (),
) -> tuple[int | None, ...]:
    """The window of each layer.

    size: field with the window, `default` where it is absent. types: field that lists each layer's kind. Where that is
    absent: layers with the number `from_layer` and later have the window (None: all), but every `full_every`-th sees all
    (a field of `full_every_from` says another number). enabled: field without which nothing has a window.
    """
    window = fields.take(size, default)
    kinds = fields.take(types, None)
    on = enabled is None or bool(fields.take(enabled, False))
    first = 0 if from_layer is None else fields.take(from_layer, 0)
    if full_every is not None:
        full_every = fields.first(tuple(full_every_from), full_every)
    n_layers = fields.known["n_layers"]
    if not on or window is None or (isinstance(kinds, list) and not any(map(_is_local, kinds))):
        return ()
    if kinds is None and types != "layer_types":
        raise MissingField(types)
    if kinds is None:
        local = [i >= first and (full_every is None or (i + 1) % full_every != 0) for i in range(n_layers)]
    else:
        local = [_is_local(kind) for kind in kinds]
    return tuple(window if is_local else None for is_local in local)


def _is_local(kind: str) -> bool:
    known = {"sliding_attention": True, "local": True, "full_attention": False, "global": False}
    if kind not in known:
        raise ValueError(f"the kind of attention {kind!r} is unknown; known: {', '.join(known)}")
    return known[kind]


def _rotary(
    fields: Fields,
    value: None,
    *,
    base: str = "rope_theta",
    default_base: float = 10_000.0,
    fraction: str | None = None,
    default_fraction: float = 1.0,
    dims: str | None = None,
    pairing: str = "halves",
    local_base: str | None = None,
    default_local_base: float | None = None,
    original_context: str | None = None,
) -> dict[str, Any]:
    """Fields of RotaryConfig.

    base, fraction, dims, local_base, original_context: the fields that hold the wavelength base, the share of each head
    that is rotated (or the number of dimensions), the base in layers with a window, and the context before stretching.
    """
    whole = fields.take("rope_parameters", None) or {}
    scaling = dict(whole.get("full_attention", whole) or {})
    scaling.update(fields.take("rope_scaling", None) or {})
    local = whole.get("sliding_attention") or {}
    known, d_head = fields.known, fields.known.get("d_head")
    d_head = known["d_model"] // known["n_heads"] if d_head is None else d_head
    share = scaling.pop("partial_rotary_factor", None)
    stated_share = None if fraction is None else fields.take(fraction, None)
    share = next((s for s in (share, stated_share) if s is not None), default_fraction)
    stated_dims = None if dims is None else fields.take(dims, None)
    stated_base, theta = fields.take(base, None), scaling.pop("rope_theta", None)
    rotary: dict[str, Any] = {
        "dims": int(d_head * share) if stated_dims is None else stated_dims,
        "base": next((b for b in (theta, stated_base) if b is not None), default_base),
        "pairing": pairing,
    }
    stated_local = None if local_base is None else fields.take(local_base, None)
    if _kind(local) != "default":
        raise ValueError(f"rotary scaling {_kind(local)!r} in layers with a window is unknown")
    rotary["local_base"] = next(
        (b for b in (local.get("rope_theta"), stated_local, default_local_base) if b is not None), None
    )
    original = None if original_context is None else fields.take(original_context, None)
    rotary["scaling"] = _scaling(fields, scaling, original)
    return rotary


def _kind(scaling: Mapping[str, Any]) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {"su": "longrope"}.get(kind, kind)


def _scaling(fields: Fields, scaling: dict[str, Any], original: int | None) -> dict[str, Any] | None:
    """Fields of RotaryScaling, or None; a field nobody knows is refused."""
    kind, rest = _kind(scaling), dict(scaling)
    for name in ("rope_type", "type"):
        rest.pop(name, None)
    in_dict = rest.pop("original_max_position_embeddings", None)
    n_ctx: int = fields.known["n_ctx"]
    context: int = next(c for c in (original, in_dict, n_ctx) if c is not None)
    made: dict[str, Any] | None = None
    if kind == "default":
        pass
    elif kind == "linear":
        made = {"kind": kind, "factor": rest.pop("factor")}
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        made = {"kind": kind, "original_context": context, **{name: rest.pop(name) for name in names}}
    elif kind == "yarn":
        made = _yarn(rest, context, n_ctx)
    elif kind == "longrope":
        factor = rest.pop("factor", None)
        made = {
            "kind": kind,
            "original_context": context,
            "factor": n_ctx / context if factor is None else factor,
            "attention_factor": rest.pop("attention_factor", None),
            "short_factors": tuple(rest.pop("short_factor")),
            "long_factors": tuple(rest.pop("long_factor")),
        }
    else:
        raise ValueError(f"the rotary scaling {kind!r} is unknown; known: linear, llama3, yarn, longrope")
    if rest:
        raise ValueError(
            f"nothing reads the field(s) {', '.join(sorted(rest))} of the rotary scaling {kind!r}"
        )
    return made


def _yarn(rest: dict[str, Any], context: int, n_ctx: int) -> dict[str, Any]:
    """YaRN's fields, taken out of `rest`. The factor on cosines and sines follows DeepSeek's mscale where it is given."""
    factor = rest.pop("factor", None)
    factor = n_ctx / context if factor is None else factor
    attention, scale, scale_all = (
        rest.pop(n, None) for n in ("attention_factor", "mscale", "mscale_all_dim")
    )

    def stretch(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if attention is None:
        attention = stretch(scale) / stretch(scale_all) if scale and scale_all else stretch(1.0)
    return {
        "kind": "yarn",
        "factor": factor,
        "original_context": context,
        "attention_factor": attention,
        "beta_fast": rest.pop("beta_fast", None) or 32.0,
        "beta_slow": rest.pop("beta_slow", None) or 1.0,
        "truncate": rest.pop("truncate", True),
    }


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "activation": _activation,
    "inverse": _inverse,
    "inverse_sqrt": _inverse_sqrt,
    "or_four_d_model": _or_four_d_model,
    "rotary": _rotary,
    "sqrt": _sqrt,
    "windows": _windows,
}
for _name, _function in FUNCTIONS.items():
    _options = {p.name for p in inspect.signature(_function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert _options == CONVERSIONS[_name], f"{_name}: the options of function and closed set differ"
assert FUNCTIONS.keys() == CONVERSIONS.keys(), "every named conversion has a function"
