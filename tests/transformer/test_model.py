"""The laws of the model: fast equals explicit, cached equals uncached, a batch row equals the row alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import strong_model, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import ConfigError, RequestError
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import ExpertsConfig, KVCache, RotaryConfig, Transformer, TransformerConfig

EXPERTS = ExpertsConfig(n_experts=4, n_used=2)
# one row for each independent choice that changes the arithmetic
CHOICES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "rotary": {"position": "rotary", "rotary": RotaryConfig(dims=6)},
    "rotary partial interleaved": {
        "position": "rotary",
        "rotary": RotaryConfig(dims=4, pairing="interleaved"),
    },
    "alibi": {"position": "alibi", "embedding_norm": True},
    "no positions": {"position": "none"},
    "rms, grouped, gated": {
        "norm": "rms",
        "n_kv_heads": 2,
        "mlp": "gated",
        "activation": "silu",
        "qkv_bias": False,
    },
    "offset sandwich softcap": {
        "norm": "rms",
        "norm_offset": True,
        "norm_place": "sandwich",
        "attention_softcap": 5.0,
        "logit_softcap": 3.0,
        "embedding_scale": 4.9,
    },
    "post norm, full qk norm": {"norm": "rms", "norm_place": "post", "qk_norm": "full"},
    "head qk norm, windows": {"norm": "rms", "qk_norm": "head", "windows": (None, 3, 4), "n_kv_heads": 1},
    "parallel shared": {"parallel": True, "shared_norm": True},
    "parallel own": {"parallel": True, "tied": False, "unembed_bias": True},
    "experts": {"mlp": "experts", "experts": EXPERTS, "activation": "silu"},
    "sinks": {"attention_sinks": True, "n_kv_heads": 2, "windows": (3, None, 3)},
    "attention only, no norm": {"mlp": "none", "norm": "none"},
    "scales": {
        "residual_scale": 0.5,
        "logit_scale": 2.0,
        "attention_scale": 0.3,
        "inverse_layer_scale": True,
    },
    "clip, no out bias": {"clip_qkv": 0.7, "out_bias": False, "mlp_bias": False},
}


@pytest.fixture(params=list(CHOICES), scope="module")
def choice(request: pytest.FixtureRequest) -> Transformer:
    return strong_model(tiny_config(**CHOICES[request.param]))


@pytest.fixture(autouse=True)
def _no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    scale = float(b.std())
    assert float((a - b).abs().max()) < 2e-5 * max(scale, 1.0)


def test_the_explicit_path_equals_the_fast_path(choice: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks()
    absent = choice.config.absent_sites()
    for site in hooks.sites():
        if site.path not in absent and not site.path.endswith(("q_in", "k_in", "v_in", "attn_in")):
            site.append_fwd(lambda x: None)
    close(choice(tokens, hooks=hooks), choice(tokens))


def test_inputs_for_each_head_equal_the_shared_input(choice: Transformer, tokens: torch.Tensor) -> None:
    hooks = TransformerHooks().append_to_path("attn.[qkv]_in.fwd", lambda x: None)
    close(choice(tokens, hooks=hooks), choice(tokens))


def test_reading_in_pieces_with_a_cache_equals_reading_at_once(
    choice: Transformer, tokens: torch.Tensor
) -> None:
    cache = KVCache(choice.config, 2, capacity=12)
    pieces = [
        choice(tokens[:, part], kv_cache=cache)
        for part in (slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 10))
    ]
    close(torch.cat(pieces, 1), choice(tokens))
    assert cache.length == 10


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone_also_with_a_cache(
    choice: Transformer, tokens: torch.Tensor, side: str
) -> None:
    lengths, width = [7, 4], 9
    batch, pad = torch.zeros(2, width, dtype=torch.long), torch.ones(2, width, dtype=torch.bool)
    for i, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        batch[i, at], pad[i, at] = tokens[i, :n], False
    cache = KVCache(choice.config, 2, capacity=12)
    together = choice(batch, pad=pad, kv_cache=cache)
    following = choice(tokens[:, :2], kv_cache=cache)
    for i, n in enumerate(lengths):
        close(together[i][~pad[i]], choice(tokens[i : i + 1, :n])[0])
        alone = choice(torch.cat((tokens[i, :n], tokens[i, :2]))[None])[0, n:]
        close(following[i], alone)


def test_stopping_and_starting_again_equals_one_pass(choice: Transformer, tokens: torch.Tensor) -> None:
    for layer in range(4):
        stream = choice(tokens, stop_at_layer=layer)
        assert stream.shape == (2, 10, 24)
        if layer:
            close(choice(stream, start_at_layer=layer), choice(tokens))
    assert torch.equal(choice(tokens, stop_at_layer=-1), choice(tokens, stop_at_layer=2))


READ = {
    "last": -1,
    "slice": slice(2, 5),
    "one a row": torch.tensor([3, 8]),
    "several a row": torch.tensor([[9, 0], [4, 4]]),
    "all but one": slice(1, None),
}


def read_from(logits: torch.Tensor, at: object) -> torch.Tensor:
    """Logits of all columns at those of one entry of READ."""
    columns = at if isinstance(at, torch.Tensor) else torch.arange(10)[at].reshape(1, -1).expand(2, -1)
    return logits.gather(1, columns.reshape(2, -1, 1).expand(-1, -1, logits.shape[-1]))


@pytest.mark.parametrize("at", READ.values(), ids=READ)
def test_logits_at_some_columns_are_those_columns(
    choice: Transformer, tokens: torch.Tensor, at: object
) -> None:
    assert choice(tokens, logits_at=at).shape[1] < 10  # type: ignore[arg-type]
    close(choice(tokens, logits_at=at), read_from(choice(tokens), at))
    # hooks behind the keys of the last block see every column; hooks before them do, too, and the rest is left out
    for path in ("attn.v_out", "resid.torso.post_mlp", "attn.k", "resid.torso.pre_attn"):
        seen: list[int] = []
        hooks = TransformerHooks().append_to_path(f"{path}.fwd", lambda x, seen=seen: seen.append(x.shape[1]))
        close(choice(tokens, hooks=hooks, logits_at=at), read_from(choice(tokens), at))
        assert seen == [10, 10, 10]


def test_logits_of_some_vocabulary_entries_are_those_entries(
    choice: Transformer, tokens: torch.Tensor
) -> None:
    entries = torch.tensor([7, 0, 49, 7])
    whole = choice(tokens)
    close(choice(tokens, logits_of=entries), whole[..., entries])
    close(choice(tokens, logits_at=-1, logits_of=entries), whole[:, -1:, entries])
    seen: list[int] = []
    hooks = TransformerHooks().append_to_path("logits.fwd", lambda x: seen.append(x.shape[-1]) or x * 2)
    close(choice(tokens, hooks=hooks, logits_of=entries), 2 * whole[..., entries])
    assert seen == [50]
    with pytest.raises(RequestError, match="logits_of 50 is outside the vocabulary"):
        choice(tokens, logits_of=torch.tensor([50]))


def test_logits_at_some_columns_leave_a_whole_cache(choice: Transformer, tokens: torch.Tensor) -> None:
    cache = KVCache(choice.config, 2, capacity=12)
    whole = choice(tokens)
    close(choice(tokens[:, :6], kv_cache=cache, logits_at=2), whole[:, 2:3])
    close(
        choice(tokens[:, 6:], kv_cache=cache, logits_at=torch.tensor([3, 0])), whole[[0, 1], [9, 6]][:, None]
    )
    assert cache.length == 10


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_at_some_columns_of_padded_rows(choice: Transformer, tokens: torch.Tensor, side: str) -> None:
    pad = torch.zeros(2, 10, dtype=torch.bool)
    pad[0, slice(0, 3) if side == "left" else slice(7, 10)] = True
    whole = choice(tokens, pad=pad)
    cache = KVCache(choice.config, 2, capacity=12)
    for at in (torch.tensor([6, 2]), torch.tensor([[3, 6, 9], [0, 1, 9]]), -1):
        found, expected = choice(tokens, pad=pad, logits_at=at), read_from(whole, at)
        assert not found.isnan().any()
        real = ~read_from(pad[:, :, None], at)[..., 0]
        close(found[real], expected[real])
    choice(tokens, pad=pad, kv_cache=cache, logits_at=-1)
    following, other = choice(tokens[:, :2], kv_cache=cache), KVCache(choice.config, 2, capacity=12)
    choice(tokens, pad=pad, kv_cache=other)
    close(following, choice(tokens[:, :2], kv_cache=other))


def test_gradients_through_logits_at_some_columns(choice: Transformer, tokens: torch.Tensor) -> None:
    weights = list(choice.parameters())
    with torch.enable_grad():
        some = choice(tokens, logits_at=torch.tensor([3, 8])).square().mean()
        alone = choice(tokens)[[0, 1], [3, 8]][:, None].square().mean()
        for a, b in zip(*(torch.autograd.grad(loss, weights) for loss in (some, alone)), strict=True):
            assert float((a - b).abs().max()) <= 1e-4 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("at", [10, -11, torch.tensor([1, 10]), torch.tensor([-1, 2])])
def test_logits_of_columns_that_are_not_there_are_refused(
    model: Transformer, tokens: torch.Tensor, at: object
) -> None:
    with pytest.raises(RequestError, match="does not have"):
        model(tokens, logits_at=at)  # type: ignore[arg-type]


def test_bfloat16_stays_near_float32(choice: Transformer, tokens: torch.Tensor) -> None:
    half = copy.deepcopy(choice).bfloat16()
    assert half(tokens).dtype == torch.bfloat16
    assert (
        torch.corrcoef(torch.stack((half(tokens).float().flatten(), choice(tokens).flatten())))[0, 1] > 0.97
    )


def test_copies_and_pickles_run_equally_and_stay_tied(choice: Transformer, tokens: torch.Tensor) -> None:
    for other in (copy.deepcopy(choice), pickle.loads(pickle.dumps(choice))):
        assert torch.equal(other(tokens), choice(tokens))
        assert (other.unembed.weight is other.embed.weight) == choice.config.tied


def test_a_frozen_cache_serves_many_continuations(model: Transformer, tokens: torch.Tensor) -> None:
    cache = KVCache(model.config, 2, capacity=8)
    model(tokens[:, :6], kv_cache=cache)
    cache.freeze()
    first, again = (model(tokens[:, 6:], kv_cache=cache) for _ in range(2))
    assert torch.equal(first, again) and cache.length == 6
    close(first, model(tokens)[:, 6:])
    many = cache.repeat(3)
    close(model(tokens[:, 6:8].repeat_interleave(3, 0), kv_cache=many), first[:, :2].repeat_interleave(3, 0))


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_a_later_token_never_changes_an_earlier_position(position: int, seed: int) -> None:
    model = _SHARED
    ids = torch.randint(0, 50, (1, 14), generator=torch.Generator().manual_seed(seed))
    changed = ids.clone()
    changed[0, position] = (changed[0, position] + 1) % 50
    assert torch.equal(model(ids)[:, :position], model(changed)[:, :position])
    assert not torch.equal(model(ids)[:, position:], model(changed)[:, position:])


_SHARED = strong_model(tiny_config())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m(t.float()), "whole numbers"),
        (lambda m, t: m(t[0]), r"\[batch, pos\]"),
        (lambda m, t: m(t[:, :0]), "empty"),
        (lambda m, t: m(t + 50), "outside the vocabulary of 50"),
        (lambda m, t: m(t - 60), "outside the vocabulary"),
        (lambda m, t: m(t.repeat(1, 4)), "exceed the model's context of 32"),
        (lambda m, t: m(t, pad=torch.ones(2, 10, dtype=torch.bool)), "nothing but padding"),
        (lambda m, t: m(t, pad=torch.zeros(2, 9, dtype=torch.bool)), "pad must be bool"),
        (
            lambda m, t: m(
                t, pad=torch.tensor([0, 1, 0, 0, 0, 0, 0, 0, 0, 0], dtype=torch.bool).expand(2, -1)
            ),
            "ends of a row",
        ),
        (lambda m, t: m(t, stop_at_layer=4), "3 layers"),
        (lambda m, t: m(t, start_at_layer=1), "residual stream"),
        (lambda m, t: m(t, kv_cache=KVCache(m.config, 2, capacity=5)), "room for 5"),
        (lambda m, t: m(t, kv_cache=KVCache(m.config, 3)), "holds 3 rows"),
    ],
)
def test_bad_input_is_one_clear_error(call, message: str, model: Transformer, tokens: torch.Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RequestError, match=message):
        call(model, tokens)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_heads": 3}, "must divide"),
        ({"position": "rotary"}, "contradict"),
        ({"position": "rotary", "rotary": RotaryConfig(dims=8)}, "at most d_head"),
        ({"mlp": "experts"}, "contradict"),
        ({"windows": (1,)}, "1 entries for 3 layers"),
        ({"shared_norm": True}, "needs parallel"),
        ({"d_vocab": 0}, "d_vocab"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_configs_are_frozen_and_round_trip_through_json() -> None:
    config = tiny_config(**CHOICES["experts"])
    assert TransformerConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.n_layers = 4
