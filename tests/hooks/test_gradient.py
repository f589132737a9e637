"""Gradient hooks see what torch.autograd.grad says, under every transform."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from neuron_lens.errors import HookError
from neuron_lens.hooks import AtLayers, AtPositions, FwdBwdHooks, TransformerHooks, grad_hook_wrapper
from neuron_lens.transformer import Transformer


@pytest.mark.parametrize(
    "path", ["resid.torso.post_attn", "mlp.post_act", "attn.q", "attn.qk_probs", "resid.torso.ln_mlp.scale"]
)
def test_gradient_hooks_equal_autograd(path: str, model: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks()
    seen: dict[int, torch.Tensor] = {}
    kept: dict[int, torch.Tensor] = {}
    # the forward hook stands before, the gradient hook after: both see the same tensor
    hooks.append_to_path(f"{path}.fwd", lambda x, layer: kept.__setitem__(layer, x))
    hooks.append_to_path(f"{path}.bwd", lambda g, layer: seen.__setitem__(layer, g.clone()))
    loss = model(tokens, hooks=hooks).square().mean()
    expected = torch.autograd.grad(loss, [kept[i] for i in range(3)])
    for layer in range(3):
        torch.testing.assert_close(seen[layer], expected[layer])


def test_replacing_a_gradient_changes_what_flows_on(model: Transformer, tokens: torch.Tensor) -> None:
    def embedding_gradient(hooks: TransformerHooks | None) -> torch.Tensor:
        kept = []
        tree = TransformerHooks().append_to_path("resid.post_emb.fwd", lambda x: kept.append(x))
        loss = model(tokens, hooks=tree | hooks if hooks else tree).square().mean()
        return torch.autograd.grad(loss, kept[0])[0]

    plain = embedding_gradient(None)
    doubled = TransformerHooks().append_to_path(
        "resid.torso.post_mlp.bwd", AtLayers(2).append(lambda g: g * 2)
    )
    torch.testing.assert_close(embedding_gradient(doubled), plain * 2)
    in_place = TransformerHooks().append_to_path(
        "resid.torso.post_mlp.bwd", AtLayers(2).append(lambda g: g.mul_(2))
    )
    torch.testing.assert_close(embedding_gradient(in_place), plain * 2)
    stopped = TransformerHooks().append_to_path(
        "resid.torso.pre_attn.bwd", AtLayers(0).append(torch.zeros_like)
    )
    assert not embedding_gradient(stopped).any()


def test_an_in_place_gradient_edit_leaves_other_branches_alone() -> None:
    site = FwdBwdHooks().append_bwd(lambda g: g.zero_())
    x = torch.ones(2, 3, requires_grad=True)
    (site(x) + x).sum().backward()
    assert torch.equal(x.grad, torch.ones(2, 3))


def test_forward_hooks_may_edit_in_place_before_and_after_a_gradient_hook() -> None:
    site = (
        FwdBwdHooks()
        .append_fwd(lambda x: x.mul_(2))
        .append_bwd(lambda g: None)
        .append_fwd2(lambda x: x.add_(1))
    )
    x = torch.ones(3, requires_grad=True)
    out = site(x * 1)
    out.sum().backward()
    assert torch.equal(out, torch.full((3,), 3.0)) and torch.equal(x.grad, torch.full((3,), 2.0))


def test_double_backward_functorch_and_checkpointing() -> None:
    hook = grad_hook_wrapper(lambda g: g * 3)

    def cube(x: torch.Tensor) -> torch.Tensor:
        return (hook(x) ** 3).sum()

    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = torch.autograd.grad(cube(x), x, create_graph=True)
    torch.testing.assert_close(first, 9 * x**2)
    (second,) = torch.autograd.grad(first.sum(), x)
    # the hook is passed twice: d/dx of 3 · 3x² runs back through it again
    torch.testing.assert_close(second, torch.autograd.grad((9 * hook(x) ** 2).sum(), x)[0])

    plain = x.detach()
    torch.testing.assert_close(torch.func.grad(cube)(plain), 9 * plain**2)
    _, pull = torch.func.vjp(cube, plain)
    torch.testing.assert_close(pull(torch.tensor(2.0))[0], 18 * plain**2)
    rows = torch.stack((plain, plain + 1))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cube))(rows), 9 * rows**2)
    calls = []
    counting = grad_hook_wrapper(lambda g: calls.append(1))
    y = x.detach().clone().requires_grad_()
    checkpoint(lambda v: (counting(v) ** 2).sum(), y, use_reentrant=False).backward()
    torch.testing.assert_close(y.grad, 2 * y.detach())
    assert calls == [1]


# torch's own forward-mode support loads a decomposition through the deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode() -> None:
    hook = grad_hook_wrapper(lambda g: g * 3)
    x = torch.tensor([1.0, 2.0])
    _, tangent = torch.func.jvp(lambda v: (hook(v) ** 3).sum(), (x,), (torch.ones(2),))
    torch.testing.assert_close(tangent, (3 * x**2).sum())


def test_a_wrong_gradient_names_the_site(model: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks().append_to_path("mlp.post_act.bwd", lambda g: g[:1])
    with pytest.raises(HookError, match=r"mlp\.post_act\.bwd, layer 2"):
        model(tokens, hooks=hooks).sum().backward()


def test_gradient_hooks_take_combinators(model: Transformer, tokens: torch.Tensor) -> None:
    seen = []
    hooks = TransformerHooks().append_to_path(
        "resid.torso.post_attn.bwd",
        AtLayers(1).append(AtPositions(-1).append(lambda g: seen.append(g.shape))),
    )
    model(tokens, hooks=hooks).sum().backward()
    assert seen == [(2, 1, 24)]
