"""Laws of the canonical form: sparse equals dense, a slice equals the slice of all, decoding is pure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.autoencoders import Autoencoder, AutoencoderConfig, SparseLatents
from neuron_lens.autoencoders import sparse as sparse_module
from neuron_lens.autoencoders.activations import keep_batch_topk
from neuron_lens.autoencoders.sparse import sum_of_rows
from neuron_lens.errors import ConfigError, RequestError

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gated": {},
    "topk": {"k": 2},
    "topk scaled": {"activation": "topk", "k": 2, "decoder_norm": "scale_latents"},
    "topk ranked by norm": {"activation": "topk", "k": 2, "decoder_norm": "select_only"},
    "abs_topk": {"k": 2},
    "batch_topk": {"k": 3},
    "jumprelu": {},
    "jumprelu negative": {"activation": "jumprelu", "relu_after_selection": False},
    "groupmax": {"k": 2},
}
NORMALISATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "constant_norm_rescale": {},
    "layer_norm": {},
    "scale": {"scale_in": 0.5, "scale_out": 0.25},
}


def make(name: str, seed: int = 0, d_in: int = 5, d_latent: int = 48, **fields: Any) -> Autoencoder:
    """An autoencoder with every parameter random."""
    generator = torch.Generator().manual_seed(seed)
    config = AutoencoderConfig(
        **{"d_in": d_in, "d_latent": d_latent, "activation": name, **ACTIVATIONS[name], **fields}
    )
    autoencoder = Autoencoder(config)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return autoencoder


def normal(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_forward_is_decode_of_encode_and_rows_are_independent(name: str, normalisation: str) -> None:
    autoencoder = make(
        name,
        normalisation=normalisation,
        input_bias="decoder_bias",
        has_skip=True,
        **NORMALISATIONS[normalisation],
    )
    x = normal(2, 3, 5)
    latents, state = autoencoder.encode_with_state(x)
    whole = autoencoder(x)
    torch.testing.assert_close(autoencoder.decode(latents, state), whole)
    torch.testing.assert_close(autoencoder.encode(x), latents)
    torch.testing.assert_close(autoencoder(x[1:, 2:]), whole[1:, 2:])
    # another encode in between changes nothing: there is no state on the module
    autoencoder.encode(x * 3)
    torch.testing.assert_close(autoencoder.decode(latents, state), whole)
    assert latents.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if "top" in name and "batch" not in name])
def test_sparse_equals_dense(name: str) -> None:
    autoencoder = make(name, input_bias="own", normalisation="layer_norm")
    x = normal(4, 3, 5)
    sparse, state = autoencoder.encode_sparse(x)
    dense, _ = autoencoder.encode_with_state(x)
    assert sparse.values.shape == sparse.indices.shape == (4, 3, 2)
    torch.testing.assert_close(sparse.to_dense(48), dense)
    torch.testing.assert_close(autoencoder.decode(sparse, state), autoencoder.decode(dense, state))


def test_gradients_of_the_sparse_and_dense_paths_agree() -> None:
    autoencoder = make("topk scaled", normalisation="layer_norm", has_skip=True)
    x = normal(4, 5).requires_grad_()
    gradients = []
    for encode in (autoencoder.encode_sparse, autoencoder.encode_with_state):
        latents, state = encode(x)
        loss = autoencoder.decode(latents, state).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *autoencoder.parameters()]))
    for sparse, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_equal_finite_differences(name: str) -> None:
    autoencoder = make(name, normalisation="layer_norm", input_bias="decoder_bias", d_latent=40).double()
    x = normal(3, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(autoencoder, (x,))


def test_sum_of_rows_has_every_derivative() -> None:
    values, rows = normal(3, 2, 4).double().requires_grad_(), normal(9, 5).double().requires_grad_()
    indices = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(i))[:4] for i in range(6)]
    )
    indices = indices.reshape(3, 2, 4)

    def summed(v: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return sum_of_rows(v, indices, r)

    assert torch.autograd.gradcheck(summed, (values, rows))
    assert torch.autograd.gradgradcheck(summed, (values, rows))
    by_hand = torch.einsum("abk,abkd->abd", values, rows[indices])
    torch.testing.assert_close(summed(values, rows), by_hand)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_and_batching_transforms() -> None:
    autoencoder = make("topk", normalisation="layer_norm").double()
    x, direction = normal(3, 5).double(), normal(3, 5, seed=8).double()
    out, moved = torch.func.jvp(autoencoder, (x,), (direction,))
    step = 1e-6
    torch.testing.assert_close(moved, (autoencoder(x + step * direction) - out) / step, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(autoencoder)(x), out)
    reverse, forward = torch.func.jacrev(autoencoder)(x), torch.func.jacfwd(autoencoder)(x)
    torch.testing.assert_close(reverse, forward)
    # a decoder of its own for each batch entry
    rows = normal(3, 48, 5).double()
    sparse, _ = autoencoder.encode_sparse(x)
    each = torch.func.vmap(sum_of_rows)(sparse.values, sparse.indices, rows)
    by_hand = torch.stack([sum_of_rows(sparse.values[i], sparse.indices[i], rows[i]) for i in range(3)])
    torch.testing.assert_close(each, by_hand)


@pytest.mark.parametrize("name", ["topk", "jumprelu", "gated"])
def test_compiles_whole(name: str) -> None:
    autoencoder = make(name, normalisation="layer_norm", has_skip=True)
    x = normal(3, 5).requires_grad_()
    compiled = torch.compile(autoencoder, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), autoencoder(x))
    (ours,) = torch.autograd.grad(compiled(x).sum(), x)
    (plain,) = torch.autograd.grad(autoencoder(x).sum(), x)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("latents", [slice(4, 20, 3), slice(None), [0, 47, -1, 5], torch.tensor([7])])
def test_a_slice_of_latents_is_the_slice_of_all(name: str, latents: Any) -> None:
    autoencoder = make(name, input_bias="decoder_bias", normalisation="constant_norm_rescale")
    x = normal(2, 3, 5)
    torch.testing.assert_close(autoencoder.encode(x, latents), autoencoder.encode(x)[..., latents])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(ACTIVATIONS)),
    normalisation=st.sampled_from(sorted(NORMALISATIONS)),
    lead=st.lists(st.integers(0, 3), max_size=3),
    d_in=st.integers(2, 7),
    d_out=st.integers(1, 7),
    half_latents=st.integers(1, 24),
    skip=st.booleans(),
)
def test_shapes(
    name: str, normalisation: str, lead: list[int], d_in: int, d_out: int, half_latents: int, skip: bool
) -> None:
    autoencoder = make(
        name,
        d_in=d_in,
        d_out=d_out,
        d_latent=2 * half_latents,
        has_skip=skip,
        normalisation=normalisation,
        **({"k": 2} if "k" in ACTIVATIONS[name] else {}),
        **NORMALISATIONS[normalisation],
    )
    if normalisation == "layer_norm":  # output [d_out] * std + mean
        assert autoencoder.config.needs_state
    x = normal(*lead, d_in)
    latents, state = autoencoder.encode_with_state(x)
    assert latents.shape == (*lead, 2 * half_latents)
    assert autoencoder(x).shape == autoencoder.decode(latents, state).shape == (*lead, d_out)
    assert torch.isfinite(autoencoder(x)).all()


@pytest.mark.parametrize("name", ["relu", "topk", "gated"])
@pytest.mark.parametrize(("given_dtype", "weights"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_computes_in_the_dtype_of_the_weights_and_returns_that_of_the_input(
    name: str, given_dtype: str, weights: str
) -> None:
    x_dtype, dtype = getattr(torch, given_dtype), getattr(torch, weights)
    autoencoder = make(name, normalisation="layer_norm", has_skip=True).to(dtype)
    x = normal(4, 5).to(x_dtype)
    latents, state = autoencoder.encode_with_state(x)
    assert autoencoder.dtype == latents.dtype == autoencoder.decode(latents, state).dtype == dtype
    assert autoencoder(x).dtype == x_dtype
    if dtype == torch.float32:  # nothing is rounded before the end
        torch.testing.assert_close(autoencoder(x), autoencoder(x.float()).to(x_dtype), rtol=0, atol=0)


def test_flattened_heads_come_back() -> None:
    autoencoder = make("relu", d_in=6, flatten_heads=True)
    x = normal(2, 4, 3, 2)
    flat = make("relu", d_in=6)
    assert autoencoder.encode(x).shape == (2, 4, 48)
    torch.testing.assert_close(autoencoder(x), flat(x.flatten(-2)).reshape(2, 4, 3, 2))
    with pytest.raises(RequestError, match=r"head \* d_head = 6"):
        autoencoder(x.flatten(-2))


def test_normalisations_by_hand() -> None:
    """x = (3, 1, 2, 4) − with identity-like weights the output is x again, up to relu."""
    x = torch.tensor([[3.0, 1.0, 2.0, 4.0]])
    config = AutoencoderConfig(d_in=4, d_latent=4, activation="relu", normalisation="constant_norm_rescale")
    autoencoder = Autoencoder(config)
    with torch.no_grad():
        autoencoder.W_enc.copy_(torch.eye(4))
        autoencoder.W_dec.copy_(2 * torch.eye(4))
    # ‖x‖ = √30, √d = 2
    torch.testing.assert_close(autoencoder.encode(x), x * 2 / 30**0.5)
    torch.testing.assert_close(autoencoder(x), 2 * x)
    layer_norm = Autoencoder(config.model_copy(update={"normalisation": "layer_norm"}))
    layer_norm.load_state_dict(autoencoder.state_dict())
    # mean 2.5, unbiased variance 5/3; only 3 and 4 lie above the mean
    std = (5 / 3) ** 0.5
    expected = torch.tensor([[0.5, 0, 0, 1.5]]) / (std + 1e-5)
    torch.testing.assert_close(layer_norm.encode(x), expected)
    torch.testing.assert_close(layer_norm(x), 2 * expected * std + 2.5)


def test_zero_input_is_not_nan() -> None:
    for normalisation in NORMALISATIONS:
        autoencoder = make("relu", normalisation=normalisation, **NORMALISATIONS[normalisation])
        assert torch.isfinite(autoencoder(torch.zeros(2, 5))).all()


def test_matryoshka_prefixes_sum_up() -> None:
    autoencoder = make("batch_topk", group_sizes=(8, 16, 24))
    latents = autoencoder.encode(normal(3, 5))
    nested = autoencoder.decode_nested(latents)
    torch.testing.assert_close(nested[-1], autoencoder.decode(latents))
    first = latents[:, :8] @ autoencoder.W_dec[:8] + autoencoder.b_dec
    torch.testing.assert_close(nested[0], first)
    with pytest.raises(RequestError, match="group_sizes"):
        make("relu").decode_nested(latents)


def test_batch_topk_training_keeps_k_per_position_on_average() -> None:
    h = torch.tensor([[5.0, 4.0, 3.0], [2.0, 1.0, -1.0]])
    assert keep_batch_topk(h, 1).tolist() == [[5.0, 4.0, 0.0], [0.0, 0.0, 0.0]]
    assert keep_batch_topk(h, 2).tolist() == [[5.0, 4.0, 3.0], [2.0, 0.0, 0.0]]


def test_group_max_by_hand() -> None:
    autoencoder = make("groupmax", d_in=4, d_latent=4)
    h = torch.tensor([[1.0, 3.0, -2.0, -1.0]])
    chosen = autoencoder.activation.select(h)
    assert chosen.to_dense(4).tolist() == [[0.0, 3.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "topk"}, "needs k"),
        ({"activation": "topk", "k": 9}, "k is 9"),
        ({"activation": "groupmax", "k": 3}, "does not divide"),
        ({"activation": "relu", "d_out": 3, "input_bias": "decoder_bias"}, "cannot be subtracted"),
        ({"activation": "relu", "decoder_norm": "scale_latents"}, "topk and abs_topk"),
        ({"activation": "batch_topk", "group_sizes": (1, 2)}, "sum to 3"),
        ({"activation": "relu", "scale_in": 2.0}, "normalisation 'scale'"),
        ({"activation": "swish"}, "activation"),
        ({"activation": "relu", "kk": 3}, "kk"),
    ],
)
def test_configs_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderConfig(**{"d_in": 4, "d_latent": 8, **fields})


def test_bad_requests_say_what_was_expected() -> None:
    autoencoder = make("relu", normalisation="layer_norm")
    latents, state = autoencoder.encode_with_state(normal(2, 5))
    with pytest.raises(RequestError, match=r"\[2, 4\].*= 5"):
        autoencoder(normal(2, 4))
    with pytest.raises(RequestError, match="floating point"):
        autoencoder(torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(RequestError, match="latent 48"):
        autoencoder.encode(normal(2, 5), [48])
    with pytest.raises(RequestError, match="up to 50"):
        autoencoder.encode(normal(2, 5), slice(0, 50))
    with pytest.raises(RequestError, match="encode_with_state"):
        autoencoder.decode(latents)
    with pytest.raises(RequestError, match="3 wide"):
        autoencoder.decode(latents[:, :3], state)
    with pytest.raises(RequestError, match="'relu'"):
        autoencoder.encode_sparse(normal(2, 5))


def test_sparse_latents_pass_through_transforms() -> None:
    autoencoder = make("topk")
    latents, _ = torch.func.vmap(autoencoder.encode_sparse)(normal(3, 2, 5))
    assert isinstance(latents, SparseLatents)
    assert latents.values.shape == (3, 2, 2)


def test_abs_topk_ranks_by_magnitude_and_keeps_signs() -> None:
    activation = make("abs_topk").activation
    activation.k = 1
    assert activation(torch.tensor([[1.0, -3.0, 2.0]])).tolist() == [[0.0, -3.0, 0.0]]


@pytest.mark.parametrize(("decoder_norm", "latents"), [("select_only", 1.0), ("scale_latents", 10.0)])
def test_ranking_by_decoder_norm_by_hand(decoder_norm: str, latents: float) -> None:
    """h = (1, 2), decoder rows of length 10 and 1: latent 0 wins, 10 to 2, and writes its row once either way."""
    config = AutoencoderConfig(d_in=2, d_latent=2, activation="topk", k=1, decoder_norm=decoder_norm)
    autoencoder = Autoencoder(config)
    with torch.no_grad():
        autoencoder.W_enc.copy_(torch.eye(2))
        autoencoder.W_dec.copy_(torch.tensor([[6.0, 8.0], [0.0, 1.0]]))
    x = torch.tensor([[1.0, 2.0]])
    assert autoencoder.encode(x).tolist() == [[latents, 0.0]]
    torch.testing.assert_close(autoencoder(x), torch.tensor([[6.0, 8.0]]))


@settings(deadline=None)
@given(
    rows=st.integers(1, 6),
    d_latent=st.integers(4, 40),
    k=st.integers(1, 4),
    part=st.integers(1, 100),
    seed=st.integers(0, 99),
)
def test_the_largest_of_a_product_are_found_in_parts(
    rows: int, d_latent: int, k: int, part: int, seed: int
) -> None:
    x, W, b = normal(rows, 3, seed=seed), normal(3, d_latent, seed=seed + 1), normal(d_latent, seed=seed + 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse_module, "_PART", part)
        values, indices = sparse_module.topk_of_product(x, W, b, k)
    whole = x @ W + b
    torch.testing.assert_close(values.sort(-1).values, whole.topk(k).values.sort(-1).values)
    torch.testing.assert_close(values, whole.gather(-1, indices))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "swish"}, "activation: Input should be 'relu'"),
        ({"normalisation": "batch_norm"}, "normalisation: Input should be 'none'"),
        ({"widht": 3}, "widht"),
        ({"d_in": 0}, "d_in: Input should be greater than 0"),
    ],
)
def test_unknown_architectures_and_normalisations_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoencoderConfig(**{"d_in": 4, "d_latent": 8, "activation": "relu", **fields})
