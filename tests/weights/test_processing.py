"""Processing the weights leaves the function as it is, and the given model untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import strong_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.transformer import Transformer, TransformerConfig
from neuron_lens.transformer.config import ExpertsConfig, RotaryConfig
from neuron_lens.weights import (
    Processing,
    center_unembed,
    center_writing_weights,
    fold_layer_norm,
    fold_scales,
    fold_value_biases,
    process,
    refactor_factored_attn_matrices,
)

ROTARY = {"position": "rotary", "rotary": RotaryConfig(dims=6)}
FAMILIES: dict[str, dict[str, object]] = {
    "gpt2": {},
    "attention_only": {"mlp": "none"},
    "parallel": {"parallel": True, **ROTARY, "tied": False},
    "shared_norm": {"parallel": True, "shared_norm": True, **ROTARY, "unembed_bias": True},
    "no_biases": {"qkv_bias": False, "mlp_bias": False, "out_bias": False, "activation": "relu"},
    "alibi": {"position": "alibi", "embedding_norm": True},
    "llama": {"norm": "rms", **ROTARY, "n_kv_heads": 2, "mlp": "gated", "mlp_bias": False, "qkv_bias": False, "out_bias": False},
    "gemma": {
        "norm": "rms", "norm_place": "sandwich", "norm_offset": True, **ROTARY, "n_kv_heads": 2, "mlp": "gated",
        "embedding_scale": 24**0.5, "logit_softcap": 5.0, "attention_softcap": 4.0, "qk_norm": "head",
    },
    "olmo2": {"norm": "rms", "norm_place": "post", **ROTARY, "qk_norm": "full", "mlp": "gated"},
    "granite": {"norm": "rms", **ROTARY, "residual_scale": 0.3, "logit_scale": 0.5, "embedding_scale": 3.0, "mlp": "gated"},
    "experts": {"norm": "rms", **ROTARY, "mlp": "experts", "experts": ExpertsConfig(n_experts=4, n_used=2), "tied": False},
}  # fmt: skip


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens)


def close(given: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max()) + 1e-9
    assert float((given - expected).abs().max()) < 3e-5 * scale


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fold", [fold_layer_norm, fold_scales])
def test_folding_keeps_the_logits(
    family: str, fold: Callable[[Transformer], Transformer], tokens: Tensor
) -> None:
    model = strong_model(tiny_config(**FAMILIES[family]))
    close(logits(fold(model), tokens), logits(model, tokens))


@pytest.mark.parametrize("family", FAMILIES)
def test_processing_keeps_the_probabilities_and_the_model(family: str, tokens: Tensor) -> None:
    model = strong_model(tiny_config(**FAMILIES[family]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steps = Processing(True, True, True, True, True, True)
    done = process(model, steps)
    close(logits(done, tokens).log_softmax(-1), logits(model, tokens).log_softmax(-1))
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    owned = {p.data_ptr() for p in model.parameters()}
    assert not owned & {p.data_ptr() for p in done.parameters()}, (
        "the new model shares tensors with the given one"
    )


def test_folded_norms_have_no_weight(tokens: Tensor) -> None:
    folded = fold_layer_norm(strong_model(tiny_config()))
    assert folded.ln_f is not None and folded.ln_f.weight is not None and folded.ln_f.bias is not None
    assert bool((folded.ln_f.weight == 1).all()) and bool((folded.ln_f.bias == 0).all())
    # what a layer norm's reader reads has no mean: neither has the reader
    assert float(folded.blocks[1].attn.q.weight.detach().mean(-1).abs().max()) < 1e-6
    assert not folded.config.tied


def test_what_is_written_has_no_mean(tokens: Tensor) -> None:
    from neuron_lens.hooks import TransformerHooks

    model = strong_model(tiny_config())
    hooks = TransformerHooks()
    stream = hooks.record(["resid.post_emb", "resid.torso.post_mlp"])
    centred = center_writing_weights(model)
    with torch.no_grad():
        close(centred(tokens, hooks=hooks), model(tokens))
    assert all(float(stream[key].mean(-1).abs().max()) < 1e-5 for key in stream)


def test_unembedding_shifts_by_a_constant(tokens: Tensor) -> None:
    model = strong_model(tiny_config(unembed_bias=True))
    centred, before = logits(center_unembed(model), tokens), logits(model, tokens)
    assert float(centred.mean(-1).abs().max()) < 1e-5
    shift = before - centred
    assert float((shift - shift[..., :1]).abs().max()) < 1e-4


def test_value_biases_are_gone(tokens: Tensor) -> None:
    for family in ("gpt2", "gemma"):
        model = strong_model(tiny_config(**FAMILIES[family]))
        folded = fold_value_biases(model)
        assert all(bool((block.attn.v.bias == 0).all()) for block in folded.blocks)
        close(logits(folded, tokens), logits(model, tokens))


@pytest.mark.parametrize("family", ["gpt2", "alibi", "no_biases"])
def test_refactored_attention_is_in_canonical_form(family: str, tokens: Tensor) -> None:
    model = strong_model(tiny_config(**FAMILIES[family]))
    done = refactor_factored_attn_matrices(model)
    close(logits(done, tokens), logits(model, tokens))
    out = done.blocks[0].attn.out.weight.unflatten(1, (4, 6)).permute(1, 2, 0)
    assert torch.allclose(out @ out.mT, torch.eye(6).expand(4, 6, 6), atol=1e-5), "W_O is no rotation"


@given(
    st.integers(1, 2),
    st.sampled_from(["pre", "sandwich"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["layer", "rms"]),
)
@settings(max_examples=25)
def test_norms_fold_in_every_arrangement(layers: int, place: str, bias: bool, gated: bool, norm: str) -> None:
    config: TransformerConfig = tiny_config(
        n_layers=layers,
        norm_place=place,
        norm=norm,
        norm_bias=bias,
        qkv_bias=not bias,
        mlp="gated" if gated else "plain",
        mlp_bias=gated,
    )
    model = strong_model(config, seed=layers)
    tokens = torch.arange(8)[None]
    close(logits(fold_layer_norm(model), tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("fold", "family", "says"),
    [
        (center_writing_weights, "llama", "only layer norms"),
        (center_unembed, "gemma", "soft cap"),
        (refactor_factored_attn_matrices, "parallel", "rotary"),
    ],
)
def test_what_would_change_the_function_is_refused(
    fold: Callable[[Transformer], Transformer], family: str, says: str
) -> None:
    with pytest.raises(RequestError, match=says):
        fold(strong_model(tiny_config(**FAMILIES[family])))
