"""Pieces of a forward, single helpers, a configuration that is built in, and names that are not offered."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from conftest import strong_model, tiny_config
from torch import Tensor

from neuron_lens.errors import ConfigError, RequestError
from neuron_lens.faces.hooked_transformer import (
    ActivationCache,
    HookedTransformer,
    HookedTransformerConfig,
    HookedTransformerKeyValueCache,
    HookPoint,
    utils,
)


@pytest.fixture(params=["learned", "rotary"])
def lens(request: pytest.FixtureRequest) -> HookedTransformer:
    rotary = {"position": "rotary", "rotary": {"dims": 6}} if request.param == "rotary" else {}
    return HookedTransformer.from_engine(strong_model(tiny_config(**rotary)))


@pytest.fixture
def mask(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    return mask


def test_the_stream_of_embeddings_is_the_stream_of_the_model(
    lens: HookedTransformer, tokens: Tensor, mask: Tensor
) -> None:
    expected = lens(tokens, attention_mask=mask, stop_at_layer=0)
    stream, none = lens.get_residual(lens.embed(tokens), 0, attention_mask=mask)
    assert none is None and torch.allclose(stream[mask.bool()], expected[mask.bool()], atol=1e-6)
    later = lens.get_residual(lens.embed(tokens[:, 4:]), 4, return_shortformer_pos_embed=False)
    assert torch.allclose(later, lens(tokens, stop_at_layer=0)[:, 4:], atol=1e-6)
    if lens.engine.config.position == "learned":
        with pytest.raises(RequestError, match="context"):
            lens.get_residual(lens.embed(tokens), lens.cfg.n_ctx)


def test_positions_go_on_behind_a_cache(lens: HookedTransformer, tokens: Tensor, mask: Tensor) -> None:
    past = HookedTransformerKeyValueCache.init_cache(lens.cfg, "cpu", 2)
    assert lens.get_pos_offset(None, 2) == lens.get_pos_offset(past, 2) == 0
    lens(tokens, past_kv_cache=past)
    assert lens.get_pos_offset(past, 2) == tokens.shape[1]
    with pytest.raises(RequestError, match="of 2 rows, the input of 3"):
        lens.get_pos_offset(past, 3)


def test_a_mask_announced_to_the_cache_is_the_mask_of_the_next_forward(
    lens: HookedTransformer, tokens: Tensor, mask: Tensor
) -> None:
    told, given = (HookedTransformerKeyValueCache.init_cache(lens.cfg, "cpu", 2) for _ in range(2))
    assert torch.equal(told.append_attention_mask(mask), mask)
    first = lens(tokens, past_kv_cache=told)
    assert torch.equal(first, lens(tokens, attention_mask=mask, past_kv_cache=given))
    assert not torch.allclose(first[0, -1], lens(tokens)[0, -1])
    step = torch.ones(2, 1, dtype=torch.long)
    whole = told.freeze().append_attention_mask(step)
    assert torch.equal(whole, torch.cat((mask, step), -1)) and told.take_announced() is None
    with pytest.raises(RequestError, match=r"\[2, pos\]"):
        told.append_attention_mask(step[:1])


def test_a_state_with_gaps_is_filled_from_the_model(lens: HookedTransformer) -> None:
    state = lens.state_dict()
    gaps = {name: t for name, t in state.items() if not name.endswith((".w", ".b", "b_O"))}
    filled = lens.fill_missing_keys({**gaps, "unembed.W_U": gaps["unembed.W_U"] * 2})
    assert filled.keys() == state.keys() and torch.equal(filled["unembed.W_U"], state["unembed.W_U"] * 2)
    assert all(torch.equal(filled[name], state[name]) for name in state if name not in gaps)
    with pytest.raises(RequestError, match=r"1 weight matrices .* blocks\.1\.attn\.W_O"):
        lens.fill_missing_keys({n: t for n, t in state.items() if n != "blocks.1.attn.W_O"})


def test_a_text_drawn_from_a_data_set_of_ones_own(lens: HookedTransformer) -> None:
    with pytest.raises(RequestError, match=r"utils\.get_dataset"):
        lens.sample_datapoint()
    lens.dataset = [{"text": "one"}, {"text": "two"}]
    assert {lens.sample_datapoint() for _ in range(20)} == {"one", "two"}


def small_config(**fields: Any) -> HookedTransformerConfig:
    return HookedTransformerConfig(
        n_layers=2, d_model=8, n_ctx=16, d_head=4, d_vocab=20, act_fn="gelu", **fields
    )


def test_what_is_built_in_cannot_be_assigned() -> None:
    cfg = small_config()
    model = HookedTransformer(cfg)
    for settled in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConfigError, match=r"cfg\.act_fn is 'gelu' in the model .* dataclasses\.replace"):
            settled.cfg.act_fn = "relu"
        with pytest.raises(ConfigError, match=r"model\.to\(dtype\)"):
            settled.cfg.dtype = torch.float16
        settled.cfg.act_fn = "gelu"
        settled.cfg.use_attn_result = True
    assert model.to(torch.float64).cfg.dtype == torch.float64
    cfg.act_fn, cfg.n_layers = "relu", 1  # the one handed in stays the caller's
    assert model.cfg.n_layers == 2 and HookedTransformer(cfg).cfg.n_layers == 1
    for free in (copy.copy(model.cfg), copy.deepcopy(model.cfg), dataclasses.replace(model.cfg)):
        free.n_layers = 3
        assert len(HookedTransformer(free).blocks) == 3


def test_processing_says_so_in_the_configuration() -> None:
    model = HookedTransformer(small_config())
    model.process_weights_()
    assert model.cfg.normalization_type == "LNPre"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("load_sample_training_dataset", r"utils\.get_dataset"),
        ("tl_parameters", r"model\.W_Q"),
        ("boot_native", "from_pretrained"),
    ],
)
def test_names_that_are_not_offered_say_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"{name}.*{instead}"):
        getattr(HookedTransformer(small_config()), name)


def test_parts_say_it_too() -> None:
    model = HookedTransformer(small_config())
    with pytest.raises(AttributeError, match="d_head"):
        HookPoint().enable_reshape(None)
    with pytest.raises(AttributeError, match="recurrent"):
        _ = ActivationCache({}, model).ssm_layers
    assert not hasattr(ActivationCache({}, model), "anything") and not hasattr(utils, "anything")
    with pytest.raises(AttributeError, match="hf_hub_download"):
        _ = utils.download_file_from_hf
