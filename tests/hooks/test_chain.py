"""Chains and the contract of a hook."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from neuron_lens.errors import HookError
from neuron_lens.hooks import AtLayers, ConditionalHooks, FwdBwdHooks, Hooks, TransformerHooks, WrapperHooks


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def add_one(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def is_layer_two(x: torch.Tensor, layer: int) -> bool:
    return layer == 2


X = torch.arange(6.0).reshape(1, 2, 3)


def test_hooks_run_in_order_each_on_the_last_result() -> None:
    assert torch.equal(Hooks([double, add_one])(X), X * 2 + 1)
    assert torch.equal(Hooks([add_one, double])(X), (X + 1) * 2)


def test_a_hook_gets_only_the_context_it_names() -> None:
    seen = []
    chain = Hooks()
    chain.append(lambda x: seen.append(("none",)))
    chain.append(lambda x, layer: seen.append(("layer", layer)))
    chain.append(lambda x, layer, **rest: seen.append(("all", layer, sorted(rest))))
    chain.append(lambda x, colour="red": seen.append(("default", colour)))
    assert chain(X, layer=4, run="r") is X
    assert seen == [("none",), ("layer", 4), ("all", 4, ["run"]), ("default", "red")]


def test_a_hook_that_wants_what_nobody_gives_is_an_error_that_names_it() -> None:
    chain = Hooks([lambda x, strength: x])
    with pytest.raises(HookError, match="wants 'strength'"):
        chain(X, layer=0)
    assert chain.bind(strength=2)(X, layer=0) is X


def test_bind_twice_unbind_and_conflict() -> None:
    chain = Hooks([lambda x, strength: x * strength]).bind(strength=3)
    assert torch.equal(chain(X), X * 3)
    with pytest.raises(HookError, match="bound already"):
        chain.bind(strength=4)
    with pytest.raises(HookError, match="both bound and given"):
        chain(X, strength=1)
    assert torch.equal(chain.unbind(["strength"]).bind(strength=5)(X), X * 5)
    with pytest.raises(HookError, match="is not bound"):
        chain.unbind(["colour"])


@pytest.mark.parametrize(
    "wrong",
    [torch.zeros(1, 2, 4), torch.zeros(1, 2, 3, dtype=torch.float64), "text", (X,)],
    ids=["shape", "dtype", "text", "tuple"],
)
def test_a_wrong_result_names_path_layer_hook_and_shapes(wrong: object) -> None:
    def bad_hook(x: torch.Tensor) -> object:
        return wrong

    hooks = TransformerHooks().append_to_path("resid.torso.post_mlp.fwd", bad_hook)
    with pytest.raises(HookError) as error:
        hooks.resid.torso.post_mlp(X, layer=7)
    for part in ("resid.torso.post_mlp.fwd", "layer 7", "bad_hook", "[1, 2, 3]"):
        assert part in str(error.value)


@pytest.mark.parametrize("hook", [3, None, "f", lambda: None, lambda *, x: None])
def test_what_is_no_hook_is_refused_when_appended(hook: object) -> None:
    with pytest.raises(HookError):
        Hooks().append(hook)  # type: ignore[arg-type]


def test_builtins_without_a_signature_get_the_tensor_alone() -> None:
    assert torch.equal(Hooks([torch.relu])(X - 3, layer=1), torch.relu(X - 3))


def test_handles_remove_exactly_their_hook() -> None:
    chain = Hooks()
    chain.append(double)
    handle = chain.append(double, handle=True)
    chain.append(add_one)
    chain.remove(handle)
    assert torch.equal(chain(X), X * 2 + 1)
    with pytest.raises(HookError, match="removed before"):
        handle.remove()


def test_wrapper_and_condition() -> None:
    def twice(hook):  # type: ignore[no-untyped-def]
        return lambda x: hook(hook(x))

    assert torch.equal(WrapperHooks(twice).append(double)(X), X * 4)
    chain = ConditionalHooks(is_layer_two).append(double)
    assert chain(X, layer=1) is X
    assert torch.equal(chain(X, layer=2), X * 2)


def test_equality_pickle_and_deepcopy_run_equally() -> None:
    chain = Hooks([double, AtLayers([1, 2]).append(add_one)])
    same = Hooks([double, AtLayers([2, 1]).append(add_one)])
    assert chain == same
    assert chain != Hooks([double, AtLayers([1]).append(add_one)])
    for other in (pickle.loads(pickle.dumps(chain)), copy.deepcopy(chain)):
        assert other == chain
        for layer in (0, 1):
            assert torch.equal(other(X, layer=layer), chain(X, layer=layer))


def test_repr_is_an_indented_tree() -> None:
    text = repr(Hooks([double, AtLayers([3, 1]).append(add_one)]))
    assert text.splitlines() == ["hooks: 2 hooks", "  double", "  at layers 1, 3: 1 hook", "    add_one"]


def test_is_empty_looks_into_nested_chains() -> None:
    inner = AtLayers(2)
    chain = Hooks([inner])
    assert chain.is_empty() and not chain.acts_at(2)
    inner.append(double)
    assert not chain.is_empty()
    assert chain.acts_at(2) and not chain.acts_at(1) and chain.acts_at(None)


def test_site_order_is_fwd_then_bwd_then_fwd2() -> None:
    site = FwdBwdHooks()
    gradients = []
    site.append_fwd2(double).append_bwd(lambda g: gradients.append(g.clone())).append_fwd(add_one)
    x = X.clone().requires_grad_()
    out = site(x)
    assert torch.equal(out, (X + 1) * 2)
    out.sum().backward()
    # the gradient hook stands before fwd2, and so sees the factor that fwd2 puts on the gradient
    assert torch.equal(gradients[0], torch.full_like(X, 2.0))
