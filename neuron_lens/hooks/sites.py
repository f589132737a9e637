"""The sites of a transformer, nested as they are computed. This file is the map: read it top to bottom.

Every site is a `FwdBwdHooks` that declares its axes in the words of `neuron_lens.shapes`. Inside a block, the
model passes `layer=i`. An empty site costs next to nothing; one whose tensor is expensive (`attn.result`,
`attn.qk_logits`, the per-head inputs of attention) is computed only in the layers where something is hooked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from neuron_lens.hooks.tree import FwdBwdHooks, HookCollection
from neuron_lens.shapes import Axis

__all__ = [
    "AttentionHooks",
    "MLPHooks",
    "NormalizationHooks",
    "ResidualStreamHooks",
    "ResidualStreamTorsoHooks",
    "TransformerHooks",
]

STREAM: tuple[Axis, ...] = ("batch", "pos", "d_model")
PER_HEAD_STREAM: tuple[Axis, ...] = ("batch", "pos", "head", "d_model")
PER_KV_HEAD_STREAM: tuple[Axis, ...] = ("batch", "pos", "kv_head", "d_model")
HEADS: tuple[Axis, ...] = ("batch", "pos", "head", "d_head")
KV_HEADS: tuple[Axis, ...] = ("batch", "pos", "kv_head", "d_head")
PATTERN: tuple[Axis, ...] = ("batch", "head", "pos", "key_pos")
NEURONS: tuple[Axis, ...] = ("batch", "pos", "d_mlp")
EXPERTS: tuple[Axis, ...] = ("batch", "pos", "expert")
CHOICES: tuple[Axis, ...] = ("batch", "pos", "choice")
EXPERT_NEURONS: tuple[Axis, ...] = ("token", "d_mlp")


class NormalizationHooks(HookCollection):
    """Inside a norm: x − mean, the divisor, and their quotient before the norm's weight and bias.

    per_head: where the heads' inputs are hooked too, run these for each of the copies for queries, keys and values,
    [batch, pos, head or kv_head, d_model]; without it, hooking both is an error.
    """

    def __init__(self, *, per_layer: bool = True) -> None:
        super().__init__()
        self.per_head = False
        self.post_mean_subtraction = FwdBwdHooks(STREAM, per_layer=per_layer)
        self.scale = FwdBwdHooks(("batch", "pos", "one"), per_layer=per_layer)
        self.post_scale = FwdBwdHooks(STREAM, per_layer=per_layer)
        _adopt(self)


class AttentionHooks(HookCollection):
    """Inside attention. `q_in`, `k_in`, `v_in`: copies of the stream for each head, before the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.q_in = FwdBwdHooks(PER_HEAD_STREAM)
        self.k_in = FwdBwdHooks(PER_KV_HEAD_STREAM)
        self.v_in = FwdBwdHooks(PER_KV_HEAD_STREAM)
        self.q = FwdBwdHooks(HEADS)
        self.k = FwdBwdHooks(KV_HEADS)
        self.v = FwdBwdHooks(KV_HEADS)
        self.rot_q = FwdBwdHooks(HEADS)
        self.rot_k = FwdBwdHooks(KV_HEADS)
        self.qk_logits = FwdBwdHooks(PATTERN)
        self.qk_softmax_denominator = FwdBwdHooks(("batch", "head", "pos", "one"))
        self.qk_probs = FwdBwdHooks(PATTERN)
        self.v_out = FwdBwdHooks(HEADS)
        self.result = FwdBwdHooks(PER_HEAD_STREAM)
        _adopt(self)


class MLPHooks(HookCollection):
    """Inside the MLP: its neurons. `pre_linear` is the ungated branch of a gated MLP.

    In a mixture of experts: `router_logits`; `router_probs`, their softmax over all experts in float32, from which the
    experts are chosen; `expert_indices`, the experts each token uses, best first (whole numbers: they have no gradient);
    `expert_weights`, 0 for experts a token does not use. The sites `expert_pre_act`, `expert_pre_linear` and
    `expert_post_act` run once for each expert, on the tokens that use it: their context has `expert`, its number, and
    `tokens` [token], where in batch · pos each row is; tokens whose first choice it is come first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pre_act = FwdBwdHooks(NEURONS)
        self.pre_linear = FwdBwdHooks(NEURONS)
        self.post_act = FwdBwdHooks(NEURONS)
        self.router_logits = FwdBwdHooks(EXPERTS)
        self.router_probs = FwdBwdHooks(EXPERTS)
        self.expert_indices = FwdBwdHooks(CHOICES)
        self.expert_weights = FwdBwdHooks(EXPERTS)
        self.expert_pre_act = FwdBwdHooks(EXPERT_NEURONS)
        self.expert_pre_linear = FwdBwdHooks(EXPERT_NEURONS)
        self.expert_post_act = FwdBwdHooks(EXPERT_NEURONS)
        _adopt(self)


class ResidualStreamTorsoHooks(HookCollection):
    """The residual stream through one block."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_attn = FwdBwdHooks(STREAM)
        self.attn_in = FwdBwdHooks(PER_HEAD_STREAM)
        self.ln_attn = NormalizationHooks()
        self.post_ln_attn = FwdBwdHooks(STREAM)
        self.ln_attn_out = NormalizationHooks()
        self.delta_attn = FwdBwdHooks(STREAM)
        self.post_attn = FwdBwdHooks(STREAM)
        self.mlp_in = FwdBwdHooks(STREAM)
        self.ln_mlp = NormalizationHooks()
        self.post_ln_mlp = FwdBwdHooks(STREAM)
        self.ln_mlp_out = NormalizationHooks()
        self.delta_mlp = FwdBwdHooks(STREAM)
        self.post_mlp = FwdBwdHooks(STREAM)
        _adopt(self)


class ResidualStreamHooks(HookCollection):
    """The residual stream from the embedding to the final norm."""

    def __init__(self) -> None:
        super().__init__()
        self.post_emb = FwdBwdHooks(STREAM, per_layer=False)
        self.torso = ResidualStreamTorsoHooks()
        self.ln_f = NormalizationHooks(per_layer=False)
        self.post_ln_f = FwdBwdHooks(STREAM, per_layer=False)
        _adopt(self)


class EmbeddingHooks(HookCollection):
    """The token and position embeddings, before they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.tok = FwdBwdHooks(STREAM, per_layer=False)
        self.pos = FwdBwdHooks(STREAM, per_layer=False)
        _adopt(self)


class TransformerHooks(HookCollection):
    """The whole tree. An argument of `Transformer.forward`; the model itself holds no hooks.

    >>> hooks = TransformerHooks()
    >>> hooks.append_to_path("resid.torso.post_mlp.fwd", lambda x, layer: x * 2 if layer == 3 else None).is_empty()
    False
    """

    def __init__(self) -> None:
        super().__init__()
        self.emb = EmbeddingHooks()
        self.resid = ResidualStreamHooks()
        self.attn = AttentionHooks()
        self.mlp = MLPHooks()
        self.logits = FwdBwdHooks(("batch", "pos", "d_vocab"), per_layer=False)
        _adopt(self)

    def hooked_sites(self) -> list[FwdBwdHooks]:
        """Sites that hold at least one hook, in computation order."""
        found: list[FwdBwdHooks] = []
        _gather_hooked(self, found)
        return found


def _gather_hooked(node: HookCollection, found: list[FwdBwdHooks]) -> None:
    # asked at the start of every pass, so it appends to one list instead of passing each site up through generators
    for child in node._children.values():
        if isinstance(child, FwdBwdHooks):
            if child.has_any():
                found.append(child)
        elif isinstance(child, HookCollection):
            _gather_hooked(child, found)


class _SilentSite(FwdBwdHooks):
    """A site at which nothing is hooked and nothing can be: it answers without looking."""

    def has_any(self) -> bool:
        return False

    def acts_at(self, layer: int | None) -> bool:
        return False

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return x


def silent_tree() -> TransformerHooks:
    """The tree of a pass without hooks. Shared by all of them, so nobody may append to it."""
    tree = TransformerHooks()
    for site in tree.sites():
        site.__class__ = _SilentSite
    return tree


def _adopt(node: HookCollection) -> None:
    """Register the collections just set as attributes as children, in the order they were set."""
    for name, child in list(vars(node).items()):
        if isinstance(child, HookCollection):
            delattr(node, name)
            node.add_subhooks(name, child)
