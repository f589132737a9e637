"""What a transformer is made of: one frozen, closed configuration of independent choices.

A family of models is a row of choices, never a subclass; nothing is chosen by a name. Unknown fields are refused.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuron_lens.errors import ConfigError

__all__ = ["ExpertsConfig", "RotaryConfig", "RotaryScaling", "TransformerConfig"]

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "relu_squared", "silu", "solu"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})"[:300]
                if e["loc"]
                else e["msg"]
                for e in error.errors()
            )
            raise ConfigError(f"{type(self).__name__}: {problems}") from None


class RotaryScaling(_Frozen):
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    kind: "linear" divides positions by `factor`; "llama3" divides low frequencies only (Llama 3.1); "yarn" blends by
    wavelength (YaRN, arXiv 2309.00071); "longrope" divides each frequency by its own factor (Phi-3, arXiv 2402.13753).
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


class RotaryConfig(_Frozen):
    """Rotary position embedding (RoFormer, arXiv 2104.09864).

    base: wavelength base. dims: leading dimensions of each head that are rotated (all of d_head, or fewer).
    pairing: which dimensions turn together: "halves" (i with i + dims/2; NeoX, Llama) or "interleaved" (2i with
    2i + 1; GPT-J). local_base: base in layers that have a window, when it differs (Gemma 3); those are not scaled.
    """

    dims: int = Field(gt=0)
    base: float = 10_000.0
    pairing: Literal["halves", "interleaved"] = "halves"
    scaling: RotaryScaling | None = None
    local_base: float | None = None


class ExpertsConfig(_Frozen):
    """A mixture of experts in place of the MLP.

    n_experts, n_used: experts there are, and how many each token uses.
    weights: how the chosen experts are weighted: "softmax_of_chosen" (top-k of the router's logits, softmax among
    them; Mixtral, GPT-OSS), "softmax" (softmax over all, top-k, as they are; OLMoE).
    activation: "gated" is act(gate) · up; "clamped_swiglu" is GPT-OSS's (up clamped + 1) · gate · sigmoid(1.702 gate).
    limit: clamp of "clamped_swiglu". bias: experts' linear maps have biases. router_bias: so does the router.
    """

    n_experts: int = Field(gt=0)
    n_used: int = Field(gt=0)
    weights: Literal["softmax_of_chosen", "softmax"] = "softmax_of_chosen"
    activation: Literal["gated", "clamped_swiglu"] = "gated"
    limit: float = 7.0
    bias: bool = False
    router_bias: bool = False


class TransformerConfig(_Frozen):
    """A decoder-only transformer.

    Sizes. n_layers: blocks. d_model: width of the residual stream. n_heads, n_kv_heads: query heads, and key/value heads
    (None: as many). d_head: width of a head (None: d_model / n_heads). d_mlp: neurons of each MLP. d_vocab: rows of
    the embedding. n_ctx: longest sequence, in tokens.

    Norms. norm: "layer", "rms" or "none". norm_place: "pre" (before each sublayer), "post" (on each sublayer's
    output, before it is added; OLMo 2), "sandwich" (both; Gemma 2, 3). norm_offset: the stored weight is the true one minus 1
    (Gemma). norm_weight, norm_bias: the norms have them. final_norm: a norm before the unembedding.
    embedding_norm: a norm right after the embedding (BLOOM). qk_norm: norm of queries and keys: over each head with
    one shared weight ("head"; Qwen 3, Gemma 3), with a weight for each head ("per_head"; StableLM), or over all heads
    together ("full"; OLMo 2).

    Residual. parallel: attention and MLP read the same stream (GPT-J, NeoX, Falcon, Phi). shared_norm: and through the
    same norm. residual_scale: what each sublayer adds is multiplied by this (Granite).

    Positions. position: "learned", "rotary", "alibi" or "none". position_offset: rows of the position table
    skipped (OPT: 2). rotary: needed for "rotary". windows: for each layer how many last positions attention sees (None: all);
    an empty tuple means all layers see all.

    Attention. qkv_bias, out_bias. attention_scale: multiplies query · key (None: d_head ** -0.5). inverse_layer_scale: further
    divided by layer + 1. attention_softcap: cap · tanh(logits / cap). attention_sinks: each head has a learned logit that takes
    probability and gives nothing (GPT-OSS). clip_qkv: clamp of v, and of q and k behind their norms (OLMo).

    MLP. mlp: "plain", "gated", "experts" or "none" (attention-only models). activation. mlp_bias. experts: needed for "experts".

    Ends. d_vocab_out: logits of each position (None: d_vocab); other than d_vocab for models that classify. tied: the
    unembedding is the embedding. unembed_bias. embedding_scale, logit_scale: multipliers.
    logit_softcap: cap · tanh(logits / cap).
    """

    name: str = ""
    n_layers: int = Field(ge=0)
    d_model: int = Field(gt=0)
    n_heads: int = Field(gt=0)
    n_kv_heads: int = Field(default=None, gt=0)  # type: ignore[assignment]
    d_head: int = Field(default=None, gt=0)  # type: ignore[assignment]
    d_mlp: int = Field(default=0, ge=0)
    d_vocab: int = Field(gt=0)
    d_vocab_out: int = Field(default=None, gt=0)  # type: ignore[assignment]
    n_ctx: int = Field(gt=0)

    norm: Literal["layer", "rms", "none"] = "layer"
    norm_place: Literal["pre", "post", "sandwich"] = "pre"
    norm_eps: float = 1e-5
    norm_offset: bool = False
    norm_weight: bool = True
    norm_bias: bool = True
    final_norm: bool = True
    embedding_norm: bool = False
    qk_norm: Literal["none", "head", "per_head", "full"] = "none"

    parallel: bool = False
    shared_norm: bool = False
    residual_scale: float = 1.0

    position: Literal["learned", "rotary", "alibi", "none"] = "learned"
    position_offset: int = 0
    rotary: RotaryConfig | None = None
    windows: tuple[int | None, ...] = ()

    qkv_bias: bool = True
    out_bias: bool = True
    attention_scale: float | None = None
    inverse_layer_scale: bool = False
    attention_softcap: float | None = None
    attention_sinks: bool = False
    clip_qkv: float | None = None

    mlp: Literal["plain", "gated", "experts", "none"] = "plain"
    activation: Activation = "gelu_tanh"
    mlp_bias: bool = True
    experts: ExpertsConfig | None = None

    tied: bool = True
    unembed_bias: bool = False
    embedding_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_derived(cls, given: dict[str, Any]) -> dict[str, Any]:
        filled = dict(given)
        if filled.get("n_kv_heads") is None and "n_heads" in filled:
            filled["n_kv_heads"] = filled["n_heads"]
        if filled.get("d_vocab_out") is None and "d_vocab" in filled:
            filled["d_vocab_out"] = filled["d_vocab"]
        if filled.get("d_head") is None and isinstance(filled.get("n_heads"), int) and filled["n_heads"] > 0:
            filled["d_head"] = filled.get("d_model", 0) // filled["n_heads"]
        return filled

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if self.n_heads % self.n_kv_heads:
            problems.append(f"n_kv_heads ({self.n_kv_heads}) must divide n_heads ({self.n_heads})")
        if (self.position == "rotary") != (self.rotary is not None):
            problems.append(f"position {self.position!r} and rotary {self.rotary!r} contradict each other")
        if self.rotary is not None and (self.rotary.dims > self.d_head or self.rotary.dims % 2):
            problems.append(
                f"rotary.dims ({self.rotary.dims}) must be even and at most d_head ({self.d_head})"
            )
        if (self.mlp == "experts") != (self.experts is not None):
            problems.append(f"mlp {self.mlp!r} and experts {self.experts!r} contradict each other")
        if self.mlp != "none" and self.d_mlp < 1:
            problems.append(f"mlp {self.mlp!r} needs d_mlp of at least 1, got {self.d_mlp}")
        if self.experts is not None and self.experts.n_used > self.experts.n_experts:
            problems.append(
                f"experts.n_used ({self.experts.n_used}) exceeds experts.n_experts ({self.experts.n_experts})"
            )
        if self.windows and len(self.windows) != self.n_layers:
            problems.append(f"windows has {len(self.windows)} entries for {self.n_layers} layers")
        if self.tied and self.d_vocab_out != self.d_vocab:
            problems.append(
                f"tied embeddings have one vocabulary, not {self.d_vocab} in and {self.d_vocab_out} out"
            )
        if self.shared_norm and not self.parallel:
            problems.append("shared_norm needs parallel: a sequential block has two norms")
        if self.parallel and self.norm_place != "pre":
            problems.append(f"parallel blocks have their norms before, not {self.norm_place!r}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def window(self, layer: int) -> int | None:
        """How many last positions attention sees at a layer; None when all."""
        return self.windows[layer] if self.windows else None

    def scale(self, layer: int) -> float:
        """What query · key is multiplied by at a layer."""
        scale = self.d_head**-0.5 if self.attention_scale is None else self.attention_scale
        return scale / (layer + 1) if self.inverse_layer_scale else scale

    def absent_sites(self) -> dict[str, str]:
        """Sites that never fire in this model, each with the reason: hooking one is an error."""
        absent: dict[str, str] = {}

        def mark(reason: str, *paths: str) -> None:
            absent.update(dict.fromkeys(paths, reason))

        def norm_sites(name: str) -> list[str]:
            return [f"resid.{name}.{part}" for part in ("post_mean_subtraction", "scale", "post_scale")]

        if self.position != "learned":
            mark(f"positions are {self.position!r}, not a learned embedding", "emb.pos")
        if self.position != "rotary":
            mark(f"positions are {self.position!r}, not rotary", "attn.rot_q", "attn.rot_k")
        if self.n_kv_heads != self.n_heads:
            mark(
                "several heads share keys and values: use attn.q_in, attn.k_in, attn.v_in",
                "resid.torso.attn_in",
            )
        if self.parallel:
            mark("attention and MLP are parallel: nothing stands between them", "resid.torso.post_attn")
        if self.norm == "none" or self.norm_place == "post":
            mark(
                "no norm stands before the sublayers",
                *norm_sites("torso.ln_attn"),
                *norm_sites("torso.ln_mlp"),
            )
        if self.norm == "none" or self.norm_place == "pre":
            mark(
                "no norm stands after the sublayers",
                *norm_sites("torso.ln_attn_out"),
                *norm_sites("torso.ln_mlp_out"),
            )
        if self.norm == "none" or not self.final_norm:
            mark("the model has no final norm", *norm_sites("ln_f"))
        if self.mlp != "gated":
            mark(f"the MLP is {self.mlp!r}, not gated", "mlp.pre_linear")
        if self.mlp != "experts":
            routing = ("router_logits", "router_probs", "expert_indices", "expert_weights")
            inside = ("expert_pre_act", "expert_pre_linear", "expert_post_act")
            mark(f"the MLP is {self.mlp!r}, not experts", *(f"mlp.{site}" for site in routing + inside))
        if self.mlp in ("experts", "none"):
            mark(f"the MLP is {self.mlp!r}", "mlp.pre_act", "mlp.pre_linear", "mlp.post_act")
        if self.mlp == "none":
            torso = ("mlp_in", "post_ln_mlp", "delta_mlp")
            mark("the model has no MLP", *(f"resid.torso.{site}" for site in torso))
            mark("the model has no MLP", *norm_sites("torso.ln_mlp"), *norm_sites("torso.ln_mlp_out"))
        return absent
