"""Edits of attention patterns mean positions, whatever the padding and whatever stands in a key-value cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtPositions, Run, TransformerHooks
from neuron_lens.interventions import (
    AttentionKnockout,
    Intervention,
    Patch,
    PerRow,
    Scale,
    Set,
    Span,
    TokenLogit,
    Zero,
    capture,
    sweep,
    to_hooks,
)
from neuron_lens.transformer import Transformer
from tests.interventions.models import prompts, tiny_model

PROBS, LOGITS = "attn.qk_probs", "attn.qk_logits"
EDITS: dict[str, Intervention] = {
    "scale keys": Scale(site=PROBS, keys=(1, -2), factor=3.0),
    "scale keys of queries": Scale(site=LOGITS, keys=0, positions=(-1, 2), heads=(0, 3), factor=0.5),
    "write": Set(site=PROBS, keys=(0, 2), positions=Span(start=2), value=0.25),
    "zero": Zero(site=PROBS, keys=-1, layers=1),
    "cut": AttentionKnockout(positions=(3, -1), keys=(1, -3)),
    "cut behind the softmax": AttentionKnockout(keys=(0, -2), when="after"),
    "cut, not renormalised": AttentionKnockout(keys=(-1, 1), when="after", renormalise=False),
    "cells": AttentionKnockout(cells=((3, 1), (-1, -2), (-1, 0))),
    "only itself": AttentionKnockout(positions=(-1, -2), keep_self=True),
    "a span of queries": AttentionKnockout(positions=Span(start=-2), keys=(0, 1)),
}


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows [1, pos] of different length as one batch, and where it is padding."""
    longest = max(row.shape[1] for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    pad = torch.ones(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = row.shape[1]
        at = slice(longest - n, longest) if side == "left" else slice(0, n)
        tokens[i, at], pad[i, at] = row[0], False
    return tokens, pad


def rows_of() -> list[Tensor]:
    return [prompts(1, 5, seed=1), prompts(1, 8, seed=2), prompts(1, 6, seed=3)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "parallel", "sandwich"])
def test_a_padded_row_is_edited_as_the_row_alone(family: str, side: str) -> None:
    model, rows = tiny_model(family), rows_of()
    tokens, pad = padded(rows, side)
    plain = model(tokens, pad=pad)
    for name, edit in EDITS.items():
        together = model(tokens, pad=pad, hooks=to_hooks(edit, model))
        for i, row in enumerate(rows):
            alone = model(row, hooks=to_hooks(edit, model))[0]
            torch.testing.assert_close(together[i][~pad[i]], alone, atol=2e-5, rtol=1e-4, msg=f"{name}, {i}")
        assert not torch.equal(together[~pad], plain[~pad]), f"{name} did nothing"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_edits_alike_with_and_without_a_cache_and_padding(family: str) -> None:
    model, rows = tiny_model(family, n_ctx=16), rows_of()
    lists = [row[0].tolist() for row in rows]
    plain = [one.ids for one in model.sample(lists, max_new_tokens=5, temperature=0)]
    differ = 0
    later = Scale(site=LOGITS, keys=7, factor=3.0)  # a key that most rows only have once they have grown
    for name, edit in {**EDITS, "later": later}.items():
        hooks = to_hooks(edit, model)
        options = {"max_new_tokens": 5, "temperature": 0, "hooks": hooks, "return_logits": True}
        cached = model.sample(lists, **options)
        whole = model.sample(lists, use_kv_cache=False, **options)
        alone = [model.sample(row, **options) for row in lists]
        for one, two, three in zip(cached, whole, alone, strict=True):
            assert one.ids == two.ids == three.ids, name
            torch.testing.assert_close(one.logits, two.logits, atol=3e-5, rtol=1e-4)
            torch.testing.assert_close(one.logits, three.logits, atol=3e-5, rtol=1e-4)
        differ += [one.ids for one in cached] != plain
    assert differ >= len(EDITS) // 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_sweep_of_patterns_over_padded_prompts_equals_the_loop(side: str) -> None:
    model = tiny_model("llama")
    tokens, pad = padded(rows_of(), side)
    metric = TokenLogit(3)
    result = sweep(model, tokens, list(EDITS.values()), metric, pad=pad).per_example()
    for cell, edit in enumerate(EDITS.values()):
        expected = metric(model(tokens, pad=pad, hooks=to_hooks(edit, model)), tokens, pad)
        torch.testing.assert_close(result[cell], expected, atol=3e-5, rtol=1e-4)


def test_patches_of_prompts_of_unequal_length_while_generating() -> None:
    model, rows = tiny_model("llama", n_ctx=16), rows_of()
    lists = [row[0].tolist() for row in rows]
    tokens, pad = padded(rows, "left")  # as generation pads them
    others = torch.where(pad, tokens, (tokens + 5) % 23)
    source = capture(model, others, "resid.torso.pre_attn", pad=pad)
    edit = Patch(site="resid.torso.pre_attn", layers=1, positions=(-1, 2), source=source)
    options = {"max_new_tokens": 4, "temperature": 0, "hooks": to_hooks(edit, model), "return_logits": True}
    cached, whole = model.sample(lists, **options), model.sample(lists, use_kv_cache=False, **options)
    for i, row in enumerate(rows):
        own = capture(model, (row + 5) % 23, "resid.torso.pre_attn")
        patch = Patch(site="resid.torso.pre_attn", layers=1, positions=(-1, 2), source=own)
        alone = model.sample(lists[i], **{**options, "hooks": to_hooks(patch, model)})
        for one in (cached[i], whole[i]):
            torch.testing.assert_close(one.logits, alone.logits, atol=3e-5, rtol=1e-4)
    everywhere = to_hooks(Patch(site="resid.torso.pre_attn", layers=1, source=source), model)
    with pytest.raises(RequestError, match="name positions of the prompt"):
        model.sample(lists, max_new_tokens=2, hooks=everywhere)


def test_a_query_that_is_not_meant_may_be_left_with_nothing() -> None:
    model, tokens = tiny_model(), prompts(2)
    queries = PerRow(positions=((3,), (5, 6)))
    for edit in (
        AttentionKnockout(positions=queries, keys=(0, 1)),
        AttentionKnockout(keys=(0, 1), positions=Span(start=2)),
        AttentionKnockout(keys=0, rows=1, positions=4),
    ):
        assert not model(tokens, hooks=to_hooks(edit, model)).isnan().any()
    with pytest.raises(RequestError, match="nothing to look at"):
        model(tokens, hooks=to_hooks(AttentionKnockout(keys=(0, 1), positions=Span(start=1)), model))


@pytest.mark.parametrize(
    "edit", [Scale(site=PROBS, keys=8, factor=2.0), Scale(site=PROBS, keys=-9, factor=2.0)]
)
def test_keys_that_no_row_has_are_refused(edit: Intervention) -> None:
    model = tiny_model()
    tokens, pad = padded(rows_of(), "left")
    for given, its_pad in ((tokens, pad), (tokens[1:2], None)):
        with pytest.raises(RequestError, match="no row has key"):
            model(given, pad=its_pad, hooks=to_hooks(edit, model))


def test_a_run_knows_its_keys(model: Transformer) -> None:
    seen: list[Run] = []
    hooks = TransformerHooks().append_to_path(
        f"{PROBS}.fwd", AtPositions(slice(-1, None)).append(lambda x, run: seen.append(run))
    )
    model.sample([[1, 2, 3], [4]], max_new_tokens=3, temperature=0, hooks=hooks)
    assert seen[0].key_positions().tolist() == [[0, 1, 2], [-1, -1, 0]]
    assert seen[-1].key_positions().tolist() == [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]
    # outside generation: the keys of narrowed runs stay all keys
    tokens = torch.arange(8).view(2, 4)
    pad = torch.tensor([[True, False, False, False], [False] * 4])
    model(tokens, pad=pad, hooks=hooks)
    assert seen[-1].length == 1 and seen[-1].key_positions().shape[1] == 4
