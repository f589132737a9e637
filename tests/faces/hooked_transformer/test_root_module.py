"""Hook points on people's own modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuron_lens.errors import HookError, RequestError
from neuron_lens.faces.hooked_transformer import HookedRootModule, HookPoint


class Two(HookedRootModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.hook_mid, self.hook_out = HookPoint(), HookPoint()
        self.setup()

    def forward(self, x: Tensor, stop: bool = False) -> Tensor:
        x = self.hook_mid(self.first(x))
        return x if stop else self.hook_out(self.second(x))


X = torch.arange(6.0).reshape(2, 3)


def zero(x: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(x)


def test_hooks_change_and_are_gone() -> None:
    model = Two()
    before = model(X)
    assert torch.equal(
        model.run_with_hooks(X, fwd_hooks=[("hook_mid", zero)]), model.second.bias.expand(2, 3)
    )
    assert torch.equal(model(X), before)
    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[("hook_*", zero)]):
        assert torch.equal(model(X), torch.zeros(2, 3))
        raise ZeroDivisionError
    assert torch.equal(model(X), before) and not model.list_hooks()


def test_levels_permanence_and_order() -> None:
    model, seen = Two(), []
    usual = ["first", "kept", "plain"]

    def note(word: str) -> Any:
        return lambda x, hook: seen.append(word)

    model.add_perma_hook("hook_mid", note("kept"))
    model.add_hook("hook_mid", note("plain"))
    model.add_hook("hook_mid", note("first"), prepend=True)
    with model.hooks(fwd_hooks=[("hook_mid", note("one"))]):
        with model.hooks(fwd_hooks=[("hook_mid", note("two"))]):
            assert model.context_level == 2
            model(X)
        model(X)
    model(X)
    model.reset_hooks()
    model(X)
    assert seen == [*usual, "one", "two", *usual, "one", *usual, "kept"]
    model.reset_hooks(including_permanent=True)
    assert not model.hook_mid.has_hooks()


def test_gradients() -> None:
    model = Two()
    seen: dict[str, Tensor] = {}

    def double(gradient: Tensor, hook: HookPoint) -> tuple[Tensor]:
        seen[str(hook.name)] = gradient.clone()
        return (gradient * 2,)

    model(X).sum().backward()
    plain = model.first.weight.grad
    model.zero_grad()
    out = model.run_with_hooks(X, bwd_hooks=[("hook_mid", double)])
    assert not model.hook_mid.has_hooks("bwd")
    out.sum().backward()  # the hooks of that forward, though gone by now
    assert plain is not None and torch.allclose(model.first.weight.grad, plain * 2)
    assert torch.allclose(seen["hook_mid"], model.second.weight.sum(0).expand(2, 3))


def test_cache() -> None:
    model = Two()
    out, cache = model.run_with_cache(X)
    assert (
        list(cache) == ["hook_mid", "hook_out"]
        and torch.equal(cache["hook_out"], out)
        and not cache["hook_out"].requires_grad
    )
    _, grads = model.run_with_cache(X.requires_grad_(False), names_filter=("hook_mid",), pos_slice=0)
    assert list(grads) == ["hook_mid"] and grads["hook_mid"].shape == (1, 3)
    with pytest.raises(RequestError, match="one number"):
        model.run_with_cache(X, incl_bwd=True)
    with pytest.raises(RequestError, match="2 rows"):
        model.run_with_cache(X, remove_batch_dim=True)
    cached = model.add_caching_hooks("hook_mid")
    model(X)
    assert model.is_caching and torch.equal(cached["hook_mid"], cache["hook_mid"])


def test_copies_and_pickles_keep_hooks() -> None:
    model = Two()
    model.add_perma_hook("hook_mid", zero)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), model(X))
        other.reset_hooks(including_permanent=True)
        assert not torch.equal(other(X), model(X))
    assert list(model.state_dict()) == ["first.weight", "first.bias", "second.weight", "second.bias"]


def test_aliases() -> None:
    seen = []
    point = HookPoint()
    point.name = "true"
    point.add_hook(lambda x, hook: seen.append(hook.name), alias_names=["a", "b"])
    point(X)
    assert seen == ["a", "b"] and point.name == "true"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("hook_mit", "did you mean 'hook_mid'"),
        ("*.nothing", "no hook point"),
        (lambda n: False, "true for none"),
        (3, "names_filter"),
    ],
)
def test_filters_that_match_nothing(bad: Any, says: str) -> None:
    with pytest.raises(HookError, match=says):
        Two().run_with_cache(X, names_filter=bad)


def test_points_that_never_run() -> None:
    model = Two()
    with pytest.raises(HookError, match="never ran"):
        model.run_with_hooks(X, stop=True, fwd_hooks=[("hook_out", zero)])
    with pytest.raises(HookError, match="never ran"):
        model.run_with_cache(X, stop=True, names_filter=["hook_mid", "hook_out"])
    assert list(model.run_with_cache(X, stop=True)[1]) == ["hook_mid"]
    with pytest.raises(HookError, match="dir"):
        model.add_hook("hook_mid", zero, dir="sideways")  # type: ignore[arg-type]
