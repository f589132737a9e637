"""Names that the original or its successor has and this library does not, with what to use instead."""

from __future__ import annotations

__all__ = ["OF_CACHES", "OF_HOOK_POINTS", "OF_MODELS", "OF_UTILS", "not_offered"]

_WEIGHTS = "the weights are model.W_Q … model.b_out, stacked over layers, and model.blocks[i].attn.W_Q …"
_ONE_KIND = "every block has attention: use model.QK, model.OV and model.blocks"
_LOADING = "use from_pretrained, which takes names, folders and hf_model="
_STATES = "the models offered have attention, and no recurrent states"

OF_MODELS = {
    "load_sample_training_dataset": "it needs a download: model.dataset = utils.get_dataset(path) reads files of yours",
    "hf_generate": "use generate",
    "diffusion_generate": "use generate; the models offered write one token after another",
    "enable_compatibility_mode": "use process_weights_",
    "process_weights": "use process_weights_",
    "list_supported_models": "neuron_lens.loading.known_models() lists what is known to load",
    "check_model_support": "from_pretrained says what a checkpoint lacks",
    "prepare_multimodal_inputs": "the models offered read text",
    "attn_head_labels": "use all_head_labels: every block has attention",
    "block_hooks": "use model.blocks[i].named_modules(), or names_filter='blocks.3.*'",
    "block_submodules": "use model.blocks[i].named_children()",
}
OF_MODELS |= dict.fromkeys(("boot_transformers", "boot_native", "boot_vllm", "boot_inspect"), _LOADING)
OF_MODELS |= dict.fromkeys(
    ("tl_parameters", "tl_named_parameters", "get_params", "stack_params_for"), _WEIGHTS
)
OF_MODELS |= dict.fromkeys(
    ("blocks_with", "layer_types", "QK_for_attn_layers", "OV_for_attn_layers"), _ONE_KIND
)

OF_CACHES = dict.fromkeys(
    ("ssm_layers", "compute_ssm_effective_attention", "compute_ssm_state", "compute_ssm_states"), _STATES
)

OF_HOOK_POINTS = dict.fromkeys(
    ("enable_reshape", "hook_conversion"),
    "points of heads see [batch, pos, head, d_head] already; elsewhere let the hook reshape what it is given, and return "
    "it as it was",
)

OF_UTILS = {
    "clear_huggingface_cache": "delete the folder yourself: its path is huggingface_hub.constants.HF_HUB_CACHE",
    "download_file_from_hf": "use huggingface_hub.hf_hub_download",
    "enable_hf_retry": "huggingface_hub tries again by itself",
    "resolve_device_map": "a model is on one device: model.to(device)",
    "tracr": "give the weights to HookedTransformer(cfg).load_state_dict",
    "tl_checkpoint_conversion": "HookedTransformer(cfg).load_state_dict reads classic checkpoints as they are",
}


def not_offered(owner: str, name: str, instead: str) -> AttributeError:
    """The error that says so."""
    return AttributeError(f"{owner} does not offer {name!r}: {instead}")
