"""Every published format: what is loaded computes the published formula, and damage is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from neuron_lens.autoencoders import Site, load_autoencoder, load_autoencoders
from neuron_lens.errors import CheckpointError, RequestError

from .published import (
    STANDARD,
    Arrays,
    D,
    S,
    affine,
    close,
    decoded,
    inputs,
    random_arrays,
    relu,
    saelens_cfg,
    topk,
    write_json,
    write_pickle,
    write_saelens,
    write_safetensors,
)

# A case writes its files into a folder and gives the path to load, and what to expect for inputs x.
Expected = Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray]]  # x -> latents, output
Case = Callable[[Path, Arrays], tuple[Path, Expected]]


def saelens_standard(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    write_saelens(folder, a, STANDARD, saelens_cfg("standard"))

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a, a["b_dec"]))
        return latents, decoded(latents, a)

    return folder, expected


def saelens_gated(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    write_saelens(folder, a, ["W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"], saelens_cfg("gated"))

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        centred = x.double().numpy() - a["b_dec"]
        gate = centred @ a["W_enc"] + a["b_gate"] > 0
        latents = gate * relu(centred @ (a["W_enc"] * np.exp(a["r_mag"])) + a["b_mag"])
        return latents, decoded(latents, a)

    return folder, expected


def saelens_topk(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    write_saelens(folder, a, STANDARD, saelens_cfg("topk", k=3, rescale_acts_by_decoder_norm=True))
    norms = np.linalg.norm(a["W_dec"].astype(float), axis=1)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = topk(affine(x, a, a["b_dec"]) * norms, 3)
        return latents, decoded(latents / norms, a)

    return folder, expected


def saelens_jumprelu_layer_norm(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    cfg = saelens_cfg("jumprelu", normalize_activations="layer_norm", apply_b_dec_to_input=False)
    write_saelens(folder, a, [*STANDARD, "threshold"], cfg)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        numpy = x.double().numpy()
        mean, std = numpy.mean(1, keepdims=True), numpy.std(1, ddof=1, keepdims=True)
        h = affine(torch.from_numpy((numpy - mean) / (std + 1e-5)), a)
        latents = relu(h) * (h > a["threshold"])
        return latents, decoded(latents, a) * std + mean

    return folder, expected


def saelens_rescaled(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    write_saelens(folder, a, STANDARD, saelens_cfg("standard", normalize_activations="constant_norm_rescale"))

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        factor = D**0.5 / np.linalg.norm(x.double().numpy(), axis=1, keepdims=True)
        latents = relu(affine(x.double() * torch.from_numpy(factor), a, a["b_dec"]))
        return latents, decoded(latents, a) / factor

    return folder, expected


def saelens_unfolded_scale(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    cfg = saelens_cfg("standard", normalize_activations="expected_average_only_in")
    write_saelens(folder, a, STANDARD, cfg)
    write_json(folder / "activation_scaler.json", {"scaling_factor": 0.4})

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(0.4 * x.double(), a, a["b_dec"]))
        return latents, decoded(latents, a) / 0.4

    return folder, expected


def saelens_skip_transcoder(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    metadata = {"hook_name": "blocks.2.ln2.hook_normalized", "hook_name_out": "blocks.2.hook_mlp_out"}
    cfg = saelens_cfg("skip_transcoder", d_out=D, apply_b_dec_to_input=False, metadata=metadata)
    write_saelens(folder, a, [*STANDARD, "W_skip"], cfg)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a))
        return latents, decoded(latents, a) + x.double().numpy() @ a["W_skip"]

    return folder, expected


def saelens_before_6(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    cfg = {
        "d_in": D,
        "d_sae": S,
        "dtype": "torch.float32",
        "hook_point": "blocks.5.hook_resid_pre",
        "hook_point_head_index": None,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "normalize_activations": False,
        "model_name": "gpt2",
        "lr": 0.1,
    }
    write_saelens(folder, {**a, "scaling_factor": np.ones(S)}, [*STANDARD, "scaling_factor"], cfg)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = topk(affine(x, a, a["b_dec"]), 4)
        return latents, decoded(latents, a)

    return folder, expected


def saelens_finetuned_scale(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    factor = np.linspace(0.5, 2, S).astype(np.float32)
    cfg = {"d_in": D, "d_sae": S, "hook_name": "hook_embed", "finetuning_scaling_factor": True}
    write_saelens(folder, {**a, "scaling_factor": factor}, [*STANDARD, "scaling_factor"], cfg)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a, a["b_dec"]))
        return latents, decoded(latents * factor, a)

    return folder, expected


def openai_relu(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "gpt2-small" / "resid_delta_mlp" / "autoencoders" / "8.pt"
    write_pickle(path, openai_values(a) | {"activation": "ReLU", "activation_state_dict": {}})

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a, a["b_dec"]))
        return latents, decoded(latents, a)

    return path, expected


def openai_values(a: Arrays) -> dict[str, Any]:
    return {
        "encoder.weight": a["W_enc"].T,
        "decoder.weight": a["W_dec"].T,
        "pre_bias": a["b_dec"],
        "latent_bias": a["b_enc"],
        "stats_last_nonzero": torch.zeros(S, dtype=torch.int64),
        "latents_activation_frequency": torch.zeros(S),
        "latents_mean_square": torch.zeros(S),
    }


def openai_topk(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "resid_post_mlp" / "layer_8.pt"
    state = {"k": 4, "postact_fn": "ReLU"}
    write_pickle(path, openai_values(a) | {"activation": "TopK", "activation_state_dict": state})

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        numpy = x.double().numpy()
        mean, std = numpy.mean(1, keepdims=True), numpy.std(1, ddof=1, keepdims=True)
        latents = topk(affine(torch.from_numpy((numpy - mean) / (std + 1e-5)), a, a["b_dec"]), 4)
        return latents, decoded(latents, a) * std + mean

    return path, expected


def gemma_scope_1(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **{name: a[name] for name in [*STANDARD, "threshold"]})
    return path, jumprelu_formula(a)


def jumprelu_formula(a: Arrays, skip: bool = False) -> Expected:
    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        h = affine(x, a)
        latents = h * (h > a["threshold"])
        return latents, decoded(latents, a) + (x.double().numpy() @ a["W_skip"] if skip else 0)

    return expected


def gemma_scope_2_values(a: Arrays) -> Arrays:
    names = {"W_enc": "w_enc", "W_dec": "w_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
    return {published: a[name] for name, published in names.items()}


def gemma_scope_2_transcoder(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "transcoder_all" / "layer_5_width_16k_l0_small_affine"
    write_safetensors(
        path / "params.safetensors", gemma_scope_2_values(a) | {"affine_skip_connection": a["W_skip"]}
    )
    write_json(path / "config.json", {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"})
    return path, jumprelu_formula(a, skip=True)


def dictionary(folder: Path, kind: str, values: dict[str, Any], **trainer: Any) -> Path:
    write_pickle(folder / "ae.pt", values)
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": S, "lm_name": "gpt2", **trainer}
    trainer |= {"layer": 3, "submodule_name": "resid_post_layer_3"}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    return folder


def dl_auto_encoder(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    values = linear_values(a) | {"bias": a["b_dec"]}

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a, a["b_dec"]))
        return latents, decoded(latents, a)

    return dictionary(folder, "AutoEncoder", values), expected


def linear_values(a: Arrays) -> dict[str, Any]:
    return {"encoder.weight": a["W_enc"].T, "encoder.bias": a["b_enc"], "decoder.weight": a["W_dec"].T}


def dl_gated(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    values: dict[str, Any] = {
        "decoder_bias": a["b_dec"],
        "r_mag": a["r_mag"],
        "gate_bias": a["b_gate"],
        "mag_bias": a["b_mag"],
        "encoder.weight": a["W_enc"].T,
        "decoder.weight": a["W_dec"].T,
    }

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        enc = (x.double().numpy() - a["b_dec"]) @ a["W_enc"]
        latents = (enc + a["b_gate"] > 0) * relu(np.exp(a["r_mag"]) * enc + a["b_mag"])
        return latents, decoded(latents, a)

    return dictionary(folder, "GatedAutoEncoder", values), expected


def dl_topk(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    values = linear_values(a) | {"b_dec": a["b_dec"], "k": torch.tensor(3), "threshold": torch.tensor(99.0)}

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = topk(relu(affine(x, a, a["b_dec"])), 3)
        return latents, decoded(latents, a)

    return dictionary(folder, "AutoEncoderTopK", values, k=3), expected


def threshold_formula(a: Arrays, threshold: float) -> Expected:
    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        acts = relu(affine(x, a, a["b_dec"]))
        latents = acts * (acts > threshold)
        return latents, decoded(latents, a)

    return expected


def dl_matryoshka(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    values = {name: a[name] for name in STANDARD} | {
        "k": torch.tensor(3),
        "threshold": torch.tensor(0.8),
        "group_sizes": torch.tensor([4, 12]),
    }
    return dictionary(folder, "MatryoshkaBatchTopKSAE", values), threshold_formula(a, 0.8)


def dl_jumprelu(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    values = {name: a[name] for name in [*STANDARD, "threshold"]}

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        h = affine(x, a)
        latents = relu(h) * (h > a["threshold"])
        return latents, decoded(latents, a)

    return dictionary(folder, "JumpReluAutoEncoder", values), expected


def sparsify_values(a: Arrays) -> Arrays:
    return {
        "encoder.weight": a["W_enc"].T,
        "encoder.bias": a["b_enc"],
        "W_dec": a["W_dec"],
        "b_dec": a["b_dec"],
    }


def sparsify_group_max_transcoder(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "layers.4.mlp"
    write_safetensors(path / "sae.safetensors", sparsify_values(a) | {"W_skip": a["W_skip"].T})
    cfg = {"activation": "groupmax", "k": 4, "num_latents": S, "expansion_factor": 32, "d_in": D}
    write_json(path / "cfg.json", cfg | {"skip_connection": True, "transcode": True})

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        acts = relu(affine(x, a))
        latents = np.zeros_like(acts)
        for row, group in np.ndindex(len(acts), 4):
            best = group * 4 + int(np.argmax(acts[row, group * 4 : group * 4 + 4]))
            latents[row, best] = acts[row, best]
        return latents, decoded(latents, a) + x.double().numpy() @ a["W_skip"]

    return path, expected


def llama_scope_1(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "Llama3_1-8B-Base-L15R-8x"
    write_safetensors(
        path / "checkpoints" / "final.safetensors", linear_values(a) | {"decoder.bias": a["b_dec"]}
    )
    norms = {"in": 10.8125, "out": 7.5}
    config = {"d_model": D, "d_sae": S, "hook_point_in": "blocks.15.hook_resid_post"}
    config |= {"jump_relu_threshold": 0.3555, "dataset_average_activation_norm": norms}
    write_json(path / "hyperparams.json", config)
    s_in, s_out = D**0.5 / 10.8125, D**0.5 / 7.5

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        h = x.double().numpy() @ a["W_enc"] + a["b_enc"] / s_in
        latents = relu(h) * (h > 0.3555)
        return latents, latents @ (a["W_dec"] * s_in / s_out) + a["b_dec"] / s_out

    return path, expected


def llama_scope_distilled(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    config = {"d_model": D, "expansion_factor": 2, "hook_point_in": "blocks.15.hook_resid_post"}
    b = random_arrays(3, D, 2 * D)
    values = linear_values(b) | {"decoder.bias": b["b_dec"], "log_jumprelu_threshold": np.log(b["threshold"])}
    write_safetensors(folder / "sae_weights.safetensors", values)
    write_json(folder / "config.json", config)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        h = affine(x, b)
        latents = relu(h) * (h > b["threshold"])
        return latents, decoded(latents, b)

    return folder, expected


def llamascopium(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    hook = "blocks.7.hook_mlp_out"
    norm = f"dataset_average_activation_norm.{hook}"
    values = {"W_E": a["W_enc"], "b_E": a["b_enc"], "W_D": a["W_dec"], "b_D": a["b_dec"]}
    values |= {
        "activation_function.log_jumprelu_threshold": np.log(a["threshold"]),
        norm: np.array(3.0, dtype=np.float32),
    }
    write_safetensors(folder / "sae_weights.safetensors", values)
    config = {"act_fn": "jumprelu", "hook_point_in": hook, "sparsity_include_decoder_norm": True}
    write_json(folder / "config.json", config)
    scale, rows = D**0.5 / 3, np.linalg.norm(a["W_dec"], axis=1)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        h = affine(scale * x.double(), a)
        gated = h * rows
        latents = relu(gated) * (gated > a["threshold"]) / rows
        return latents, decoded(latents, a) / scale

    return folder, expected


def circuit_tracer_layer(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "layer_2.safetensors"
    stored = {"W_enc": a["W_enc"].T, "W_dec": a["W_dec"], "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
    stored |= {"activation_function.threshold": a["threshold"], "W_skip": a["W_skip"].T}
    write_safetensors(path, stored)
    (folder / "config.yaml").write_text(
        "model_name: gpt2\nmodel_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\nscan: x\n"
    )
    return path, jumprelu_formula(a, skip=True)


def goodfire(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "Llama-3.1-8B-Instruct-SAE-l19.pth"
    write_pickle(
        path,
        {
            "encoder_linear.weight": a["W_enc"].T,
            "encoder_linear.bias": a["b_enc"],
            "decoder_linear.weight": a["W_dec"].T,
            "decoder_linear.bias": a["b_dec"],
        },
    )
    return path, plain_formula(a)


def plain_formula(a: Arrays) -> Expected:
    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x, a))
        return latents, decoded(latents, a)

    return expected


def qresearch(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt"
    write_pickle(path, linear_values(a) | {"decoder.bias": a["b_dec"]})
    return path, plain_formula(a)


def hook_z(folder: Path, a: Arrays) -> tuple[Path, Expected]:
    path = folder / "gpt2-small_L5_Hcat_z.pt"
    write_pickle(path, {name: a[name] for name in STANDARD})
    cfg = {"act_size": D, "dict_size": S, "act_name": "blocks.5.attn.hook_z"}
    write_json(folder / "gpt2-small_L5_Hcat_z_cfg.json", cfg)

    def expected(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        latents = relu(affine(x.flatten(-2), a, a["b_dec"]))
        return latents, decoded(latents, a).reshape(*x.shape)

    return path, expected


POST = "resid.torso.post_mlp"
CASES: list[tuple[Case, str, Site | None]] = [
    (saelens_standard, "saelens", Site(path=POST, layer=3)),
    (saelens_gated, "saelens", Site(path=POST, layer=3)),
    (saelens_topk, "saelens", Site(path=POST, layer=3)),
    (saelens_jumprelu_layer_norm, "saelens", Site(path=POST, layer=3)),
    (saelens_rescaled, "saelens", Site(path=POST, layer=3)),
    (saelens_unfolded_scale, "saelens", Site(path=POST, layer=3)),
    (saelens_skip_transcoder, "saelens", Site(path="resid.torso.ln_mlp.post_scale", layer=2)),
    (saelens_before_6, "saelens", Site(path="resid.torso.pre_attn", layer=5)),
    (saelens_finetuned_scale, "saelens", Site(path="emb.tok")),
    (openai_relu, "openai", None),  # nothing in this path is a layer
    (openai_topk, "openai", Site(path=POST, layer=8)),
    (gemma_scope_1, "gemma_scope", Site(path=POST, layer=20)),
    (gemma_scope_2_transcoder, "gemma_scope", Site(path="resid.torso.post_ln_mlp", layer=5)),
    (dl_auto_encoder, "dictionary_learning", Site(path=POST, layer=3)),
    (dl_gated, "dictionary_learning", Site(path=POST, layer=3)),
    (dl_topk, "dictionary_learning", Site(path=POST, layer=3)),
    (dl_matryoshka, "dictionary_learning", Site(path=POST, layer=3)),
    (dl_jumprelu, "dictionary_learning", Site(path=POST, layer=3)),
    (sparsify_group_max_transcoder, "sparsify", Site(path="resid.torso.post_ln_mlp", layer=4)),
    (llama_scope_1, "llama_scope", Site(path=POST, layer=15)),
    (llama_scope_distilled, "llama_scope", Site(path=POST, layer=15)),
    (llamascopium, "llama_scope", Site(path="resid.torso.delta_mlp", layer=7)),
    (circuit_tracer_layer, "circuit_tracer", Site(path="resid.torso.post_ln_mlp", layer=2)),
    (goodfire, "plain_pickles", Site(path=POST, layer=19)),
    (qresearch, "plain_pickles", Site(path=POST, layer=19)),
    (hook_z, "plain_pickles", Site(path="attn.v_out", layer=5)),
]


@pytest.mark.parametrize(("case", "format", "site"), CASES, ids=[case.__name__ for case, _, _ in CASES])
def test_computes_the_published_formula(case: Case, format: str, site: Site | None, tmp_path: Path) -> None:
    path, expected = case(tmp_path, random_arrays())
    autoencoder = load_autoencoder(path)
    config = autoencoder.config
    x = inputs(1, 40, 3, 2) if config.flatten_heads else inputs(1, 40, D)
    latents, output = expected(x)
    assert 0 < (latents != 0).mean() < 1  # the case tells active from inactive
    close(autoencoder.encode(x), latents)
    close(autoencoder(x), output)
    assert config.site_in == site
    assert config.provenance is not None
    assert (config.provenance.format, config.provenance.path) == (format, str(path))
    assert config.provenance.files
    assert autoencoder.self_check is not None


def test_a_set_of_transcoders_is_loaded_by_layer(tmp_path: Path) -> None:
    _, expected = circuit_tracer_layer(tmp_path, random_arrays())
    (tmp_path / "layer_0.safetensors").write_bytes((tmp_path / "layer_2.safetensors").read_bytes())
    transcoders = load_autoencoders(tmp_path)
    assert list(transcoders) == [0, 2]
    assert transcoders[2].config.site_out == Site(path="resid.torso.delta_mlp", layer=2)
    close(transcoders[0](inputs()), expected(inputs())[1])
    with pytest.raises(CheckpointError, match="load_autoencoders"):
        load_autoencoder(tmp_path)


def test_dtype_and_overrides(tmp_path: Path) -> None:
    path, _ = saelens_standard(tmp_path, random_arrays())
    loaded = load_autoencoder(path, dtype=torch.bfloat16, overrides={"flatten_heads": True})
    assert loaded.dtype == torch.bfloat16
    assert loaded(inputs(1, 4, 3, 2)).shape == (4, 3, 2)
    with pytest.raises(RequestError, match="floating point"):
        load_autoencoder(path, dtype=torch.int64)


def test_unknown_files_are_refused_with_what_was_found(tmp_path: Path) -> None:
    write_json(tmp_path / "settings.json", {})
    with pytest.raises(CheckpointError, match=r"settings\.json.*saelens: cfg\.json.*sparsify"):
        load_autoencoder(tmp_path)
    write_pickle(tmp_path / "x.pt", {"layer.weight": np.zeros((2, 2))})
    with pytest.raises(CheckpointError, match=r"the tensors layer\.weight"):
        load_autoencoder(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="there is no autoencoder"):
        load_autoencoder(tmp_path / "absent")
    with pytest.raises(RequestError, match="did you mean 'saelens'"):
        load_autoencoder(tmp_path, "sealens")
    with pytest.raises(CheckpointError, match=r"not of the format 'sparsify', which needs cfg\.json"):
        load_autoencoder(tmp_path, "sparsify")


def test_missing_and_surplus_tensors_are_all_named(tmp_path: Path) -> None:
    a = random_arrays()
    write_saelens(
        tmp_path, {**a, "W_extra": a["W_enc"]}, ["W_enc", "W_dec", "W_extra"], saelens_cfg("standard")
    )
    with pytest.raises(CheckpointError, match=r"lacks b_dec, b_enc; it has W_extra"):
        load_autoencoder(tmp_path)


def test_shapes_that_contradict_the_config_are_all_named(tmp_path: Path) -> None:
    write_saelens(tmp_path, random_arrays(), STANDARD, saelens_cfg("standard", d_sae=S + 1))
    with pytest.raises(CheckpointError, match=r"W_enc is \[6, 16\], expected \[6, 17\].*b_enc is \[16\]"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("name", ["W_enc", "b_dec"])
def test_values_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    a = random_arrays()
    a[name].reshape(-1)[3] = np.nan
    write_saelens(tmp_path, a, STANDARD, saelens_cfg("standard"))
    with pytest.raises(CheckpointError, match=rf"{name} \(1 of"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    "case", [saelens_standard, openai_relu, gemma_scope_1], ids=lambda case: case.__name__
)
def test_half_written_files_are_named(case: Case, tmp_path: Path) -> None:
    path, _ = case(tmp_path, random_arrays())
    weights = next(f for f in tmp_path.rglob("*") if f.suffix in (".safetensors", ".pt", ".npz"))
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=weights.name):
        load_autoencoder(path)


def test_pickles_that_would_run_code_are_refused(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (Path.touch, (tmp_path / "exploded",))  # type: ignore[return-value]

    torch.save({"encoder.weight": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        load_autoencoder(tmp_path / "x.pt")
    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    with pytest.raises(CheckpointError, match=r"params\.npz"):
        load_autoencoder(tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "jumprulu"}, "did you mean 'jumprelu'"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"architecture": "topk"}, "lacks 'k'"),
        ({"architecture": "topk", "k": 2.5}, "whole number"),
        ({"normalize_activations": "expected_average_only_in"}, "give scaling_factor"),
        ({"d_in": None}, "lacks 'd_in'"),
    ],
)
def test_configs_that_cannot_be_honoured(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    cfg = saelens_cfg(fields.pop("architecture", "standard"), **fields)
    write_saelens(tmp_path, random_arrays(), STANDARD, cfg)
    with pytest.raises(CheckpointError, match=message):
        load_autoencoder(tmp_path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    write_saelens(tmp_path, random_arrays(), STANDARD, saelens_cfg("standard"))
    (tmp_path / "cfg.json").write_text('{"d_in": ')
    with pytest.raises(CheckpointError, match=r"cfg\.json as JSON"):
        load_autoencoder(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="not an object"):
        load_autoencoder(tmp_path)


def test_given_activations_are_held_to_their_reconstruction(tmp_path: Path) -> None:
    """With W_enc = (I, −I), W_dec its transpose, relu gives x back exactly."""
    a = random_arrays(d_latent=2 * D)
    a["W_enc"] = np.concatenate([np.eye(D), -np.eye(D)], axis=1).astype(np.float32)
    a["W_dec"] = a["W_enc"].T.copy()
    a["b_enc"][:], a["b_dec"][:] = 0, 0
    write_saelens(tmp_path, a, STANDARD, saelens_cfg("standard", d_sae=2 * D))
    x = inputs(1, 20, D)
    check = load_autoencoder(tmp_path, activations=x, min_explained_variance=0.99).self_check
    assert check is not None
    assert check.explained_variance == pytest.approx(1)
    assert check.mean_active == pytest.approx(D)
    assert check.encoder_decoder_cosine == pytest.approx(1)
    with pytest.raises(CheckpointError, match="explains -"):
        load_autoencoder(tmp_path, activations=x, target=-x)
