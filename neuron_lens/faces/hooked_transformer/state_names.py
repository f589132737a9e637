"""Names and layouts of weights in a classic state dict, and those of the engine. A table of two columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer import Transformer, TransformerConfig

__all__ = ["StateName", "state_names", "to_classic_state", "to_engine_state"]

# Buffers of classic checkpoints that are computed here.
_COMPUTED = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos", "attn.alibi")
ENGINE = "engine."


class StateName(NamedTuple):
    """One weight: its classic name, the engine's, and the two changes of layout (views)."""

    classic: str
    engine: str
    to_classic: Callable[[Tensor], Tensor]
    to_engine: Callable[[Tensor], Tensor]


def state_names(config: TransformerConfig) -> list[StateName]:
    """Every weight the engine may have for this configuration, in the classic order."""

    def same(x: Tensor) -> Tensor:
        return x

    def turned(x: Tensor) -> Tensor:
        return x.T

    def in_heads(x: Tensor) -> Tensor:  # [head · d_head, d_model] -> [head, d_model, d_head]
        return x.unflatten(0, (-1, config.d_head)).mT

    def from_heads(x: Tensor) -> Tensor:
        return x.mT.flatten(0, 1)

    def out_heads(x: Tensor) -> Tensor:  # [d_model, head · d_head] -> [head, d_head, d_model]
        return x.unflatten(1, (-1, config.d_head)).permute(1, 2, 0)

    def from_out_heads(x: Tensor) -> Tensor:
        return x.permute(2, 0, 1).flatten(1)

    def bias_heads(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, config.d_head))

    def from_bias_heads(x: Tensor) -> Tensor:
        return x.flatten()

    shared = "_" if config.n_kv_heads != config.n_heads else ""
    rows = [
        StateName("embed.W_E", "embed.weight", same, same),
        StateName("pos_embed.W_pos", "pos_embed.weight", same, same),
        StateName("embed.ln.w", "embed_norm.weight", same, same),
        StateName("embed.ln.b", "embed_norm.bias", same, same),
    ]
    post = config.norm_place == "post"
    norms = {"ln1": "ln_attn_out" if post else "ln_attn", "ln2": "ln_mlp_out" if post else "ln_mlp"}
    norms |= {} if post else {"ln1_post": "ln_attn_out", "ln2_post": "ln_mlp_out"}
    for layer in range(config.n_layers):
        block = f"blocks.{layer}."
        for name, engine in norms.items():
            rows.append(StateName(f"{block}{name}.w", f"{block}{engine}.weight", same, same))
            rows.append(StateName(f"{block}{name}.b", f"{block}{engine}.bias", same, same))
        for name, engine in (("W_Q", "q"), (f"{shared}W_K", "k"), (f"{shared}W_V", "v")):
            attn = f"{block}attn."
            rows.append(StateName(f"{attn}{name}", f"{attn}{engine}.weight", in_heads, from_heads))
            bias = name.replace("W", "b")
            rows.append(StateName(f"{attn}{bias}", f"{attn}{engine}.bias", bias_heads, from_bias_heads))
        rows.append(StateName(f"{attn}W_O", f"{attn}out.weight", out_heads, from_out_heads))
        rows.append(StateName(f"{attn}b_O", f"{attn}out.bias", same, same))
        for norm in ("q_norm", "k_norm"):
            rows.append(StateName(f"{attn}{norm}.w", f"{attn}{norm}.weight", same, same))
        if config.mlp in ("plain", "gated"):
            for name, engine in (("in", "up"), ("gate", "gate"), ("out", "down")):
                mlp = f"{block}mlp."
                rows.append(StateName(f"{mlp}W_{name}", f"{mlp}{engine}.weight", turned, turned))
                rows.append(StateName(f"{mlp}b_{name}", f"{mlp}{engine}.bias", same, same))
    rows += [
        StateName("ln_final.w", "ln_f.weight", same, same),
        StateName("ln_final.b", "ln_f.bias", same, same),
        StateName("unembed.W_U", "unembed.weight", turned, turned),
        StateName("unembed.b_U", "unembed.bias", same, same),
    ]
    return rows


def to_classic_state(model: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    """Hook after `state_dict`: the engine's entries become classic ones. Weights without a classic name keep theirs."""
    start = prefix + ENGINE
    own = {name.removeprefix(start): state.pop(name) for name in list(state) if name.startswith(start)}
    for row in state_names(model.engine.config):
        if row.engine in own:
            state[prefix + row.classic] = row.to_classic(own.pop(row.engine))
    state.update({prefix + name: tensor for name, tensor in own.items()})


def to_engine_state(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`: classic entries become the engine's. Entries of neither kind are left to torch."""
    engine: Transformer = model.engine
    own = dict(engine.state_dict())
    for row in state_names(engine.config):
        given = state.pop(prefix + row.classic, None)
        if given is None:
            continue
        if row.engine in own:
            state[prefix + ENGINE + row.engine] = row.to_engine(given)
        elif row.classic.rpartition(".")[2].lstrip("_").startswith("b") and not bool(given.any()):
            continue  # a bias of zeros, and the engine has none
        else:
            state[prefix + row.classic] = given  # unexpected: torch says so
    ends = [state.get(f"{prefix}{ENGINE}{name}.weight") for name in ("embed", "unembed")]
    if (
        engine.config.tied
        and ends[0] is not None
        and ends[1] is not None
        and not torch.equal(ends[0], ends[1])
    ):
        raise RequestError(
            "the model's unembedding is its embedding, and the given W_E and W_U differ; load them into a model with "
            "processed weights, or one built from a HookedTransformerConfig"
        )
    for name in own:
        if prefix + name in state:
            state[prefix + ENGINE + name] = state.pop(prefix + name)
    for name in [n for n in state if n.startswith(prefix) and n.endswith(_COMPUTED)]:
        del state[name]
    if (model.cfg.normalization_type or "").endswith("Pre"):
        _fill_folded_norms(engine, state, prefix + ENGINE)


def _fill_folded_norms(engine: Transformer, state: dict[str, Any], start: str) -> None:
    """Folded checkpoints have no norm weights: they are 1, and biases 0."""
    value = 0.0 if engine.config.norm_offset else 1.0
    for name, tensor in engine.state_dict().items():
        owner, _, kind = name.rpartition(".")
        if owner.rpartition(".")[2] in ("ln_attn", "ln_mlp", "ln_f") and start + name not in state:
            state[start + name] = torch.full_like(tensor, value if kind == "weight" else 0.0)
