"""Cross-layer transcoders: the published sum over layers, from both layouts on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_lens.autoencoders import Site, load_autoencoder, load_cross_layer_transcoder
from neuron_lens.errors import CheckpointError, RequestError

from .published import Arrays, close, write_json, write_safetensors

L, D, S = 3, 4, 8


def weights(seed: int = 0) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [
        {
            "W_enc": rng.normal(size=(D, S)).astype(np.float32),
            "b_enc": rng.normal(size=S).astype(np.float32),
            "b_dec": rng.normal(size=D).astype(np.float32),
            "W_dec": rng.normal(size=(S, L - i, D)).astype(np.float32),
            "threshold": np.abs(rng.normal(size=S)).astype(np.float32),
            "A": rng.normal(size=(D, D)).astype(np.float32),
        }
        for i in range(L)
    ]


def expected(x: torch.Tensor, layers: list[Arrays], skip: bool) -> np.ndarray:
    """x [layer, pos, D], one (layer, earlier layer) pair at a time."""
    numpy = x.double().numpy()
    latents = []
    for i, a in enumerate(layers):
        h = numpy[i] @ a["W_enc"] + a["b_enc"]
        latents.append(h * (h > a["threshold"]))
    out = np.stack([np.broadcast_to(a["b_dec"].astype(float), numpy[0].shape) for a in layers])
    for later in range(L):
        for i in range(later + 1):
            out[later] += latents[i] @ layers[i]["W_dec"][:, later - i]
        if skip:
            out[later] += numpy[later] @ layers[later]["A"]
    return out


def write_circuit_tracer(folder: Path, layers: list[Arrays]) -> Path:
    for i, a in enumerate(layers):
        encoder = {f"W_enc_{i}": a["W_enc"].T, f"b_enc_{i}": a["b_enc"], f"b_dec_{i}": a["b_dec"]}
        write_safetensors(folder / f"W_enc_{i}.safetensors", encoder | {f"threshold_{i}": a["threshold"]})
        write_safetensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": a["W_dec"]})
    text = "model_name: gpt2\nmodel_kind: cross_layer_transcoder\n"
    (folder / "config.yaml").write_text(
        text + "feature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )
    return folder


def write_gemma(folder: Path, layers: list[Arrays], *, all_targets: bool) -> Path:
    for i, a in enumerate(layers):
        w_dec = a["W_dec"]
        if all_targets:
            w_dec = np.concatenate([np.zeros((S, i, D), dtype=np.float32), w_dec], axis=1)
        tensors = {"w_enc": a["W_enc"], "w_dec": w_dec, "b_enc": a["b_enc"], "b_dec": a["b_dec"]}
        tensors |= {"threshold": a["threshold"], "affine_skip_connection": a["A"]}
        write_safetensors(folder / f"params_layer_{i}.safetensors", tensors)
    write_json(folder / "config.json", {"architecture": "jump_relu", "model_name": "gemma-v3-270m"})
    return folder


def inputs(seed: int = 5) -> torch.Tensor:
    return torch.randn(L, 6, D, generator=torch.Generator().manual_seed(seed))


def test_circuit_tracer_layout(tmp_path: Path) -> None:
    transcoder = load_cross_layer_transcoder(write_circuit_tracer(tmp_path, weights()))
    close(transcoder(inputs()), expected(inputs(), weights(), skip=False))
    assert transcoder.config.site_in == Site(path="resid.torso.post_attn")
    assert transcoder.config.provenance is not None
    assert transcoder.config.provenance.format == "cross_layer"


@pytest.mark.parametrize("all_targets", [False, True])
def test_gemma_scope_layouts_and_the_last_layer(all_targets: bool, tmp_path: Path) -> None:
    """Targets counted from layer 0 or from the own layer; layer 2 of 3 is not dropped."""
    folder = write_gemma(tmp_path, weights(), all_targets=all_targets)
    transcoder = load_cross_layer_transcoder(folder)
    assert transcoder.config.n_layers == L
    close(transcoder(inputs()), expected(inputs(), weights(), skip=True))


def test_layer_by_layer_equals_all_at_once_and_an_edit_moves_later_layers(tmp_path: Path) -> None:
    transcoder = load_cross_layer_transcoder(write_circuit_tracer(tmp_path, weights()))
    x = inputs()
    latents = [transcoder.encode(x[i], i) for i in range(L)]
    for i in range(L):
        torch.testing.assert_close(transcoder.decode(latents[: i + 1]), transcoder(x)[i])
    edited = [latents[0] + 2 * torch.eye(S)[3], *latents[1:]]
    rows = transcoder.decoder_rows(0, 3)
    for i in range(L):
        moved = transcoder.decode(edited[: i + 1]) - transcoder.decode(latents[: i + 1])
        torch.testing.assert_close(moved, (2 * rows[i]).expand_as(moved), rtol=1e-4, atol=1e-5)


def test_dtype_of_the_input_comes_back(tmp_path: Path) -> None:
    transcoder = load_cross_layer_transcoder(write_gemma(tmp_path, weights(), all_targets=False))
    x = inputs().bfloat16()
    assert transcoder(x).dtype == torch.bfloat16
    torch.testing.assert_close(transcoder(x), transcoder(x.float()).bfloat16(), rtol=0, atol=0)


def test_damage_and_bad_requests_are_named(tmp_path: Path) -> None:
    folder = write_circuit_tracer(tmp_path / "a", weights())
    transcoder = load_cross_layer_transcoder(folder)
    with pytest.raises(RequestError, match="no layer 3"):
        transcoder.encode(inputs()[0], 3)
    with pytest.raises(RequestError, match="latent 8"):
        transcoder.decoder_rows(0, 8)
    with pytest.raises(RequestError, match="not 4"):
        transcoder.encode(inputs()[0][:, :2], 0)
    with pytest.raises(RequestError, match="2 layers"):
        transcoder(inputs()[:2])
    with pytest.raises(CheckpointError, match="load_cross_layer_transcoder"):
        load_autoencoder(folder)
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"decoders of \[0, 2\]"):
        load_cross_layer_transcoder(folder)
    (folder / "W_enc_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"layers \[1\]"):
        load_cross_layer_transcoder(folder)
    skipping = load_cross_layer_transcoder(write_gemma(tmp_path / "b", weights(), all_targets=True))
    with pytest.raises(RequestError, match="skip term"):
        skipping.decode([skipping.encode(inputs()[0], 0)])
    broken = weights()
    broken[1]["b_enc"][2] = np.inf
    with pytest.raises(CheckpointError, match=r"b_enc\.1 \(1 of 8\)"):
        load_cross_layer_transcoder(write_gemma(tmp_path / "c", broken, all_targets=True))


def test_the_self_check_tells_right_from_wrong(tmp_path: Path) -> None:
    folder = write_circuit_tracer(tmp_path, weights())
    x = inputs()
    target = torch.as_tensor(expected(x, weights(), skip=False))
    found = load_cross_layer_transcoder(folder, activations=x, target=target, min_explained_variance=0.99)
    assert found.self_check is not None and len(found.self_check) == L
    assert all(check.explained_variance == pytest.approx(1) for check in found.self_check)
    norms = np.linalg.norm(weights()[1]["W_dec"].reshape(S, -1), axis=-1)
    assert found.self_check[1].decoder_row_norm[2] == pytest.approx(norms.max(), rel=1e-5)
    with pytest.raises(CheckpointError, match=r"the outputs of layer 0, expected at least 0.5"):
        load_cross_layer_transcoder(folder, activations=x, target=-target, min_explained_variance=0.5)
    with pytest.raises(CheckpointError, match="give activations and target"):
        load_cross_layer_transcoder(folder, activations=x)
    empty = weights()
    empty[1]["W_dec"][:] = 0
    with pytest.raises(CheckpointError, match="decoder of layer 1 is all zeros"):
        load_cross_layer_transcoder(write_gemma(tmp_path / "zeros", empty, all_targets=False))
