"""HookedTransformer: what it computes is what the engine computes, and every name is where it says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.errors import ConfigError, HookError, RequestError
from neuron_lens.faces.hooked_transformer import (
    HookedTransformer,
    HookedTransformerConfig,
    HookedTransformerKeyValueCache,
    HookPoint,
)
from neuron_lens.hooks import AtPositions
from neuron_lens.transformer import Transformer
from neuron_lens.transformer.config import RotaryConfig

ROTARY = {"position": "rotary", "rotary": RotaryConfig(dims=6)}
GROUPED = {
    **ROTARY,
    "norm": "rms",
    "n_kv_heads": 2,
    "mlp": "gated",
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
}


@pytest.fixture
def lens(model: Transformer) -> HookedTransformer:
    return HookedTransformer.from_engine(model)


def zero(x: Tensor, hook: HookPoint) -> Tensor:
    return torch.zeros_like(x)


def test_unhooked_is_the_engine(lens: HookedTransformer, model: Transformer, tokens: Tensor) -> None:
    assert torch.equal(lens(tokens), model(tokens))
    assert [p.data_ptr() for p in lens.parameters()] == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize(
    "changes", [{}, GROUPED, {"mlp": "none"}, {"parallel": True, **ROTARY}, {"norm": "none"}]
)
def test_every_point_fires_with_its_shape_and_changes_nothing(
    changes: dict[str, object], tokens: Tensor
) -> None:
    engine = strong_model(tiny_config(**changes))
    lens = HookedTransformer.from_engine(engine)
    sizes = {
        "batch": 2,
        "pos": 10,
        "key_pos": 10,
        "head": 4,
        "kv_head": engine.config.n_kv_heads,
        "d_head": 6,
        "d_model": 24,
    }
    sizes |= {"d_mlp": 48, "d_vocab": 50, "one": 1}
    with torch.no_grad():
        # ln1 and the per-head inputs exclude each other: one half at a time
        for part in (lambda n: not n.endswith(("_input", "attn_in")), lambda n: n.endswith("_input")):
            names = [name for name in lens.hook_dict if part(name)]
            logits, cache = lens.run_with_cache(tokens, names_filter=names)
            expected = engine(tokens)
            rounding = 3e-6 * float(expected.abs().max())  # without norms, logits go into the hundreds
            assert torch.allclose(logits, expected, atol=max(1e-4, rounding))
            assert set(cache.keys()) == set(names)
            for name in names:
                axes = lens.hook_dict[name].axes or ()
                assert list(cache[name].shape) == [sizes[axis] for axis in axes], name


def test_default_cache_leaves_costly_points_closed(lens: HookedTransformer, tokens: Tensor) -> None:
    # per block 23 points, 6 of them costly; 6 at the ends
    assert len(lens.hook_dict) == 3 * 23 + 6 and len(lens.run_with_cache(tokens)[1]) == 3 * 17 + 6
    lens.set_use_attn_result(True)
    assert "blocks.1.attn.hook_result" in lens.run_with_cache(tokens)[1]
    lens.set_use_split_qkv_input(True)
    with pytest.raises(RequestError, match="exclude"):
        lens.set_use_attn_in(True)


def test_cached_tensors_are_safe_from_later_edits(lens: HookedTransformer, tokens: Tensor) -> None:
    def wipe(x: Tensor, hook: HookPoint) -> None:
        x.zero_()

    with torch.no_grad():
        _, plain = lens.run_with_cache(tokens)
        with lens.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", wipe)]):
            _, cache = lens.run_with_cache(tokens)
    assert torch.equal(cache["resid_post", 0], plain["resid_post", 0])
    assert not cache["resid_pre", 1].any()


def test_in_place_and_gradient_hooks_at_one_point(lens: HookedTransformer, tokens: Tensor) -> None:
    def halve(x: Tensor, hook: HookPoint) -> None:
        x[:, 2:] *= 0.5

    seen = []
    loss = lens.run_with_hooks(
        tokens,
        return_type="loss",
        fwd_hooks=[("blocks.1.hook_resid_pre", halve)],
        bwd_hooks=[("blocks.1.hook_resid_pre", lambda g, hook: seen.append(g))],
        reset_hooks_end=False,
    )
    loss.backward()
    lens.reset_hooks()
    lens.zero_grad()
    assert len(seen) == 1 and seen[0].shape == (2, 10, 24)


def test_gradients_in_the_cache(lens: HookedTransformer, tokens: Tensor) -> None:
    _, cache = lens.run_with_cache(
        tokens, return_type="loss", incl_bwd=True, names_filter="blocks.*.hook_resid_post"
    )
    residual = cache["blocks.1.hook_resid_post"].clone().requires_grad_()
    lens(residual, start_at_layer=2, tokens=tokens, return_type="loss").backward()
    lens.zero_grad()
    assert residual.grad is not None
    assert torch.allclose(residual.grad, cache["blocks.1.hook_resid_post_grad"], atol=1e-7)


def test_starting_and_stopping(lens: HookedTransformer, tokens: Tensor) -> None:
    with torch.no_grad():
        whole = lens(tokens)
        for layer in (0, 1, 2, 3, -1):
            middle = lens(tokens, stop_at_layer=layer)
            assert torch.allclose(lens(middle, start_at_layer=layer), whole, atol=1e-5)
        assert lens(tokens, return_type=None) is None
        both = lens(tokens, return_type="both")
        assert torch.equal(both.logits, whole) and torch.equal(both.loss, lens(tokens, return_type="loss"))
        assert lens(tokens, return_type="loss", loss_per_token=True).shape == (2, 9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(lens: HookedTransformer, tokens: Tensor, side: str) -> None:
    short = tokens[:1, :6]
    filler = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((filler, short) if side == "left" else (short, filler), 1)
    batch = torch.cat((padded, tokens[1:]))
    mask = torch.ones_like(batch)
    real = slice(4, None) if side == "left" else slice(6)
    mask[0] = 0
    mask[0, real] = 1
    with torch.no_grad():
        logits, cache = lens.run_with_cache(batch, attention_mask=mask)
        alone, alone_cache = lens.run_with_cache(short)
        assert torch.allclose(logits[0, real], alone[0], atol=1e-5)
        assert torch.allclose(cache["resid_post", 1][0, real], alone_cache["resid_post", 1][0], atol=1e-5)
        per_token = lens(batch, attention_mask=mask, return_type="loss", loss_per_token=True)
        mean = lens(batch, attention_mask=mask, return_type="loss")
        parts = [
            lens(short, return_type="loss", loss_per_token=True),
            lens(tokens[1:], return_type="loss", loss_per_token=True),
        ]
    assert torch.allclose(per_token.sum(), parts[0].sum() + parts[1].sum(), atol=1e-4)
    assert torch.allclose(mean, (parts[0].sum() + parts[1].sum()) / 14, atol=1e-5)


def test_key_value_cache_with_freeze(lens: HookedTransformer, tokens: Tensor) -> None:
    with torch.no_grad():
        whole = lens(tokens)
        past = HookedTransformerKeyValueCache.init_cache(lens.cfg, batch_size=2)
        lens(tokens[:, :7], past_kv_cache=past)
        past.freeze()
        for _ in range(2):
            assert torch.allclose(lens(tokens[:, 7:], past_kv_cache=past), whole[:, 7:], atol=1e-5)
        assert past.length == 7 and past.past_keys(0).shape == (2, 7, 4, 6)
        lens(tokens[:, 7:], past_kv_cache=past.unfreeze())
        assert past.length == 10


def test_a_plain_module(lens: HookedTransformer, tokens: Tensor) -> None:
    lens.add_perma_hook("blocks.0.attn.hook_z", zero)
    for other in (copy.deepcopy(lens), pickle.loads(pickle.dumps(lens))):
        assert torch.equal(other(tokens), lens(tokens))
        with torch.no_grad():
            other.blocks[1].attn.W_V[0] = 0
            assert not torch.equal(other(tokens), lens(tokens))
        other.load_state_dict(lens.state_dict())
        assert torch.equal(other(tokens), lens(tokens))
    assert not any("hook" in name for name in lens.state_dict())


def test_weights_are_views(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    engine = lens.engine
    with torch.no_grad():
        assert (
            lens.W_E.data_ptr() == engine.embed.weight.data_ptr()
            and lens.W_U.data_ptr() == engine.unembed.weight.data_ptr()
        )
        first = lens.W_Q
        assert lens.W_Q is first, "stacked anew although nothing changed"
        lens.blocks[2].attn.W_Q[1] = 7.0
        assert bool((engine.blocks[2].attn.q.weight[6:12] == 7).all()) and bool((lens.W_Q[2, 1] == 7).all())
        lens.blocks[0].mlp.W_in = torch.zeros(24, 48)
        assert not engine.blocks[0].mlp.up.weight.any()
    lens.W_O.sum().backward()
    assert bool((engine.blocks[1].attn.out.weight.grad == 1).all())


def test_processing_in_place_keeps_hooks_and_probabilities(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config()))
    lens.add_perma_hook("blocks.0.hook_mlp_out", zero)
    with torch.no_grad():
        before = lens(tokens).log_softmax(-1)
        lens.process_weights_()
        assert torch.allclose(lens(tokens).log_softmax(-1), before, atol=1e-4)
    assert lens.cfg.normalization_type == "LNPre" and not lens.b_V.any()


@pytest.mark.parametrize(
    "mode", ["gpt2", "xavier_uniform", "xavier_normal", "kaiming_uniform", "kaiming_normal", "muP"]
)
def test_from_config(mode: str) -> None:
    fields = {
        "n_layers": 1,
        "d_model": 16,
        "n_ctx": 8,
        "d_head": 4,
        "act_fn": "gelu",
        "d_vocab": 20,
        "init_mode": mode,
        "seed": 3,
    }
    lens, again = HookedTransformer(fields), HookedTransformer(HookedTransformerConfig.from_dict(fields))
    tokens = torch.arange(6)[None]
    assert torch.equal(lens(tokens), again(tokens)) and lens(tokens).shape == (1, 6, 20)
    assert lens.W_E.std() > 0 and not lens.b_in.any() and lens.cfg.d_mlp == 64


def test_a_model_of_a_config_learns(tokens: Tensor) -> None:
    fields = {
        "n_layers": 1,
        "d_model": 16,
        "n_ctx": 16,
        "d_head": 4,
        "act_fn": "relu",
        "d_vocab": 50,
        "seed": 0,
    }
    lens = HookedTransformer(fields)
    optimiser = torch.optim.Adam(lens.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        loss = lens(tokens, return_type="loss")
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0] * 0.9


def test_generation(lens: HookedTransformer, tokens: Tensor) -> None:
    greedy = lens.generate(tokens, max_new_tokens=5, do_sample=False)
    slow = lens.generate(tokens, max_new_tokens=5, do_sample=False, use_past_kv_cache=False)
    expected = tokens
    with torch.no_grad():
        for _ in range(5):
            expected = torch.cat((expected, lens(expected)[:, -1].argmax(-1, keepdim=True)), 1)
    assert torch.equal(greedy, expected) and torch.equal(slow, expected)
    torch.manual_seed(5)
    one = lens.generate(tokens, max_new_tokens=5)
    torch.manual_seed(5)
    assert torch.equal(lens.generate(tokens, max_new_tokens=5), one)
    pieces = list(lens.generate_stream(tokens[:1], max_new_tokens=5, do_sample=False, max_tokens_per_yield=2))
    assert torch.equal(torch.cat(pieces, 1), expected[:1]) and len(pieces) == 3
    out = lens.generate(tokens, max_new_tokens=3, do_sample=False, output_logits=True, return_cache=True)
    assert (
        len(out.logits) == 3 and out.logits[0].shape == (2, 50) and out.cache["resid_post", 0].shape[1] == 13
    )


def test_hooks_know_their_positions_while_generating(lens: HookedTransformer, tokens: Tensor) -> None:
    seen = []
    plain = lens.generate(tokens, max_new_tokens=4, do_sample=False)

    def at_position_11(x: Tensor, hook: HookPoint) -> Tensor:
        assert hook.run is not None
        seen.append((hook.run.step, x.shape[1]))
        return torch.where((hook.run.positions() == 11)[..., None], 0.0, x)

    results = []
    for cached in (True, False):
        with lens.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", at_position_11)]):
            results.append(lens.generate(tokens, max_new_tokens=4, do_sample=False, use_past_kv_cache=cached))
    assert torch.equal(*results)

    def fifth(x: Tensor, hook: HookPoint) -> Tensor:
        x[:, 5] = 0
        return x

    # a plain index, and a position in the engine's words: both act once, in the pass that reads the position
    for hook in (fifth, AtPositions(5).append(lambda x: x * 0), AtPositions(-5).append(lambda x: x * 0)):
        with lens.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", hook)]):
            results = [
                lens.generate(tokens, max_new_tokens=4, do_sample=False, use_past_kv_cache=cached)
                for cached in (True, False)
            ]
        assert torch.equal(*results) and not torch.equal(results[0], plain)

    def beyond(x: Tensor, hook: HookPoint) -> Tensor:
        return x[:, 0 if x.shape[1] > 1 else 30, None].expand_as(x)

    with (
        lens.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", beyond)]),
        pytest.raises(HookError, match="only the newest position"),
    ):
        lens.generate(tokens, max_new_tokens=3)


def test_refusals(lens: HookedTransformer, tokens: Tensor) -> None:
    def cut(x: Tensor, hook: HookPoint) -> Tensor:
        return x[:, :3]

    with pytest.raises(HookError, match=r"blocks\.0\.hook_mlp_out: hook .*cut returned.*\[2, 3, 24\]"):
        lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_mlp_out", cut)])
    with pytest.raises(HookError, match="this model has none: positions are 'learned'"):
        lens.add_hook("blocks.0.attn.hook_rot_q", zero)
    with pytest.raises(HookError, match="never ran"):
        lens.run_with_cache(tokens, names_filter="blocks.2.hook_resid_pre", stop_at_layer=1)
    for bad, says in (
        (tokens.float(), "start_at_layer"),
        (tokens[:, :0], "empty"),
        (3.5, "float"),
        ("text", "no tokenizer"),
    ):
        with pytest.raises(RequestError, match=says):
            lens(bad)
    with pytest.raises(RequestError, match="return_type"):
        lens(tokens, return_type="logit")
    with pytest.raises(RequestError, match="stop_at_layer"):
        lens(tokens, stop_at_layer=9)
    with pytest.raises(ConfigError, match=r"did you mean 'n_layers'"):
        HookedTransformer({"n_layer": 1, "d_model": 8, "n_ctx": 8})
    with pytest.raises(ConfigError, match="attention_dir"):
        HookedTransformer(
            {
                "n_layers": 1,
                "d_model": 8,
                "n_ctx": 8,
                "d_head": 4,
                "d_vocab": 9,
                "attn_only": True,
                "attention_dir": "both",
            }
        )


def test_a_classifier_has_logits_of_its_own(tokens: Tensor) -> None:
    fields = {
        "n_layers": 2,
        "d_model": 16,
        "n_ctx": 12,
        "d_head": 4,
        "d_vocab": 50,
        "d_vocab_out": 3,
        "seed": 0,
    }
    lens = HookedTransformer({**fields, "act_fn": "solu"})
    logits, cache = lens.run_with_cache(tokens)
    assert logits.shape == (2, 10, 3) and lens.W_U.shape == (16, 3) and lens.b_U.shape == (3,)
    assert lens.cfg.d_vocab_out == 3 and cache["unembed.hook_out"].shape == (2, 10, 3)
    pre, post = cache["pre", 1], cache["post", 1]
    assert torch.allclose(post, pre * pre.softmax(-1), atol=1e-6), "SoLU"
    again = HookedTransformer({**fields, "act_fn": "solu", "init_weights": False})
    again.load_state_dict(lens.state_dict())
    assert torch.allclose(again(tokens), logits, atol=1e-6)
    with pytest.raises(RequestError, match="has no logit among 3"):
        lens(tokens, return_type="loss")
    with pytest.raises(RequestError, match="3 logits"):
        lens.generate(tokens, max_new_tokens=1)
    for act_fn in ("solu_ln", "gelu_ln", "xielu"):
        with pytest.raises(ConfigError, match=act_fn):
            HookedTransformer({**fields, "act_fn": act_fn})


def test_steps_on_state_dicts_are_those_on_the_model(tokens: Tensor) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config(tied=False)))
    raw = {name: tensor.clone() for name, tensor in lens.state_dict().items()}
    state = lens.fold_value_biases(
        lens.center_unembed(lens.center_writing_weights(lens.fold_layer_norm(dict(raw))))
    )
    assert all(torch.equal(lens.state_dict()[name], raw[name]) for name in raw), (
        "the model itself was changed"
    )
    other = HookedTransformer.from_engine(strong_model(tiny_config(tied=False)))
    other.process_weights_()
    for name, tensor in other.state_dict().items():
        assert torch.allclose(state[name], tensor, atol=1e-5), name
    even = lens.refactor_factored_attn_matrices(state)
    other.load_state_dict(even)
    assert torch.allclose(lens(tokens).log_softmax(-1), other(tokens).log_softmax(-1), atol=1e-3)
    assert not torch.allclose(even["blocks.0.attn.W_Q"], state["blocks.0.attn.W_Q"], atol=1e-3)


def test_a_forward_in_two_halves(lens: HookedTransformer, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    stream, ids, _, kept = lens.input_to_embed(tokens, attention_mask=mask)
    assert kept is not None and torch.equal(kept, mask) and torch.equal(ids, tokens)
    whole = lens(tokens, return_type="loss", attention_mask=mask)
    halves = lens(stream, start_at_layer=0, tokens=ids, attention_mask=kept, return_type="loss")
    assert torch.allclose(whole, halves, atol=1e-6)
