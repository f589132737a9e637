"""The table of hook names and the engine's sites. Read it top to bottom: it is the map between the two.

A name is `blocks.{i}.` followed by a row of the block table, or a row of the ends table. Rows whose site never fires in
a model (`TransformerConfig.absent_sites`) are no names of that model.
"""

from __future__ import annotations

from dataclasses import dataclass

from neuron_lens.hooks import TransformerHooks
from neuron_lens.shapes import Axis
from neuron_lens.transformer import TransformerConfig

__all__ = ["FLAGS", "PointPlace", "absent_names", "block_places", "end_places"]

# In the order of TransformerLens, which is not that of computation.
_BLOCK = {
    "ln1.hook_scale": "resid.torso.ln_attn.scale",
    "ln1.hook_normalized": "resid.torso.ln_attn.post_scale",
    "ln1_post.hook_scale": "resid.torso.ln_attn_out.scale",
    "ln1_post.hook_normalized": "resid.torso.ln_attn_out.post_scale",
    "ln2.hook_scale": "resid.torso.ln_mlp.scale",
    "ln2.hook_normalized": "resid.torso.ln_mlp.post_scale",
    "ln2_post.hook_scale": "resid.torso.ln_mlp_out.scale",
    "ln2_post.hook_normalized": "resid.torso.ln_mlp_out.post_scale",
    "attn.hook_q": "attn.q",
    "attn.hook_k": "attn.k",
    "attn.hook_v": "attn.v",
    "attn.hook_z": "attn.v_out",
    "attn.hook_attn_scores": "attn.qk_logits",
    "attn.hook_pattern": "attn.qk_probs",
    "attn.hook_result": "attn.result",
    "attn.hook_rot_q": "attn.rot_q",
    "attn.hook_rot_k": "attn.rot_k",
    "mlp.hook_pre": "mlp.pre_act",
    "mlp.hook_pre_linear": "mlp.pre_linear",
    "mlp.hook_post": "mlp.post_act",
    "mlp.hook_expert_weights": "mlp.router_probs",
    "mlp.hook_expert_indices": "mlp.expert_indices",
    "hook_attn_in": "resid.torso.attn_in",
    "hook_q_input": "attn.q_in",
    "hook_k_input": "attn.k_in",
    "hook_v_input": "attn.v_in",
    "hook_mlp_in": "resid.torso.mlp_in",
    "hook_attn_out": "resid.torso.delta_attn",
    "hook_mlp_out": "resid.torso.delta_mlp",
    "hook_resid_pre": "resid.torso.pre_attn",
    "hook_resid_mid": "resid.torso.post_attn",
    "hook_resid_post": "resid.torso.post_mlp",
}
# Of each expert, below `mlp.experts.{j}.`
_EXPERT = {
    "hook_gate": "mlp.expert_pre_act",
    "hook_pre": "mlp.expert_pre_linear",
    "hook_post": "mlp.expert_post_act",
}
_ENDS = {
    "hook_embed": "emb.tok",
    "hook_pos_embed": "emb.pos",
    "ln_final.hook_scale": "resid.ln_f.scale",
    "ln_final.hook_normalized": "resid.ln_f.post_scale",
    "unembed.hook_in": "resid.post_ln_f",
    "unembed.hook_out": "logits",
}

# Costly points, cached by default only when their switch is on; a hook on them opens them, switch or not.
FLAGS = {
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
    "attn.hook_result": "use_attn_result",
}

# Their tensors have batch and position in one axis.
_ROUTING = ("mlp.hook_expert_weights", "mlp.hook_expert_indices")

_TREE = {site.path: site.axes for site in TransformerHooks().sites()}


@dataclass(frozen=True)
class PointPlace:
    """Where a hook point is in the engine.

    name: below the block, or from the root at the ends. site: path of the engine's site. layer: block, or None.
    axes: the meaning of the tensor's dimensions. flag: the switch that makes a costly point part of full caches.
    expert: its number, inside one.
    """

    name: str
    site: str
    layer: int | None
    axes: tuple[Axis, ...]
    flag: str | None
    expert: int | None = None

    @property
    def joins_rows(self) -> bool:
        """Whether the point sees [batch · pos, …] where the engine has [batch, pos, …]."""
        return self.axes[:1] == ("token",) and self.expert is None

    @property
    def full_name(self) -> str:
        """From the root."""
        return self.name if self.layer is None else f"blocks.{self.layer}.{self.name}"


def block_places(config: TransformerConfig, layer: int) -> list[PointPlace]:
    """Every hook point of one block."""
    absent = config.absent_sites()
    places = []
    for name, site in _BLOCK.items():
        site = _site(name, site, config)
        if site not in absent:
            axes = _TREE[site] or ()
            if name in _ROUTING:
                axes = ("token", *axes[2:])
            places.append(PointPlace(name, site, layer, axes, FLAGS.get(name)))
    for expert in range(config.experts.n_experts if config.experts is not None else 0):
        for name, site in _EXPERT.items():
            axes = _TREE[site] or ()
            places.append(PointPlace(f"mlp.experts.{expert}.{name}", site, layer, axes, None, expert))
    return places


def end_places(config: TransformerConfig) -> list[PointPlace]:
    """Every hook point outside the blocks."""
    absent = config.absent_sites()
    sites = {name: _site(name, site, config) for name, site in _ENDS.items()}
    return [
        PointPlace(name, site, None, _TREE[site] or (), None)
        for name, site in sites.items()
        if site not in absent
    ]


def absent_names(config: TransformerConfig) -> dict[str, str]:
    """Names other models have and this one does not, with the reason."""
    absent = config.absent_sites()
    reasons = {name: absent[site] for name, site in _ENDS.items() if site in absent}
    for name, site in _BLOCK.items():
        site = _site(name, site, config)
        if site in absent:
            reasons |= {f"blocks.{layer}.{name}": absent[site] for layer in range(config.n_layers)}
    return reasons


def _site(name: str, site: str, config: TransformerConfig) -> str:
    """The site of a name where it depends on the model."""
    if name == "hook_embed" and config.embedding_norm:
        return "resid.post_emb"  # the classic embedding ends with its norm
    if name == "mlp.hook_expert_weights" and config.experts is not None and config.experts.bias:
        return "mlp.expert_weights"  # GPT-OSS's are those behind the choice
    if config.norm_place == "post" and name.startswith(("ln1.", "ln2.")):
        return site.replace("ln_attn.", "ln_attn_out.").replace("ln_mlp.", "ln_mlp_out.")
    if config.norm_place == "post" and name.startswith(("ln1_post.", "ln2_post.")):
        return site.replace("_out.", ".")  # absent: the one norm there is goes by the name above
    return site
