"""Trees: paths, globs, merging, recording."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import HookError
from neuron_lens.hooks import AtLayers, HookCollection, Hooks, TransformerHooks
from neuron_lens.transformer import Transformer

PATHS = TransformerHooks().paths()


class Times:
    """A hook that compares by its factor, so that trees can be compared by content."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Times) and self.factor == other.factor

    __hash__ = None  # type: ignore[assignment]


trees = st.lists(st.tuples(st.sampled_from(PATHS), st.floats(0.5, 2), st.booleans()), max_size=5).map(
    lambda items: _tree(items)
)


def _tree(items: list[tuple[str, float, bool]]) -> TransformerHooks:
    tree = TransformerHooks()
    for path, factor, layered in items:
        tree.append_to_path(path, AtLayers([1]).append(Times(factor)) if layered else Times(factor))
    return tree


def test_paths_are_the_public_versioned_list() -> None:
    assert len(PATHS) == len(set(PATHS)) == 3 * len(list(TransformerHooks().sites()))
    for path in (
        "mlp.post_act.fwd",
        "resid.torso.post_mlp.bwd",
        "attn.qk_probs.fwd2",
        "logits.fwd",
        "emb.tok.fwd",
    ):
        assert path in PATHS


@pytest.mark.parametrize(
    ("path", "suggestion"),
    [
        ("mlp.post_atc.fwd", "mlp.post_act.fwd"),
        ("mlp.post_act", "mlp.post_act.fwd"),
        ("attn.*.forward", "no hook path matches"),
    ],
)
def test_a_wrong_path_is_an_error_with_suggestions(path: str, suggestion: str) -> None:
    with pytest.raises(HookError, match=re.escape(suggestion)):
        TransformerHooks().append_to_path(path, torch.relu)


def test_a_wrong_attribute_says_what_exists() -> None:
    with pytest.raises(AttributeError, match="did you mean 'post_act'"):
        _ = TransformerHooks().mlp.post_atc


def test_globs_bind_all_matches_and_only_those() -> None:
    tree = TransformerHooks().append_to_path("attn.*.fwd", torch.relu)
    bound = [path for path, chain in tree.chains() if chain]
    assert bound == [path for path in PATHS if path.startswith("attn.") and path.endswith(".fwd")]
    everything = TransformerHooks().append_to_path("**.fwd", torch.relu)
    assert [p for p, c in everything.chains() if c] == [p for p in PATHS if p.endswith(".fwd")]


def test_own_collections_nest_and_know_their_paths() -> None:
    root = HookCollection().add_subhooks("left", HookCollection().add_subhooks("leaf", Hooks(name="leaf")))
    root.append_to_path("left.leaf", torch.relu)
    assert root.left.path == "left" and root.paths() == ["left.leaf"]
    with pytest.raises(HookError, match="not a free attribute"):
        root.add_subhooks("left", Hooks())
    root.append_all(torch.relu)
    assert len(root.left.leaf) == 2


@given(trees, trees, trees)
def test_merging_associates_and_changes_neither(
    a: TransformerHooks, b: TransformerHooks, c: TransformerHooks
) -> None:
    before = copy.deepcopy(a)
    assert (a | b) | c == a | (b | c)
    assert a == before
    assert a | TransformerHooks() == a == TransformerHooks() | a


def test_merging_runs_the_left_hooks_first_and_keeps_bindings() -> None:
    a = TransformerHooks().append_to_path("logits.fwd", lambda x, by: x + by).bind(by=1)
    b = TransformerHooks().append_to_path("logits.fwd", lambda x, by: x * by).bind(by=3)
    x = torch.ones(1, 1, 2)
    assert torch.equal((a | b).logits(x), (x + 1) * 3)
    assert torch.equal((b | a).logits(x), x * 3 + 1)
    assert (a | b) | a == a | (b | a)


@given(trees)
def test_pickle_deepcopy_and_copy_are_equal_and_run_equally(tree: TransformerHooks) -> None:
    x = torch.ones(1, 2, 24)
    for other in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree), tree.copy()):
        assert other == tree
        assert torch.equal(other.resid.torso.post_mlp(x, layer=1), tree.resid.torso.post_mlp(x, layer=1))


def test_copies_are_independent_and_share_callables() -> None:
    hook = Times(2)
    tree = TransformerHooks().append_to_path("logits.fwd", hook)
    other = tree.copy().append_to_path("logits.fwd", Times(3))
    assert len(tree.logits.fwd) == 1
    assert next(iter(other.logits.fwd)) is hook


def test_temporarily_takes_the_hook_away_even_after_an_exception() -> None:
    tree = TransformerHooks()
    with pytest.raises(RuntimeError), tree.temporarily("attn.*.fwd", torch.relu):
        assert not tree.is_empty()
        raise RuntimeError
    assert tree.is_empty() and tree == TransformerHooks()


def test_to_text_shows_where_hooks_are() -> None:
    tree = TransformerHooks().append_to_path("mlp.post_act.fwd", AtLayers([2]).append(torch.relu))
    assert "mlp.post_act.fwd: 1 hook" in tree.to_text()
    assert "at layers 2" in tree.to_text() and "logits" not in tree.to_text()
    assert "(no hooks)" in repr(TransformerHooks())


def test_record_keeps_what_was_asked(model: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks()
    store = hooks.record(["resid.torso.post_mlp", "mlp.*"], layers=[0, 2])
    at_end = hooks.record("resid.post_ln_f", positions=-1, dtype=torch.float64)
    with pytest.raises(HookError, match="never fires"):
        model(tokens, hooks=hooks)  # mlp.* names sites that a plain MLP does not have
    hooks = TransformerHooks()
    store = hooks.record(["resid.torso.post_mlp", "mlp.p*_act"], layers=[0, 2])
    at_end = hooks.record("resid.post_ln_f", positions=-1, dtype=torch.float64)
    model(tokens, hooks=hooks)
    assert set(store) == {
        (f"{s}", i) for s in ("resid.torso.post_mlp", "mlp.pre_act", "mlp.post_act") for i in (0, 2)
    }
    assert torch.equal(store["resid.torso.post_mlp", 2], model(tokens, stop_at_layer=3))
    assert at_end["resid.post_ln_f"].shape == (2, 1, 24) and at_end["resid.post_ln_f"].dtype == torch.float64
    with pytest.raises(KeyError, match="layer 1"):
        _ = store["mlp.post_act", 1]
    store.stop()
    at_end.stop()
    assert hooks.is_empty()


def test_a_recorded_tensor_edited_in_place_raises_when_read(model: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks()
    store = hooks.record("resid.torso.post_mlp", layers=[0])
    copied = hooks.record("resid.torso.post_mlp", layers=[0], dtype=torch.float64)
    hooks.append_to_path("resid.torso.pre_attn.fwd", AtLayers(1).append(lambda x: x.zero_()))
    with torch.no_grad():
        model(tokens, hooks=hooks)
        clean = model(tokens, stop_at_layer=1)
    with pytest.raises(HookError, match="edited in place"):
        _ = store["resid.torso.post_mlp", 0]
    assert torch.equal(copied["resid.torso.post_mlp", 0].float(), clean)
