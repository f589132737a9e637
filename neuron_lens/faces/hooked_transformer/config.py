"""HookedTransformerConfig: the classic configuration, and its translation from and to the engine's."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import torch

from neuron_lens.errors import ConfigError, did_you_mean
from neuron_lens.transformer import TransformerConfig
from neuron_lens.transformer.config import RotaryConfig

__all__ = ["HookedTransformerConfig", "classic_config", "engine_config"]

# Classic activation names and the engine's.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
_ACTIVATIONS |= {
    "gelu_fast": "gelu_tanh",
    "gelu_quick": "gelu_quick",
    "relu2": "relu_squared",
    "swish": "silu",
    "solu": "solu",
}
_CLASSIC_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
_CLASSIC_ACTIVATIONS |= {"gelu_quick": "gelu_quick", "relu_squared": "relu2", "solu": "solu"}


# What a built model reads from its configuration at every use, or only describes it.
_LIVE = {"use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in", "output_logits_soft_cap"}
_LIVE |= {
    "ungroup_grouped_query_attention",
    "default_prepend_bos",
    "device",
    "init_mode",
    "initializer_range",
}
_LIVE |= {"seed", "init_weights", "model_name", "tokenizer_name", "tokenizer_prepends_bos", "n_params"}
_LIVE |= {"original_architecture", "from_checkpoint", "checkpoint_index", "checkpoint_label_type"}
_LIVE |= {"checkpoint_value", "trust_remote_code"}
_INSTEAD = {
    "dtype": "use model.to(dtype)",
    "n_ctx": "use from_pretrained(…, n_ctx=…)",
    "n_layers": "use stop_at_layer, or from_pretrained(…, first_n_layers=…)",
}


@dataclass
class HookedTransformerConfig:
    """What a HookedTransformer is made of, in the classic names.

    Sizes: n_layers, d_model, n_ctx, d_head, n_heads (default d_model / d_head), d_mlp (default 4 d_model),
    d_vocab, d_vocab_out, n_key_value_heads. Choices: act_fn, normalization_type ("LN", "LNPre", "RMS", "RMSPre" or
    None; "Pre" means folded), positional_embedding_type ("standard", "rotary", "alibi"), attn_only, gated_mlp,
    parallel_attn_mlp, attention_dir, soft caps (-1 for none), rotary_*. `use_*` switches: whether costly points are part
    of full caches. `init_mode`: "gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP".
    """

    n_layers: int
    d_model: int
    n_ctx: int
    d_head: int = -1
    model_name: str = "custom"
    n_heads: int = -1
    d_mlp: int | None = None
    act_fn: str | None = None
    d_vocab: int = -1
    eps: float = 1e-5
    use_attn_result: bool = False
    use_attn_scale: bool = True
    attn_scale: float = -1.0
    use_split_qkv_input: bool = False
    use_hook_mlp_in: bool = False
    use_attn_in: bool = False
    use_qk_norm: bool = False
    use_local_attn: bool = False
    ungroup_grouped_query_attention: bool = False
    original_architecture: str | None = None
    from_checkpoint: bool = False
    checkpoint_index: int | None = None
    checkpoint_label_type: str | None = None
    checkpoint_value: int | None = None
    tokenizer_name: str | None = None
    window_size: int | None = None
    attn_types: list[str] | None = None
    init_mode: str = "gpt2"
    normalization_type: str | None = "LN"
    device: str | torch.device | None = None
    n_devices: int = 1
    attention_dir: str = "causal"
    attn_only: bool = False
    seed: int | None = None
    initializer_range: float = -1.0
    init_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    positional_embedding_type: str = "standard"
    final_rms: bool = False
    d_vocab_out: int = -1
    parallel_attn_mlp: bool = False
    rotary_dim: int | None = None
    n_params: int | None = None
    use_hook_tokens: bool = False
    gated_mlp: bool = False
    default_prepend_bos: bool = True
    dtype: torch.dtype = torch.float32
    tokenizer_prepends_bos: bool | None = None
    n_key_value_heads: int | None = None
    post_embedding_ln: bool = False
    rotary_base: float = 10000
    trust_remote_code: bool = False
    rotary_adjacent_pairs: bool = False
    num_experts: int | None = None
    experts_per_token: int | None = None
    tie_word_embeddings: bool = False
    use_normalization_before_and_after: bool = False
    attn_scores_soft_cap: float = -1.0
    output_logits_soft_cap: float = -1.0
    clip_qkv: float | None = None

    def __post_init__(self) -> None:
        if self.d_head < 1 and self.n_heads > 0:
            self.d_head = self.d_model // self.n_heads
        if self.d_head < 1:
            raise ConfigError("HookedTransformerConfig needs d_head or n_heads")
        if self.n_heads == -1:
            self.n_heads = self.d_model // self.d_head
        if not self.attn_only:
            if self.d_mlp is None:
                self.d_mlp = 4 * self.d_model
            if self.act_fn is None:
                raise ConfigError(
                    "HookedTransformerConfig needs act_fn for a model with MLPs, or attn_only=True"
                )
        if self.d_vocab_out == -1:
            self.d_vocab_out = self.d_vocab
        if self.positional_embedding_type == "rotary" and self.rotary_dim is None:
            self.rotary_dim = self.d_head
        if self.use_attn_scale and self.attn_scale == -1.0:
            self.attn_scale = self.d_head**0.5
        if self.initializer_range < 0:
            self.initializer_range = 0.8 / self.d_model**0.5 if self.init_mode == "gpt2" else 1.0
        if isinstance(self.dtype, str):
            self.dtype = getattr(torch, self.dtype.removeprefix("torch."))
        if self.device is None:
            self.device = "cpu"
        if self.use_split_qkv_input and self.use_attn_in:
            raise ConfigError("use_split_qkv_input and use_attn_in exclude each other: choose one")
        if self.n_params is None:
            attention = self.n_layers * self.d_model * self.d_head * self.n_heads * 4
            mlp = (
                0
                if self.attn_only
                else self.n_layers * self.d_model * (self.d_mlp or 0) * (2 + self.gated_mlp)
            )
            self.n_params = attention + mlp

    def settled(self) -> Self:
        """A copy for a built model, in which what is built in cannot be assigned any more. Copies of it are free again."""
        own = copy.copy(self)
        own.__dict__["_settled"] = True
        return own

    def __setattr__(self, name: str, value: Any) -> None:
        if "_settled" in self.__dict__ and name in self.__dataclass_fields__ and name not in _LIVE:
            now = getattr(self, name)
            if value != now:
                advice = _INSTEAD.get(
                    name, f"build another model from dataclasses.replace(model.cfg, {name}={value!r})"
                )
                raise ConfigError(
                    f"cfg.{name} is {now!r} in the model that was built; assigning {value!r} would change nothing: {advice}"
                )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_settled"}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> HookedTransformerConfig:
        """From a dictionary. Raises ConfigError for fields there are none of."""
        known = {field.name for field in dataclasses.fields(cls)}
        wrong = [name for name in config_dict if name not in known]
        if wrong:
            raise ConfigError(
                f"HookedTransformerConfig has no field {wrong}; {did_you_mean(wrong[0], known)}"
            )
        return cls(**config_dict)

    @classmethod
    def unwrap(cls, config: dict[str, Any] | HookedTransformerConfig) -> HookedTransformerConfig:
        """A configuration, from one or from a dictionary."""
        return config if isinstance(config, HookedTransformerConfig) else cls.from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return dataclasses.asdict(self)

    def is_layer_norm_activation(self) -> bool:
        """Whether the MLP's activation ends with a norm."""
        return self.act_fn is not None and self.act_fn.endswith("_ln")


def engine_config(cfg: HookedTransformerConfig) -> TransformerConfig:
    """The engine's configuration of a classic one. Raises ConfigError, with all that the engine lacks at once."""
    problems = [message for wrong, message in _unsupported(cfg) if wrong]
    if problems:
        raise ConfigError(
            "HookedTransformerConfig asks for what this library does not have: " + "; ".join(problems)
        )
    rotary = None
    if cfg.positional_embedding_type == "rotary":
        pairing = "interleaved" if cfg.rotary_adjacent_pairs else "halves"
        rotary = RotaryConfig(dims=cfg.rotary_dim, base=float(cfg.rotary_base), pairing=pairing)
    windows: tuple[int | None, ...] = ()
    if cfg.use_local_attn:
        types = cfg.attn_types or []
        windows = tuple(
            cfg.window_size if types[i % len(types)] == "local" else None for i in range(cfg.n_layers)
        )
    norm = _norm_kind(cfg)
    return TransformerConfig(
        name=cfg.model_name,
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_head=cfg.d_head,
        d_mlp=0 if cfg.attn_only else cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        d_vocab_out=cfg.d_vocab_out,
        n_ctx=cfg.n_ctx,
        norm=norm,
        norm_place="sandwich" if cfg.use_normalization_before_and_after else "pre",
        norm_eps=cfg.eps,
        norm_bias=norm == "layer",
        embedding_norm=cfg.post_embedding_ln,
        qk_norm="head" if cfg.use_qk_norm else "none",
        parallel=cfg.parallel_attn_mlp,
        position={"standard": "learned"}.get(cfg.positional_embedding_type, cfg.positional_embedding_type),
        rotary=rotary,
        windows=windows,
        attention_scale=1.0 / cfg.attn_scale if cfg.use_attn_scale else 1.0,
        inverse_layer_scale=cfg.scale_attn_by_inverse_layer_idx,
        attention_softcap=cfg.attn_scores_soft_cap if cfg.attn_scores_soft_cap > 0 else None,
        clip_qkv=cfg.clip_qkv,
        mlp="none" if cfg.attn_only else ("gated" if cfg.gated_mlp else "plain"),
        activation=_ACTIVATIONS.get(cfg.act_fn or "", "relu"),
        tied=False,
        unembed_bias=True,
        logit_softcap=cfg.output_logits_soft_cap if cfg.output_logits_soft_cap > 0 else None,
    )


def classic_config(
    config: TransformerConfig, *, device: Any, dtype: torch.dtype, **known: Any
) -> HookedTransformerConfig:
    """The classic description of an engine's model. known: fields that the engine does not know."""
    kinds = {"layer": "LN", "rms": "RMS", "none": None}
    fields: dict[str, Any] = {
        "n_layers": config.n_layers,
        "d_model": config.d_model,
        "n_ctx": config.n_ctx,
        "d_head": config.d_head,
        "n_heads": config.n_heads,
        "n_key_value_heads": None if config.n_kv_heads == config.n_heads else config.n_kv_heads,
        "d_mlp": config.d_mlp or None,
        "d_vocab": config.d_vocab,
        "d_vocab_out": config.d_vocab_out,
        "act_fn": None if config.mlp == "none" else _CLASSIC_ACTIVATIONS[config.activation],
        "attn_only": config.mlp == "none",
        "gated_mlp": config.mlp == "gated",
        "eps": config.norm_eps,
        "attn_scale": 1.0 / config.scale(0),
        "normalization_type": kinds[config.norm],
        "final_rms": config.norm == "rms",
        "positional_embedding_type": {"learned": "standard"}.get(config.position, config.position),
        "parallel_attn_mlp": config.parallel,
        "use_local_attn": bool(config.windows),
        "attn_types": ["local" if w else "global" for w in config.windows] or None,
        "window_size": next((w for w in config.windows if w), None),
        "post_embedding_ln": config.embedding_norm,
        "use_qk_norm": config.qk_norm != "none",
        "use_normalization_before_and_after": config.norm_place == "sandwich",
        "scale_attn_by_inverse_layer_idx": config.inverse_layer_scale,
        "attn_scores_soft_cap": -1.0 if config.attention_softcap is None else config.attention_softcap,
        "output_logits_soft_cap": -1.0 if config.logit_softcap is None else config.logit_softcap,
        "tie_word_embeddings": config.tied,
        "clip_qkv": config.clip_qkv,
        "init_weights": False,
        "model_name": config.name or "custom",
        "device": str(device),
        "dtype": dtype,
    }
    if config.rotary is not None:
        fields |= {
            "rotary_dim": config.rotary.dims,
            "rotary_base": config.rotary.base,
            "rotary_adjacent_pairs": config.rotary.pairing == "interleaved",
        }
    if config.experts is not None:
        fields |= {"num_experts": config.experts.n_experts, "experts_per_token": config.experts.n_used}
    return HookedTransformerConfig(**{**fields, **known})


def _norm_kind(cfg: HookedTransformerConfig) -> str:
    if cfg.normalization_type is None:
        return "none"
    return "layer" if cfg.normalization_type.startswith("LN") else "rms"


def _unsupported(cfg: HookedTransformerConfig) -> list[tuple[bool, str]]:
    norms = ("LN", "LNPre", "RMS", "RMSPre", None)
    positions = ("standard", "rotary", "alibi", "none")
    return [
        (cfg.d_vocab < 1, "d_vocab must be given"),
        (
            cfg.normalization_type not in norms,
            f"normalization_type {cfg.normalization_type!r} (there are {norms})",
        ),
        (
            cfg.positional_embedding_type not in positions,
            f"positional_embedding_type {cfg.positional_embedding_type!r} (there are {positions})",
        ),
        (cfg.attention_dir != "causal", f"attention_dir {cfg.attention_dir!r} (only 'causal')"),
        (
            not cfg.attn_only and cfg.act_fn not in _ACTIVATIONS,
            f"act_fn {cfg.act_fn!r} (there are {', '.join(_ACTIVATIONS)})",
        ),
        (cfg.num_experts is not None, "experts built from a config (load a checkpoint instead)"),
        (cfg.n_devices != 1, "n_devices other than 1"),
        (
            cfg.use_local_attn and not (cfg.attn_types and cfg.window_size),
            "use_local_attn without attn_types and window_size",
        ),
    ]
