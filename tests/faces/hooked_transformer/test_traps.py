"""What goes wrong without a word elsewhere, and does not here."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import strong_model, tiny_config
from faces.hooked_transformer.tiny_families import FAMILIES
from torch import Tensor

from neuron_lens.errors import HookError
from neuron_lens.faces.hooked_transformer import HookedTransformer, HookPoint


@pytest.fixture
def lens() -> HookedTransformer:
    return HookedTransformer.from_engine(strong_model(tiny_config()))


def test_a_tokenizer_in_memory_is_used_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<bos>": 0, "<unk>": 1, "a": 2, "b": 3}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", unk_token="<unk>"
    )
    before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer))
    lens = HookedTransformer.from_engine(strong_model(tiny_config()), tokenizer=tokenizer)
    assert lens.tokenizer is tokenizer and lens.to_tokens("a b").tolist() == [[0, 2, 3]]
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == before


def test_copies_after_a_pass_with_gradients(lens: HookedTransformer, tokens: Tensor) -> None:
    loss = lens(tokens, return_type="loss")
    loss.backward()
    for clone in (copy.deepcopy(lens), pickle.loads(pickle.dumps(lens))):
        assert torch.allclose(clone(tokens, return_type="loss"), loss, atol=1e-6)


def test_a_functional_call_runs_with_the_parameters_given(lens: HookedTransformer, tokens: Tensor) -> None:
    silent = {name: torch.zeros_like(p) for name, p in lens.named_parameters() if "mlp" in name}
    called = torch.func.functional_call(lens, silent, (tokens,))
    zero = [("blocks.*.hook_mlp_out", lambda x, hook: 0 * x)]
    assert torch.allclose(called, lens.run_with_hooks(tokens, fwd_hooks=zero), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_counted_alike_everywhere(family: str) -> None:
    lens = HookedTransformer.from_engine(strong_model(tiny_config(**FAMILIES[family])))
    heads = len(lens.all_head_labels())
    assert lens.W_Q.shape[:2].numel() == lens.W_K.shape[:2].numel() == lens.W_V.shape[:2].numel() == heads
    for mode in ("Q", "K", "V"):
        assert lens.all_composition_scores(mode).flatten(0, 1).flatten(1).shape == (heads, heads)  # type: ignore[arg-type]


def test_a_hook_opens_a_costly_point(lens: HookedTransformer, tokens: Tensor) -> None:
    seen = []
    names = ["blocks.1.attn.hook_result", "blocks.1.hook_q_input", "blocks.1.hook_mlp_in"]
    hooks = [(name, lambda x, hook: seen.append((hook.name, x.shape[-1]))) for name in names]
    lens.run_with_hooks(tokens, fwd_hooks=hooks)
    assert sorted(seen) == sorted((name, 24) for name in names)


def test_generation_runs_the_embedding_hook(lens: HookedTransformer, tokens: Tensor) -> None:
    def other(x: Tensor, hook: HookPoint) -> Tensor:
        return -3 * x

    plain = lens.generate(tokens, max_new_tokens=5, do_sample=False)
    with lens.hooks(fwd_hooks=[("hook_embed", other)]):
        edited = [
            lens.generate(tokens, max_new_tokens=5, do_sample=False, use_past_kv_cache=kept)
            for kept in (True, False)
        ]
    assert torch.equal(*edited) and not torch.equal(edited[0], plain)


def test_hooks_on_gradients_act_in_a_later_backward_pass(lens: HookedTransformer, tokens: Tensor) -> None:
    seen: list[str] = []
    loss = lens.run_with_hooks(
        tokens,
        return_type="loss",
        bwd_hooks=[("blocks.1.hook_resid_pre", lambda gradient, hook: seen.append(hook.name))],
    )
    assert not seen and not lens.list_hooks()
    loss.backward()
    assert seen == ["blocks.1.hook_resid_pre"]


def test_a_hook_of_a_wrong_shape_is_named(lens: HookedTransformer, tokens: Tensor) -> None:
    def too_short(x: Tensor, hook: HookPoint) -> Tensor:
        return x[:, 1:]

    with pytest.raises(HookError, match=r"blocks\.2\.hook_resid_mid.*too_short.*\[2, 9, 24\].*\[2, 10, 24\]"):
        lens.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_mid", too_short)])


@pytest.mark.parametrize(
    "names", ["blocks.1.hook_resid_mist", ["hook_embed", "blocks.9.hook_z"], lambda name: False]
)
def test_a_filter_that_names_nothing_is_refused(
    lens: HookedTransformer, tokens: Tensor, names: object
) -> None:
    with pytest.raises(HookError):
        lens.run_with_cache(tokens, names_filter=names)


def test_hooks_of_others_stay_and_errors_leave_none(lens: HookedTransformer, tokens: Tensor) -> None:
    def fails(x: Tensor, hook: HookPoint) -> Tensor:
        raise KeyError(hook.name)

    lens.add_hook("hook_embed", lambda x, hook: None)
    with pytest.raises(KeyError):
        lens.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", fails)])
    assert list(lens.list_hooks()) == ["hook_embed"] and lens.context_level == 0
    lens.run_with_cache(tokens)
    assert list(lens.list_hooks()) == ["hook_embed"]


def test_rows_that_all_begin_alike_are_not_padded() -> None:
    """A tokenizer without a pad token pads with EOS: rows that really begin with it must not lose their first token."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<bos>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>"
    )
    lens = HookedTransformer.from_engine(strong_model(tiny_config()), tokenizer=tokenizer)
    assert lens._pad_id() == 1
    row = torch.tensor([[1, 2, 7, 9]])
    with torch.no_grad():
        alone, batch = lens(row), lens(row.expand(3, -1))
        assert torch.allclose(alone.expand(3, -1, -1), batch, atol=1e-5)
        # where a longer row shows that the others are padded, they are
        padded = lens(torch.tensor([[1, 1, 2, 7], [5, 6, 2, 7]]))
    assert torch.allclose(padded[0, 2:], lens(torch.tensor([[2, 7]]))[0], atol=1e-5)
