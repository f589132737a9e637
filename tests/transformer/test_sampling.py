"""Generation: greedy equals transformers, a row equals the row alone, hooks mean the same with and without a cache."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import AtPositions, AtSteps, TransformerHooks
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import KVCache, RotaryConfig, Transformer, TransformerConfig
from neuron_lens.transformer.generation import Generation
from neuron_lens.transformer.sampling import sample, stream
from neuron_lens.transformer.token_choice import (
    TokenChoice,
    draw,
    keep_top_k,
    keep_top_p,
    penalise_frequency,
    penalise_repetition,
)

TINY = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_mlp": 32, "d_vocab": 31, "n_ctx": 24}
PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 6], [7, 7, 7]]


def tiny(seed: int = 0, **changes: object) -> Transformer:
    """A model whose tokens depend on the prompt: weights large enough that logits differ."""
    model = Transformer(TransformerConfig(**{**TINY, **changes}), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny()


@pytest.fixture(scope="module")
def speaking() -> Transformer:
    """A model with a tokenizer of bytes."""
    model = tiny(d_vocab=257)
    model.tokenizer = bytes_tokenizer()
    return model


def ids_of(results: Generation | list[Generation]) -> list[list[int]]:
    return [result.ids for result in (results if isinstance(results, list) else [results])]


# the choice of a token


logit_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


@given(logit_rows, st.integers(1, 14))
def test_top_k_keeps_the_k_largest(row: list[float], k: int) -> None:
    logits = torch.tensor([row])
    kept = keep_top_k(logits, k)[0]
    lowest = sorted(row, reverse=True)[min(k, len(row)) - 1]
    assert kept.tolist() == [x if x >= lowest else -float("inf") for x in logits[0].tolist()]


@given(logit_rows, st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(row: list[float], p: float) -> None:
    probs = torch.tensor(row).softmax(-1)
    kept = keep_top_p(torch.tensor([row]), p)[0].isfinite()
    total, least = float(probs[kept].sum()), float(probs[kept].min())
    assert total >= p - 1e-5, "the kept tokens reach p"
    assert total - least < p + 1e-5, "without the least of them they do not"
    assert not (~kept).any() or probs[~kept].max() <= least, "none that was dropped is likelier"


@given(logit_rows, st.integers(0, 10))
def test_drawing_many_evenly_spaced_numbers_gives_the_probabilities(row: list[float], ruled_out: int) -> None:
    logits = torch.tensor(row)
    logits[ruled_out % (len(row) - 1)] = -torch.inf
    n = 500
    uniform = (torch.arange(n) + 0.5) / n
    drawn = draw(logits.expand(n, -1), uniform.double()).bincount(minlength=len(row)) / n
    assert (drawn - logits.softmax(-1)).abs().max() <= 1.5 / n
    assert drawn[~logits.isfinite()].sum() == 0


def test_the_ends_of_the_unit_interval_draw_tokens_that_are_possible() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, -torch.inf]] * 2)
    assert draw(logits, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [1, 2]


def test_penalties_follow_their_formulas() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    assert penalise_repetition(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]
    assert penalise_frequency(logits, torch.tensor([[3, 0, 1]]), 0.5).tolist() == [[0.5, -2.0, 0.5]]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(RequestError, match=f"{said} must be .*; got"):
        TokenChoice(**wrong)


# greedy against transformers


def as_gpt2(model: Transformer) -> object:
    """The same weights in transformers' GPT-2."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        n_layer=c.n_layers, n_embd=c.d_model, n_head=c.n_heads, n_inner=c.d_mlp, vocab_size=c.d_vocab,
        n_positions=c.n_ctx, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        t = theirs.transformer
        t.wte.weight.copy_(model.embed.weight)
        t.wpe.weight.copy_(model.pos_embed.weight)
        for ours, block in zip(model.blocks, t.h, strict=True):
            parts = (ours.attn.q, ours.attn.k, ours.attn.v)
            block.attn.c_attn.weight.copy_(torch.cat([p.weight.T for p in parts], 1))
            block.attn.c_attn.bias.copy_(torch.cat([p.bias for p in parts]))
            for conv, linear in (
                (block.attn.c_proj, ours.attn.out),
                (block.mlp.c_fc, ours.mlp.up),
                (block.mlp.c_proj, ours.mlp.down),
            ):
                conv.weight.copy_(linear.weight.T)
                conv.bias.copy_(linear.bias)
    return theirs


@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_equals_transformers_token_for_token(seed: int, repetition_penalty: float) -> None:
    model = tiny(seed)
    theirs = as_gpt2(model)
    longest = max(map(len, PROMPTS))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    ours = sample(model, PROMPTS, temperature=0, max_new_tokens=12, repetition_penalty=repetition_penalty)
    if repetition_penalty == 1.0:
        expected = theirs.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False)[
            :, longest:
        ]
        assert ids_of(ours) == expected.tolist()
    else:  # transformers counts padding as seen, so there rows are compared alone
        for prompt, result in zip(PROMPTS, ours, strict=True):
            alone = theirs.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=12, do_sample=False, repetition_penalty=repetition_penalty,
            )  # fmt: skip
            assert result.ids == alone[0, len(prompt) :].tolist()
    assert len({tuple(ids) for ids in ids_of(ours)}) == len(PROMPTS), "the prompts are continued differently"


# rows, seeds, caches


CHOICES = [
    {"temperature": 0},
    {"temperature": 0.7, "top_k": 9},
    {"top_p": 0.8, "frequency_penalty": 0.9},
    {"temperature": 1.5, "repetition_penalty": 1.3, "eos_ids": range(4)},
]
MODELS = {
    "learned": {},
    "rotary": {"position": "rotary", "rotary": RotaryConfig(dims=4), "n_kv_heads": 1, "norm": "rms"},
    "alibi": {"position": "alibi", "windows": (4, None)},
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", CHOICES)
def test_a_row_of_a_batch_gives_what_it_gives_alone(kind: str, options: dict[str, object]) -> None:
    model = tiny(**MODELS[kind])
    together = sample(model, PROMPTS, seed=11, max_new_tokens=10, return_logits=True, **options)
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = sample(model, [prompt], seed=11, max_new_tokens=10, return_logits=True, **options)[0]
        uncached = sample(
            model, [prompt], seed=11, max_new_tokens=10, return_logits=True, use_kv_cache=False, **options
        )[0]
        assert row.ids == alone.ids == uncached.ids
        assert row.finish == alone.finish == uncached.finish
        torch.testing.assert_close(row.logits, alone.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(row.logits, uncached.logits, atol=1e-4, rtol=1e-4)


def test_rows_that_finish_early_leave_the_others_as_they_are(model: Transformer) -> None:
    plain = sample(model, PROMPTS, temperature=0, max_new_tokens=12)
    eos = next(i for i in plain[0].ids if i not in plain[1].ids)
    for cached in (True, False):
        ended = sample(model, PROMPTS, temperature=0, max_new_tokens=12, eos_ids=[eos], use_kv_cache=cached)
        assert ended[0].finish == "eos"
        for whole, row in zip(plain, ended, strict=True):
            until = whole.ids.index(eos) + 1 if eos in whole.ids else 12
            assert row.ids == whole.ids[:until]


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(0, 99)
)
def test_seeds_repeat_and_batches_do_not_matter(prompts: list[list[int]], seed: int) -> None:
    model = tiny()
    first = sample(model, prompts, seed=seed, max_new_tokens=5)
    assert ids_of(first) == ids_of(sample(model, prompts, seed=seed, max_new_tokens=5))
    reversed_once = sample(model, [prompts[-1]], seed=seed, max_new_tokens=5)
    if prompts[-1] not in prompts[:-1]:
        assert ids_of(reversed_once)[0] == first[-1].ids


def test_equal_prompts_are_continued_differently_and_no_seed_means_a_new_one(model: Transformer) -> None:
    rows = sample(model, [[1, 2]] * 4, seed=5, max_new_tokens=10, temperature=2.0)
    assert len({tuple(row.ids) for row in rows}) > 1
    first, second = sample(model, [1, 2], max_new_tokens=10), sample(model, [1, 2], max_new_tokens=10)
    assert first.seed != second.seed
    assert sample(model, [1, 2], max_new_tokens=10, seed=first.seed).ids == first.ids


def test_logits_on_request_are_those_of_a_plain_forward(model: Transformer) -> None:
    result = sample(model, PROMPTS[0], seed=2, max_new_tokens=6, return_logits=True, top_k=5)
    assert result.logits is not None
    whole = model(torch.tensor([result.all_ids]))[0]
    before = len(PROMPTS[0]) - 1
    torch.testing.assert_close(result.logits, whole[before : before + 6], atol=1e-4, rtol=1e-4)
    assert sample(model, PROMPTS[0], max_new_tokens=2).logits is None


@pytest.mark.parametrize("cached", [True, False])
def test_nothing_global_changes(model: Transformer, cached: bool) -> None:
    state = torch.get_rng_state()
    tokens = stream(model, PROMPTS[0], max_new_tokens=3, use_kv_cache=cached)
    next(tokens)
    assert torch.is_grad_enabled(), "between tokens the caller has gradients"
    list(tokens)
    assert torch.equal(state, torch.get_rng_state())


# hooks


def steering(combinator: object, path: str = "resid.torso.post_mlp.fwd") -> TransformerHooks:
    direction = torch.linspace(-3, 3, 16)

    def steer(x: Tensor) -> Tensor:
        return x + direction

    return TransformerHooks().append_to_path(path, combinator.append(steer))


@pytest.mark.parametrize(
    "prompts", [PROMPTS, [PROMPTS[0], [8, 2, 8, 1, 8, 2]]], ids=["padded", "equal lengths"]
)
@pytest.mark.parametrize(
    "where",
    [
        lambda: AtPositions(0),
        lambda: AtPositions(-1),
        lambda: AtPositions([1, 8]),
        lambda: AtPositions(slice(-2, None)),
        lambda: AtPositions(slice(4, 9)),
        lambda: AtSteps(0),
        lambda: AtSteps([2, 3]),
        lambda: AtSteps(range(1, 20)).append(AtPositions(7)),
    ],
)
def test_hooks_steer_alike_with_and_without_a_cache_and_in_batches(
    where: object, prompts: list[list[int]]
) -> None:
    model = tiny()
    options = {"max_new_tokens": 8, "temperature": 0, "return_logits": True, "hooks": steering(where())}
    cached, uncached = (sample(model, prompts, use_kv_cache=use, **options) for use in (True, False))
    plain = sample(model, prompts, max_new_tokens=8, temperature=0, return_logits=True)
    for row, again, prompt in zip(cached, uncached, prompts, strict=True):
        assert row.ids == again.ids
        torch.testing.assert_close(row.logits, again.logits, atol=1e-4, rtol=1e-4)
        alone = sample(model, prompt, **{**options, "hooks": steering(where())})
        assert row.ids == alone.ids
    assert any(not torch.equal(a.logits, b.logits) for a, b in zip(cached, plain, strict=True)), (
        "they steer at all"
    )


def test_at_positions_during_generation_is_the_forward_with_the_same_positions_hooked(
    model: Transformer,
) -> None:
    hooks = steering(AtPositions([-1, 7]))
    result = sample(model, [PROMPTS[0]], hooks=hooks, temperature=0, max_new_tokens=6, return_logits=True)[0]
    prompt_end = len(PROMPTS[0]) - 1
    expected = model(torch.tensor([result.all_ids[:-1]]), hooks=steering(AtPositions([prompt_end, 7])))
    torch.testing.assert_close(result.logits, expected[0, prompt_end:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [True, False])
def test_hooks_see_step_prompt_lengths_and_absolute_positions(model: Transformer, cached: bool) -> None:
    told: list[tuple[int, list[int], list[list[int]]]] = []

    def note(x: Tensor, run: object) -> None:
        told.append((run.step, list(run.prompt_lengths.tolist()), run.positions().tolist()))

    hooks = TransformerHooks().append_to_path("resid.post_emb.fwd", note)
    sample(model, [[1, 2, 3], [4]], hooks=hooks, max_new_tokens=3, use_kv_cache=cached)
    prompt = [[0, 1, 2], [-1, -1, 0]]
    new = (
        [[[3], [1]], [[4], [2]]]
        if cached
        else [[[0, 1, 2, 3], [-1, -1, 0, 1]], [[0, 1, 2, 3, 4], [-1, -1, 0, 1, 2]]]
    )
    assert told == [(0, [3, 1], prompt), (1, [3, 1], new[0]), (2, [3, 1], new[1])]


def test_finished_rows_are_padding_to_hooks(model: Transformer) -> None:
    told: list[list[list[int]]] = []
    hooks = TransformerHooks().append_to_path(
        "resid.post_emb.fwd", lambda x, run: told.append(run.positions().tolist())
    )
    prompts = [PROMPTS[0][:2], PROMPTS[1]]
    plain = sample(model, prompts, temperature=0, max_new_tokens=4)
    eos = next(i for i in plain[0].ids[:2] if i not in plain[1].ids)
    sample(model, prompts, temperature=0, max_new_tokens=4, eos_ids=[eos], hooks=hooks)
    assert told[-1] == [[-1], [4]]


def test_gradient_hooks_are_refused_since_they_never_run(model: Transformer) -> None:
    hooks = TransformerHooks().append_to_path("mlp.post_act.bwd", lambda g: None)
    with pytest.raises(HookError, match="gradient hooks"):
        sample(model, [1], hooks=hooks)


# shared prefixes


def prefix_of(model: Transformer, tokens: list[list[int]]) -> KVCache:
    cache = KVCache(model.config, len(tokens), len(tokens[0]))
    with torch.no_grad():
        model(torch.tensor(tokens), kv_cache=cache)
    return cache.freeze()


@pytest.mark.parametrize("prompts", [PROMPTS, [[1], [2]]], ids=["padded", "equal lengths"])
def test_a_shared_prefix_is_as_if_every_prompt_began_with_it(
    model: Transformer, prompts: list[list[int]]
) -> None:
    shared = [9, 8, 7, 6]
    whole = sample(model, [shared + p for p in prompts], temperature=0, max_new_tokens=6)
    for tokens in ([shared], [shared] * len(prompts)):
        prefix = prefix_of(model, tokens)
        keys = prefix.keys[0].clone()
        for _ in range(2):
            rows = sample(model, prompts, prefix=prefix, temperature=0, max_new_tokens=6)
            assert ids_of(rows) == ids_of(whole)
        assert prefix.length == 4 and prefix.frozen and torch.equal(prefix.keys[0], keys)


def test_hooks_behind_a_prefix_see_positions_of_the_whole(model: Transformer) -> None:
    shared = [9, 8, 7, 6]
    hooks = steering(AtPositions([-1, 10]))
    whole = sample(model, [shared + p for p in PROMPTS], temperature=0, max_new_tokens=6, hooks=hooks)
    rows = sample(
        model, PROMPTS, prefix=prefix_of(model, [shared]), temperature=0, max_new_tokens=6, hooks=hooks
    )
    assert ids_of(rows) == ids_of(whole)


def test_prefixes_that_do_not_fit_are_refused(model: Transformer) -> None:
    prefix = prefix_of(model, [[1, 2], [3, 4]])
    with pytest.raises(RequestError, match="2 rows for 3 prompts"):
        sample(model, PROMPTS, prefix=prefix, max_new_tokens=2)
    with pytest.raises(RequestError, match="use_kv_cache=False"):
        sample(model, PROMPTS[:2], prefix=prefix, use_kv_cache=False, max_new_tokens=2)
    with pytest.raises(RequestError, match=r"freeze\(\)"):
        sample(model, PROMPTS[:2], prefix=prefix.unfreeze(), max_new_tokens=2)


# texts, streams, stops


def test_texts_are_encoded_and_decoded_by_the_tokenizer(speaking: Transformer) -> None:
    one = speaking.sample("héllo", seed=1, max_new_tokens=5)
    many = speaking.sample(["héllo", "a"], seed=1, max_new_tokens=5)
    assert isinstance(one, Generation) and isinstance(many, list)
    assert one.prompt_ids == list("héllo".encode()) and many[0].ids == one.ids
    assert one.text == bytes(i for i in one.ids if i < 256).decode(errors="replace")


def test_ids_are_taken_in_every_form(model: Transformer) -> None:
    options = {"temperature": 0, "max_new_tokens": 3}
    expected = sample(model, [1, 2, 3], **options).ids
    assert sample(model, torch.tensor([1, 2, 3]), **options).ids == expected
    for many in ([[1, 2, 3]], torch.tensor([[1, 2, 3]]), [torch.tensor([1, 2, 3])], ((1, 2, 3),)):
        assert ids_of(sample(model, many, **options)) == [expected]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([(), ("e",), ("ab", "b"), ("  ", "\x00")]))
def test_streamed_pieces_join_to_the_text(seed: int, stops: tuple[str, ...]) -> None:
    model = tiny(d_vocab=257)
    model.tokenizer = bytes_tokenizer()
    options = {"seed": seed, "max_new_tokens": 12, "stop_strings": stops, "temperature": 3.0, "top_k": 200}
    tokens = list(model.stream(["no", "é"], **options))
    for index, result in enumerate(model.sample(["no", "é"], **options)):
        mine = [token for token in tokens if token.row == index]
        assert "".join(token.text for token in mine) == result.text
        assert [token.id for token in mine] == result.ids
        assert [token.step for token in mine] == list(range(len(mine)))
        assert [token.finish for token in mine] == [None] * (len(mine) - 1) + [result.finish]
        assert not any(stop in result.text for stop in stops)


def test_a_stop_string_over_several_tokens_ends_the_row_before_it() -> None:
    model = Transformer(TransformerConfig(**{**TINY, "d_vocab": 257}))
    model.tokenizer = bytes_tokenizer()
    script = b"\nso on. STOP never"

    def say(logits: Tensor, run: object) -> Tensor:
        forced = torch.full_like(logits, -9.0)
        forced[..., script[run.step]] = 9.0
        return forced

    hooks = TransformerHooks().append_to_path("logits.fwd", say)
    pieces = list(
        model.stream("x", temperature=0, stop_strings=["zz", " STOP"], hooks=hooks, max_new_tokens=18)
    )
    assert "".join(piece.text for piece in pieces) == "\nso on."
    assert pieces[-1].finish == "stop" and bytes(piece.id for piece in pieces) == b"\nso on. STOP"
    assert pieces[2].text == "o" and pieces[3].text == "", "a space may begin the stop string, so it waits"
    assert [p.text for p in pieces[4:7]] == [" o", "n", "."]


def test_eos_ends_a_row_and_its_text_leaves_it_out(speaking: Transformer) -> None:
    def end(logits: Tensor, run: object) -> Tensor:
        forced = torch.full_like(logits, -9.0)
        forced[..., 256 if run.step == 2 else 65] = 9.0
        return forced

    hooks = TransformerHooks().append_to_path("logits.fwd", end)
    ended = speaking.sample("x", temperature=0, hooks=hooks, max_new_tokens=5)
    assert (ended.ids, ended.text, ended.finish) == ([65, 65, 256], "AA", "eos")
    going = speaking.sample("x", temperature=0, hooks=hooks, max_new_tokens=5, stop_at_eos=False)
    assert len(going.ids) == 5 and going.finish == "length"


# what is refused


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([], {}, "at least one prompt"),
        ([[]], {}, "prompt is empty"),
        ([[1], []], {}, "prompt is empty"),
        (torch.empty(0, dtype=torch.long), {}, "prompt is empty"),
        ("text", {}, "no tokenizer"),
        (torch.tensor([1.0]), {}, "text or a list of whole numbers"),
        (torch.tensor([[1.0]]), {}, "must be whole numbers"),
        ([[1, "a"]], {}, "text or a list of whole numbers"),
        (None, {}, "at least one prompt"),
        ([1] * 25, {}, "25 tokens exceeds the model's context of 24"),
        ([1] * 20, {"max_new_tokens": 5}, "room for 4 new ones"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens"),
        ([1], {"stop_strings": ["a"]}, "tokenizer"),
        ([1], {"stop_strings": [""]}, "at least one character"),
        ([1], {"seed": 1.5}, "seed"),
        ([1, 99], {}, "token id 99 is outside the vocabulary of 31"),
        ([1, 99], {"repetition_penalty": 2.0}, "token id 99 is outside the vocabulary of 31"),
        ([1], {"temperature": -1}, "temperature"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: Transformer, prompts: object, options: dict[str, object], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        sample(model, prompts, **{"max_new_tokens": 2, **options})


def test_a_stream_refuses_before_its_first_token(model: Transformer) -> None:
    with pytest.raises(RequestError, match="exceeds the model's context"):
        stream(model, [1] * 30)  # no token is asked for


def test_a_generation_that_just_fits_the_context_is_made(model: Transformer) -> None:
    assert len(sample(model, [1] * 20, max_new_tokens=4).ids) == 4
    short = Transformer(model.config.model_copy(update={"n_ctx": 5}))
    with pytest.raises(RequestError, match="behind a prefix of 3"):
        sample(short, [1, 2], prefix=prefix_of(short, [[1, 2, 3]]), max_new_tokens=1)


def test_results_are_values() -> None:
    result = Generation([1], [2], None, "length", 0)
    assert result.all_ids == [1, 2] and replace(result, ids=[3]).all_ids == [1, 3]
