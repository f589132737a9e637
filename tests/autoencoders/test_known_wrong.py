"""Mistakes of loaders that others wrote, each with the right answer worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_lens.autoencoders import Site, load_autoencoder
from neuron_lens.errors import RequestError

from .published import saelens_cfg, write_json, write_pickle, write_saelens, write_safetensors

ONE_TWO = torch.tensor([[1.0, 2.0]])
EYE = np.eye(2, dtype=np.float32)


def test_sparsify_default_config_width_orientation_site_and_bias(tmp_path: Path) -> None:
    """d_in 2, expansion 2, k 1, num_latents 0: 4 latents, b_dec = (1, 0) subtracted, W_dec as stored.

    x = (1, 2): x − b_dec = (0, 2); encoder rows e0, e1, −e0, −e1 give h = (0, 2, 0, −2), and
    top-1 keeps latent 1 = 2. W_dec row 1 is (10, 20): output (20, 40) + (1, 0).
    """
    folder = tmp_path / "layers.0.mlp"
    tensors = {
        "encoder.weight": np.concatenate([EYE, -EYE]),
        "encoder.bias": np.zeros(4),
        "W_dec": np.array([[1, 2], [10, 20], [3, 4], [5, 6]]),
        "b_dec": np.array([1.0, 0.0]),
    }
    write_safetensors(folder / "sae.safetensors", tensors)
    write_json(folder / "cfg.json", {"expansion_factor": 2, "num_latents": 0, "k": 1, "d_in": 2})
    autoencoder = load_autoencoder(folder)
    assert autoencoder.config.d_latent == 4
    assert autoencoder.W_dec.shape == (4, 2)
    assert autoencoder.dtype == torch.float32
    assert autoencoder.config.site_in == Site(path="resid.torso.delta_mlp", layer=0)
    assert autoencoder.encode(ONE_TWO).tolist() == [[0, 2, 0, 0]]
    assert autoencoder(ONE_TWO).tolist() == [[21, 40]]


def test_sparsify_transcoder_does_not_subtract_the_bias(tmp_path: Path) -> None:
    """Now h = (1, 2, −1, −2): latent 1 = 2 again, but with b_dec = (5, 5), subtracting would leave none."""
    folder = tmp_path / "layers.1.mlp"
    tensors = {
        "encoder.weight": np.concatenate([EYE, -EYE]),
        "encoder.bias": np.zeros(4),
        "W_dec": np.array([[1, 2], [10, 20], [3, 4], [5, 6]]),
        "b_dec": np.array([5.0, 5.0]),
    }
    write_safetensors(folder / "sae.safetensors", tensors)
    write_json(folder / "cfg.json", {"num_latents": 4, "k": 1, "d_in": 2, "transcode": True})
    assert load_autoencoder(folder)(ONE_TWO).tolist() == [[25, 45]]


def write_dictionary(folder: Path, kind: str, values: dict[str, object]) -> Path:
    write_pickle(folder / "ae.pt", values)
    write_json(folder / "config.json", {"trainer": {"dict_class": kind, "k": 1, "layer": 0}, "buffer": {}})
    return folder


def test_batch_topk_keeps_its_threshold(tmp_path: Path) -> None:
    """h = (1, 2) with threshold 1.5: latent 0 is below it, so plain relu would be wrong by (7, 0)."""
    values = {
        "encoder.weight": EYE,
        "encoder.bias": np.zeros(2),
        "decoder.weight": np.diag([7.0, 3.0]),
        "b_dec": np.zeros(2),
        "k": torch.tensor(1),
        "threshold": torch.tensor(1.5),
    }
    autoencoder = load_autoencoder(write_dictionary(tmp_path, "BatchTopKSAE", values))
    assert autoencoder.encode(ONE_TWO).tolist() == [[0, 2]]
    assert autoencoder(ONE_TWO).tolist() == [[0, 6]]


def test_auto_encoder_new_has_no_input_bias(tmp_path: Path) -> None:
    """decoder.bias (4, 4) is added to the output (1, 2) and not subtracted from the input."""
    values = {
        "encoder.weight": EYE,
        "encoder.bias": np.zeros(2),
        "decoder.weight": EYE,
        "decoder.bias": np.array([4.0, 4.0]),
    }
    autoencoder = load_autoencoder(write_dictionary(tmp_path, "AutoEncoderNew", values))
    assert autoencoder(ONE_TWO).tolist() == [[5, 6]]


def test_dictionary_saved_while_training_is_folded_and_a_finished_one_is_not(tmp_path: Path) -> None:
    """Trained on x / 10: biases 1 there are 10 at the scale of x. x = (1, 2): h = x + 10, latents − b_dec…

    enc bias 1, b_dec 0: latents at the scale of x are (11, 12). Not folded, they would be (2, 3).
    """
    values = {
        "encoder.weight": EYE,
        "encoder.bias": np.ones(2),
        "decoder.weight": EYE,
        "bias": np.zeros(2),
    }
    finished = write_dictionary(tmp_path / "finished", "AutoEncoder", values)
    assert load_autoencoder(finished).encode(ONE_TWO).tolist() == [[2, 3]]
    ae = {name: torch.from_numpy(np.asarray(value, dtype=np.float32)) for name, value in values.items()}
    training = {"step": 5, "ae": ae, "optimizer": {}, "config": {}, "norm_factor": 10.0}
    folder = write_dictionary(tmp_path / "training", "AutoEncoder", training)
    assert load_autoencoder(folder).encode(ONE_TWO).tolist() == [[11, 12]]


def test_gemma_scope_2_skip_matrix_is_used_as_stored(tmp_path: Path) -> None:
    """A = [[0, 1], [0, 0]]: x @ A = (0, 1); x @ A.T would be (2, 0). Thresholds of 9 silence all latents."""
    folder = tmp_path / "transcoder_all" / "layer_3_width_1k"
    tensors = {
        "w_enc": EYE,
        "w_dec": EYE,
        "b_enc": np.zeros(2),
        "b_dec": np.zeros(2),
        "threshold": np.full(2, 9.0),
        "affine_skip_connection": np.array([[0.0, 1.0], [0.0, 0.0]]),
    }
    write_safetensors(folder / "params.safetensors", tensors)
    write_json(folder / "config.json", {"architecture": "jump_relu", "affine_connection": True})
    assert load_autoencoder(folder)(ONE_TWO).tolist() == [[0, 1]]


def test_a_skip_term_cannot_be_lost_between_encode_and_decode(tmp_path: Path) -> None:
    """W_skip stored (SAELens: [d_out, d_in]) as [[0, 1], [0, 0]]: x @ W_skip.T = (2, 0); latents (1, 2)."""
    arrays = {"W_enc": EYE, "b_enc": np.zeros(2), "W_dec": EYE, "b_dec": np.zeros(2)}
    arrays["W_skip"] = np.array([[0.0, 0.0], [1.0, 0.0]])  # transposed once more by the writer
    cfg = saelens_cfg("skip_transcoder", d_in=2, d_sae=2, d_out=2, apply_b_dec_to_input=False)
    autoencoder = load_autoencoder(write_saelens(tmp_path, arrays, list(arrays), cfg))
    assert autoencoder(ONE_TWO).tolist() == [[3, 2]]
    latents, state = autoencoder.encode_with_state(ONE_TWO)
    assert autoencoder.decode(latents, state).tolist() == [[3, 2]]
    with pytest.raises(RequestError, match="skip term"):
        autoencoder.decode(latents)


def test_an_edit_of_a_latent_moves_the_output_past_the_error_term(tmp_path: Path) -> None:
    """error = x − decode(unedited latents); adding 3 to latent 0 moves the output by 3 decoder rows."""
    arrays = {"W_enc": EYE, "b_enc": np.zeros(2), "W_dec": np.array([[0.0, 5.0], [1.0, 1.0]])}
    arrays["b_dec"] = np.zeros(2)
    cfg = saelens_cfg("standard", d_in=2, d_sae=2)
    autoencoder = load_autoencoder(write_saelens(tmp_path, arrays, list(arrays), cfg))
    latents, state = autoencoder.encode_with_state(ONE_TWO)
    error = ONE_TWO - autoencoder.decode(latents, state)
    edited = latents + torch.tensor([3.0, 0.0])
    assert (autoencoder.decode(edited, state) + error - ONE_TWO).tolist() == [[0, 15]]


@pytest.mark.parametrize(("activation", "expected"), [("ReLU", [[1.0, 2.0]]), ("TopK", [[1.5, 2.2071]])])
def test_openai_layer_norm_goes_with_topk(
    activation: str, expected: list[list[float]], tmp_path: Path
) -> None:
    """x = (1, 2): mean 1.5, unbiased std √½, normalised ±0.70711 (1 − 1.4e-5).

    ReLU files read x itself: output (1, 2). TopK (k 1) keeps 0.70710 in latent 1; times std √½ is ½, plus the
    mean: (1.5, 2.0); with decoder entry √2, 0.70710 √2 √½ = 0.70710: 2.2071.
    """
    state = {"k": 1, "postact_fn": "ReLU"} if activation == "TopK" else {}
    decoder = EYE * (2**0.5 if activation == "TopK" else 1.0)
    values = {
        "encoder.weight": EYE,
        "decoder.weight": decoder,
        "pre_bias": np.zeros(2),
        "latent_bias": np.zeros(2),
        "activation": activation,
        "activation_state_dict": state,
    }
    write_pickle(tmp_path / "a.pt", values)
    torch.testing.assert_close(
        load_autoencoder(tmp_path / "a.pt")(ONE_TWO), torch.tensor(expected), rtol=0, atol=1e-4
    )
