"""What of TransformerLens' interface is offered, as a Markdown table: python scripts/transformer_lens_table.py

Names are those of HookedTransformer in TransformerLens 1.x to 3.x. Each is looked up in what
`neuron_lens.compat.install_as_transformer_lens` puts in its place.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neuron_lens.compat import install_as_transformer_lens

NAMES = {
    "HookedTransformer": """
        W_E W_E_pos W_K W_O W_Q W_U W_V W_gate W_in W_out W_pos QK OV b_K b_O b_Q b_U b_V b_in b_out accumulated_bias
        add_caching_hooks
        add_hook add_perma_hook all_composition_scores all_head_labels cache_all cache_some center_unembed
        center_writing_weights check_and_add_hook check_hooks_to_add clear_contexts cpu cuda fill_missing_keys fold_layer_norm
        fold_value_biases forward from_pretrained from_pretrained_no_processing generate generate_stream get_caching_hooks
        get_pos_offset get_residual get_token_position hook_points hooks init_weights input_to_embed list_hooks
        load_and_process_state_dict load_sample_training_dataset loss_fn move_model_modules_to_device mps n_params_total
        process_weights_ refactor_factored_attn_matrices remove_all_hook_fns reset_hooks run_with_cache run_with_hooks
        sample_datapoint set_tokenizer set_ungroup_grouped_query_attention set_use_attn_in set_use_attn_result
        set_use_hook_mlp_in set_use_split_qkv_input setup to to_single_str_token to_single_token to_str_tokens to_string
        to_tokens tokens_to_residual_directions""",
    "ActivationCache": """
        accumulated_resid apply_ln_to_stack apply_slice_to_batch_dim compute_head_results decompose_resid
        get_full_resid_decomposition get_neuron_results items keys logit_attrs logit_lens remove_batch_dim stack_activation
        stack_head_results stack_neuron_results to toggle_autodiff values""",
    "FactoredMatrix": """
        AB BA S T U V Vh collapse_l collapse_r eigenvalues get_corner make_even ndim norm pair shape svd unsqueeze""",
    "HookPoint": "add_hook add_perma_hook clear_context has_hooks layer remove_hooks enable_reshape",
    "HookedTransformerKeyValueCache": "init_cache freeze unfreeze append_attention_mask",
    "utils": """
        LocallyOverridenDefaults Slice SliceInput USE_DEFAULT_VALUE apply_softcap bootstrap_ci
        calc_fan_in_and_fan_out check_structure
        clear_huggingface_cache composition_scores download_file_from_hf enable_hf_retry filter_dict_by_prefix gelu_fast gelu_new
        get_act_name get_attention_mask get_best_available_device get_corner get_cumsum_along_dim get_dataset get_device
        get_input_with_manually_prepended_bos get_nested_attr get_offset_position_ids get_tokenizer_with_bos
        get_tokens_with_bos_removed init_kaiming_normal_ init_kaiming_uniform_ init_xavier_normal_ init_xavier_uniform_
        is_library_available is_lower_triangular is_square keep_single_column lm_accuracy lm_cross_entropy_loss logits_to_df
        override_or_use_default_value print_gpu_mem remove_batch_dim repeat_along_head_dimension resolve_device_map
        sample_logits set_nested_attr sign_flip_permutation_pvalue solu standard_error success_rate_ci
        temporarily_swap_parameter test_prompt tl_checkpoint_conversion to_numpy tokenize_and_concatenate
        tracr transpose warn_if_mps""",
    "patching": """
        generic_activation_patch make_df_from_ranges layer_pos_patch_setter layer_pos_head_vector_patch_setter
        layer_head_vector_patch_setter layer_head_pattern_patch_setter layer_head_pos_pattern_patch_setter
        layer_head_dest_src_pos_pattern_patch_setter get_act_patch_resid_pre get_act_patch_resid_mid get_act_patch_attn_out
        get_act_patch_mlp_out get_act_patch_attn_head_out_by_pos get_act_patch_attn_head_q_by_pos get_act_patch_attn_head_k_by_pos
        get_act_patch_attn_head_v_by_pos get_act_patch_attn_head_pattern_by_pos get_act_patch_attn_head_pattern_dest_src_pos
        get_act_patch_attn_head_out_all_pos get_act_patch_attn_head_q_all_pos get_act_patch_attn_head_k_all_pos
        get_act_patch_attn_head_v_all_pos get_act_patch_attn_head_pattern_all_pos get_act_patch_attn_head_all_pos_every
        get_act_patch_attn_head_by_pos_every get_act_patch_block_every get_act_patch_direct_path
        get_act_patch_direct_path_all_sources""",
    "head_detector": "detect_head HEAD_NAMES compute_head_attention_similarity_score get_supported_heads",
    "evals": """
        sanity_check induction_loss evaluate_on_dataset evaluate ioi_eval IOIDataset mmlu_eval make_mmlu_data_loader
        make_wiki_data_loader make_owt_data_loader make_pile_data_loader make_code_data_loader""",
    "train": "train HookedTransformerTrainConfig",
    "SVDInterpreter": "get_singular_vectors",
}


def table() -> str:
    """The rows, one for each class or module."""
    root = install_as_transformer_lens()
    tiny = root.HookedTransformer(
        {"n_layers": 1, "d_model": 4, "n_ctx": 2, "d_head": 2, "d_vocab": 3, "act_fn": "relu"}
    )
    _, cache = tiny.run_with_cache(torch.tensor([[0, 1]]))
    rows = ["| of TransformerLens | offered | refused, with what to use instead |", "|---|---|---|"]
    for owner, names in NAMES.items():
        held = {
            "HookedTransformer": tiny,
            "HookPoint": tiny.hook_embed,
            "ActivationCache": cache,
            "FactoredMatrix": tiny.QK,
        }
        found = held.get(owner) or getattr(root, owner)
        every = names.split()
        offered = [name for name in every if hasattr(type(found), name) or hasattr(found, name)]
        refused = ", ".join(f"`{name}`" for name in every if name not in offered)
        rows.append(f"| `{owner}` | {len(offered)} of {len(every)} | {refused or '–'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
