"""Everything that is compared, computed through the interface both libraries have."""

from __future__ import annotations

from typing import Any

import torch

WEIGHTS = ["W_E", "W_U", "b_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate"]
WEIGHTS += ["b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "W_pos", "W_E_pos"]


def methods(model: Any, cache: Any, tokens: torch.Tensor) -> dict[str, Any]:
    """Every decomposition, by the call that makes it."""
    stack = cache.decompose_resid()
    found = {
        "accumulated": cache.accumulated_resid(),
        "accumulated_ln": cache.accumulated_resid(
            layer=2, incl_mid=not model.cfg.parallel_attn_mlp, apply_ln=True
        ),
        "accumulated_final": cache.accumulated_resid(apply_ln=True, pos_slice=-1),
        "decompose": stack,
        "decompose_attn_ln": cache.decompose_resid(layer=2, mode="attn", apply_ln=True, pos_slice=(1, 5)),
        "logit_attrs": cache.logit_attrs(
            stack, tokens=tokens[:, :1].repeat(1, 10), incorrect_tokens=tokens.flip(1)
        ),
        "heads": cache.stack_head_results(layer=2, incl_remainder=True),
        "heads_ln": cache.stack_head_results(apply_ln=True, pos_slice=-1),
        "activation": cache.stack_activation("pattern"),
        "ln": cache.apply_ln_to_stack(stack, layer=1),
    }
    if model.cfg.num_experts is None:
        found |= neuron_methods(cache)
    if family_adds_biases(model):
        found["full"] = cache.get_full_resid_decomposition()
        found["full_mlps"] = cache.get_full_resid_decomposition(layer=2, expand_neurons=False, apply_ln=True)
    return found


def neuron_methods(cache: Any) -> dict[str, Any]:
    """Decompositions into neurons, which a mixture of experts has not."""
    return {
        "neurons": cache.get_neuron_results(1, neuron_slice=(3, 9), pos_slice=-2),
        "neuron_stack": cache.stack_neuron_results(
            layer=2, neuron_slice=[1, 5], incl_remainder=True, apply_ln=True
        ),
    }


def family_adds_biases(model: Any) -> bool:
    return not model.cfg.use_normalization_before_and_after and model.cfg.num_experts is None


def switched(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Full caches with each switch that changes what points there are."""
    grouped = model.cfg.n_key_value_heads is not None
    found: dict[str, torch.Tensor] = {}
    for name in ("use_split_qkv_input", "ungroup_grouped_query_attention" if grouped else "use_attn_in"):
        switch = getattr(model, f"set_{name}")
        switch(True)
        _, cache = model.run_with_cache(tokens)
        found |= {f"{name}/{point}": value for point, value in cache.items()}
        switch(False)
    return found


def everything(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        found = {"logits": logits, "loss": model(tokens, return_type="loss")}
        found["loss_per_token"] = model(tokens, return_type="loss", loss_per_token=True)
        found |= {f"cache/{name}": value for name, value in cache.items()}
        found |= {f"method/{name}": value for name, value in methods(model, cache, tokens).items()}
        for name in WEIGHTS:
            if name.endswith("pos") and model.cfg.positional_embedding_type != "standard":
                continue
            if model.cfg.num_experts is not None and name in ("W_in", "W_out", "W_gate", "b_in", "b_out"):
                continue
            value = getattr(model, name)
            if value is not None:
                found[f"weight/{name}"] = value
        if family_adds_biases(model):
            found["weight/accumulated_bias"] = model.accumulated_bias(2)
        for mode in "QKV":
            found[f"weight/composition_{mode}"] = model.all_composition_scores(mode)
        qk = model.QK[0, 1]
        found |= {"weight/QK_AB": qk.AB, "weight/QK_S": qk.S, "weight/QK_norm": model.QK.norm()}
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
        _, costly = model.run_with_cache(
            tokens, names_filter=lambda n: n.endswith(("result", "_input", "mlp_in"))
        )
        found |= {f"costly/{name}": value for name, value in costly.items()}
        model.set_use_attn_result(False)
        model.set_use_split_qkv_input(False)
        model.set_use_hook_mlp_in(False)
        found |= switched(model, tokens)
        found["generated"] = model.generate(
            # without a tokenizer the original's cached generation gives later tokens wrong positions
            tokens,
            max_new_tokens=6,
            do_sample=False,
            stop_at_eos=False,
            verbose=False,
            use_past_kv_cache=False,
        )
        found["stopped"] = model(tokens, stop_at_layer=2)
        found["started"] = model(found["stopped"], start_at_layer=2)
        found["sliced"] = model.run_with_cache(tokens, names_filter="blocks.1.attn.hook_q", pos_slice=-1)[1][
            "blocks.1.attn.hook_q"
        ]
    _, with_gradients = model.run_with_cache(tokens, return_type="loss", incl_bwd=True)
    found |= {f"gradient/{name}": value for name, value in with_gradients.items() if name.endswith("_grad")}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}
