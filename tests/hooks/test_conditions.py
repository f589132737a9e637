"""Combinators: only the part changes, what was given stays as it was, rows mean the same with any padding."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from conftest import strong_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import HookError
from neuron_lens.hooks import (
    AtHeads,
    AtLayers,
    AtPositions,
    AtRows,
    AtSteps,
    AtUnits,
    Hooks,
    Run,
    TransformerHooks,
    When,
)
from neuron_lens.transformer import KVCache, Transformer

Q = TransformerHooks().attn.q
COMBINATORS = [
    (AtPositions(2), (slice(None), [2])),
    (AtPositions([0, -1]), (slice(None), [0, 4])),
    (AtPositions(slice(1, 4)), (slice(None), [1, 2, 3])),
    (AtPositions(slice(-2, None)), (slice(None), [3, 4])),
    (AtPositions(range(3)), (slice(None), [0, 1, 2])),
    (AtHeads([0, 2]), (slice(None), slice(None), [0, 2])),
    (AtHeads(-1), (slice(None), slice(None), [3])),
    (AtUnits([1, 5]), (..., [1, 5])),
    (AtRows(1), ([1],)),
    (AtSteps(0), (slice(None),)),
]


def at_q(hook: Hooks) -> TransformerHooks:
    return TransformerHooks().append_to_path("attn.q.fwd", hook)


@pytest.mark.parametrize(("combinator", "index"), COMBINATORS, ids=lambda v: getattr(v, "name", ""))
@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_part_changes_and_the_input_stays(combinator: Hooks, index: tuple, in_place: bool) -> None:
    x = torch.randn(2, 5, 4, 6)
    before = x.clone()
    chain = type(combinator).__new__(type(combinator))
    chain.__dict__.update(combinator.__dict__, _hooks=[])
    chain.append((lambda p: p.mul_(2)) if in_place else (lambda p: p * 2))
    out = at_q(chain).attn.q(x, layer=0, run=Run(2, 5))
    expected = before.clone()
    expected[index] *= 2
    assert torch.equal(out, expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("combinator", "index"), COMBINATORS, ids=lambda v: getattr(v, "name", ""))
def test_a_hook_that_only_reads_copies_nothing(combinator: Hooks, index: tuple) -> None:
    x = torch.randn(2, 5, 4, 6)
    chain = type(combinator).__new__(type(combinator))
    chain.__dict__.update(combinator.__dict__, _hooks=[])
    seen = []
    chain.append(lambda part: seen.append(part))
    assert at_q(chain).attn.q(x, layer=0, run=Run(2, 5)) is x
    assert torch.equal(seen[0], x[index])


def test_combinators_nest_in_any_order() -> None:
    x = torch.randn(2, 5, 4, 6)
    run = Run(2, 5)
    first = AtLayers([3, 5]).append(
        AtPositions(-1).append(AtHeads(1).append(AtRows(0).append(torch.zeros_like)))
    )
    second = AtRows(0).append(
        AtHeads(1).append(AtPositions(-1).append(AtLayers([3, 5]).append(torch.zeros_like)))
    )
    expected = x.clone()
    expected[0, -1, 1] = 0
    for chain in (first, second):
        assert torch.equal(at_q(chain).attn.q(x, layer=3, run=run), expected)
        assert at_q(chain).attn.q(x, layer=4, run=run) is x


def test_when_and_a_site_without_the_axis() -> None:
    x = torch.ones(1, 2, 6)
    hooks = TransformerHooks().append_to_path(
        "resid.post_emb.fwd", When(lambda x, run: run.length == 2).append(torch.neg)
    )
    assert torch.equal(hooks.resid.post_emb(x, run=Run(1, 2)), -x)
    assert hooks.resid.post_emb(x, run=Run(1, 3)) is x
    wrong = TransformerHooks().append_to_path("resid.post_emb.fwd", AtHeads(0).append(torch.neg))
    with pytest.raises(HookError, match=r"resid\.post_emb\.fwd has no head"):
        wrong.resid.post_emb(x)
    with pytest.raises(HookError, match="belongs to no layer"):
        TransformerHooks().append_to_path("logits.fwd", AtLayers(0).append(torch.neg)).logits(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AtLayers([]),
        lambda: AtLayers(-1),
        lambda: AtPositions([]),
        lambda: AtPositions(True),
        lambda: AtHeads("all"),
        lambda: AtUnits(torch.tensor([0.5])),
        lambda: AtSteps(-1),
    ],
)
def test_bad_selections_are_refused_when_made(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(HookError):
        make()


@pytest.mark.parametrize(
    ("path", "chain", "message"),
    [
        ("resid.torso.post_mlp.fwd", AtPositions(10), "selects nothing"),
        ("attn.q.fwd", AtHeads(4), "axis of length 4"),
        ("mlp.post_act.fwd", AtUnits(48), "axis of length 48"),
        ("mlp.post_act.fwd", AtRows(2), "axis of length 2"),
        ("mlp.post_act.fwd", AtLayers([0, 3]), r"layers \[3\] do not exist"),
        ("attn.rot_q.fwd", Hooks(), "never fires"),
        ("attn.q.fwd", AtPositions(torch.zeros(3, dtype=torch.long)), "3 rows"),
    ],
)
def test_what_the_model_does_not_have_is_an_error(
    path: str, chain: Hooks, message: str, model: Transformer, tokens: torch.Tensor
) -> None:
    hooks = TransformerHooks().append_to_path(path, chain.append(torch.neg))
    with pytest.raises(HookError, match=message):
        model(tokens, hooks=hooks)


@given(
    lengths=st.lists(st.integers(3, 9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    position=st.sampled_from([0, 2, -1, -3, slice(1, None), slice(-2, None), [0, -1]]),
    path=st.sampled_from(["resid.torso.post_attn.fwd", "attn.v_out.fwd", "attn.qk_probs.fwd"]),
)
def test_positions_mean_the_same_in_a_padded_batch_as_in_the_row_alone(lengths, side, position, path) -> None:  # type: ignore[no-untyped-def]
    model = _MODEL
    width = max(lengths) + 1
    draw = torch.Generator().manual_seed(len(lengths))
    rows = [torch.randint(0, 50, (n,), generator=draw) for n in lengths]
    batch = torch.zeros(len(rows), width, dtype=torch.long)
    pad = torch.ones(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), None) if side == "left" else slice(0, len(row))
        batch[i, where], pad[i, where] = row, False
    hooks = TransformerHooks().append_to_path(
        path, AtLayers([1]).append(AtPositions(position).append(lambda x: x * 0.5))
    )
    together = model(batch, pad=pad, hooks=hooks)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together[i][~pad[i]], model(row[None], hooks=hooks)[0], atol=2e-5, rtol=1e-4
        )


def test_per_row_positions_pick_each_rows_own(model: Transformer, tokens: torch.Tensor) -> None:
    at = torch.tensor([2, -1])
    hooks = TransformerHooks().append_to_path("resid.post_emb.fwd", AtPositions(at).append(torch.zeros_like))
    store = hooks.record("resid.post_emb")
    model(tokens, hooks=hooks)
    zero = (store["resid.post_emb"] == 0).all(-1)
    assert zero.nonzero().tolist() == [[0, 2], [1, 9]]


@pytest.mark.parametrize(
    "chain", [AtPositions([1, 6]), AtPositions(-2), AtSteps([0, 2]), AtPositions(slice(3, 8))]
)
def test_generation_hooks_mean_the_same_with_and_without_a_cache(
    chain: Hooks, model: Transformer, tokens: torch.Tensor
) -> None:
    hooks = TransformerHooks().append_to_path(
        "resid.torso.post_mlp.fwd", AtLayers([0]).append(chain.append(lambda x: x * -1))
    )
    prompt = 5
    cache = KVCache(model.config, 2, capacity=10)
    cached = []
    for step, columns in enumerate([slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 8)]):
        part = tokens[:, columns]
        run = Run(2, part.shape[1], part, None, cache.length, prompt, step, model.config)
        cached.append(model(part, hooks=hooks, kv_cache=cache, run=run))
    run = Run(2, 8, tokens[:, :8], None, 0, prompt, 3, model.config)
    whole = model(tokens[:, :8], hooks=hooks, run=run)
    torch.testing.assert_close(torch.cat(cached, 1), whole, atol=2e-5, rtol=1e-4)
    chain._hooks.clear()


_MODEL = strong_model(tiny_config())


def test_hooks_at_layers_go_when_the_last_name_for_them_goes() -> None:
    class Recorder:
        def __call__(self, x: torch.Tensor) -> None: ...

    recorder = Recorder()
    gone = weakref.ref(recorder)
    hooks = TransformerHooks().append_to_path("mlp.post_act.fwd", AtLayers(1).append(recorder))
    gc.collect()
    gc.disable()
    try:
        del recorder, hooks
        assert gone() is None
    finally:
        gc.enable()
