"""The laws of a splice, for relu, top-k and jump-relu encoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.hooks import AtPositions, AtUnits, AutoencoderHooks, Run, TransformerHooks
from neuron_lens.transformer import Transformer

D, N = 24, 60
ENCODER = torch.randn(D, N, generator=torch.Generator().manual_seed(1)) * 0.3
DECODER = torch.randn(N, D, generator=torch.Generator().manual_seed(2)) * 0.3


def relu(h: Tensor) -> Tensor:
    return torch.relu(h)


def topk(h: Tensor) -> Tensor:
    best, index = h.topk(5, -1)
    return torch.zeros_like(h).scatter(-1, index, torch.relu(best))


def jumprelu(h: Tensor) -> Tensor:
    return h * (h > 0.3)


def splice(activation, **options) -> AutoencoderHooks:  # type: ignore[no-untyped-def]
    return AutoencoderHooks(
        lambda x: activation(x @ ENCODER.to(x.dtype)), lambda z: z @ DECODER.to(z.dtype), **options
    )


@pytest.fixture(params=[relu, topk, jumprelu], ids=lambda f: f.__name__)
def activation(request):  # type: ignore[no-untyped-def]
    return request.param


X = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unedited_with_error_is_the_identity(activation, dtype) -> None:  # type: ignore[no-untyped-def]
    x = X.to(dtype)
    out = splice(activation, add_error=True)(x)
    if dtype == torch.bfloat16:
        assert torch.equal(out, x)
    else:
        torch.testing.assert_close(out, x, atol=1e-6, rtol=1e-6)
    hooked = splice(activation, add_error=True)
    for site in (hooked.latents, hooked.reconstruction, hooked.error):
        site.append_fwd(lambda t: None)
    assert torch.equal(hooked(x), out)


@pytest.mark.parametrize("in_place", [False, True])
def test_an_edit_moves_the_output_by_the_change_times_the_decoder_row(activation, in_place) -> None:  # type: ignore[no-untyped-def]
    ae = splice(activation, add_error=True)
    ae.latents.append_fwd(AtUnits(7).append((lambda z: z.add_(2.5)) if in_place else (lambda z: z + 2.5)))
    torch.testing.assert_close(ae(X) - X, (2.5 * DECODER[7]).expand_as(X), atol=1e-5, rtol=1e-5)
    without = splice(activation)
    without.latents.append_fwd(lambda z: z * 0)
    assert torch.equal(without(X), torch.zeros_like(X) @ DECODER[:D] * 0)


def test_without_error_the_output_is_the_reconstruction_and_error_is_observed(activation) -> None:  # type: ignore[no-untyped-def]
    ae = splice(activation)
    seen = []
    ae.error.append_fwd(lambda e: seen.append(e))
    out = ae(X)
    assert torch.equal(out, activation(X @ ENCODER) @ DECODER)
    torch.testing.assert_close(seen[0], X - out)


def test_encodes_once(activation) -> None:  # type: ignore[no-untyped-def]
    calls = []
    ae = AutoencoderHooks(
        lambda x: calls.append(1) or activation(x @ ENCODER), lambda z: z @ DECODER, add_error=True
    )
    ae.latents.append_fwd(AtUnits(3).append(torch.zeros_like))
    ae(X)
    assert len(calls) == 1


def test_gradient_paths() -> None:
    def gradient(path: str) -> Tensor:
        x = X.clone().requires_grad_()
        (splice(relu, add_error=True, gradient=path)(x) * torch.arange(D)).sum().backward()
        return x.grad

    def through_reconstruction() -> Tensor:
        x = X.clone().requires_grad_()
        (splice(relu)(x) * torch.arange(D)).sum().backward()
        return x.grad

    identity = torch.arange(float(D)).expand_as(X)
    torch.testing.assert_close(gradient("both"), identity, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(gradient("reconstruction"), through_reconstruction())
    torch.testing.assert_close(gradient("error"), identity)
    with pytest.raises(HookError, match="gradient path 'none'"):
        splice(relu, gradient="none")


def test_gradients_reach_latents() -> None:
    ae = splice(relu, add_error=True)
    kept = []
    ae.latents.append_fwd(lambda z: kept.append(z))
    x = X.clone().requires_grad_()
    direction = torch.randn(D)
    (gradient,) = torch.autograd.grad((ae(x) * direction).sum(), kept[0])
    torch.testing.assert_close(gradient, (DECODER @ direction).expand_as(gradient), atol=1e-5, rtol=1e-5)


def test_in_a_model_several_splices_and_positions(model: Transformer, tokens: Tensor) -> None:
    hooks = TransformerHooks()
    for path in ("resid.torso.post_attn.fwd", "resid.torso.delta_mlp.fwd"):
        hooks.append_to_path(path, splice(relu, add_error=True))
    torch.testing.assert_close(model(tokens, hooks=hooks), model(tokens), atol=1e-4, rtol=1e-4)
    edited = splice(relu, add_error=True)
    edited.latents.append_fwd(AtPositions(-1).append(AtUnits(0).append(lambda z: z + 1)))
    out = edited(X, run=Run(2, 4))
    torch.testing.assert_close((out - X)[:, -1], DECODER[0].expand(2, -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[:, :-1], X[:, :-1], atol=1e-6, rtol=1e-6)


def test_a_decoder_of_another_width_is_an_error() -> None:
    ae = AutoencoderHooks(lambda x: x, lambda z: z[..., :3])
    with pytest.raises(HookError, match=r"decodes to \[2, 4, 3\]"):
        ae(X)
