"""What extraction says has closed-form answers: parts sum to wholes, a batch row is the row alone, nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faces.hooked_model.cases import EVERY_FIELD, ROWS, all_inputs, both_families, face, inputs, near

from neuron_lens.errors import NeuronLensError, RequestError
from neuron_lens.faces.hooked_model import ExtractionConfig, Intervention
from neuron_lens.faces.hooked_model.fields import FIELDS

EVERYTHING = ExtractionConfig(**dict.fromkeys(EVERY_FIELD, True))
POSITIONS = ["last", "first", (1, 3)]


@both_families
@all_inputs
def test_parts_sum_to_the_stream_and_the_stream_gives_the_logits(family: str, case: str) -> None:
    model = face(family)
    cache = model.forward(inputs(case), POSITIONS, extraction_config=EVERYTHING)
    heads, layers = model.model.config.n_heads, model.model.config.n_layers
    for layer in range(layers):
        out = model.model.blocks[layer].attn.out
        total = sum(cache[f"head_out_L{layer}H{head}"] for head in range(heads))
        total = total if out.bias is None else total + out.bias
        assert near(total, cache[f"attn_out_{layer}"])
        assert near(cache[f"resid_in_{layer}"] + cache[f"attn_out_{layer}"], cache[f"resid_mid_{layer}"])
        assert near(cache[f"resid_mid_{layer}"] + cache[f"mlp_out_{layer}"], cache[f"resid_out_{layer}"])
        if layer:
            assert torch.equal(cache[f"resid_in_{layer}"], cache[f"resid_out_{layer - 1}"])
    assert torch.equal(cache["resid_in_0"], cache["input_embeddings"])
    last = cache[f"resid_out_{layers - 1}"]
    assert near(model.model.unembed(model.model.ln_f(last)), cache["logits"])
    moments = cache["last_layernorm"]
    assert near(moments["second_moment"], last.square().mean(-1))
    assert near(moments["variance"] + moments["mean"].square(), moments["second_moment"])


@both_families
@all_inputs
def test_a_heads_values_are_its_slice_of_the_projection(family: str, case: str) -> None:
    model = face(family)
    config, attention = model.model.config, model.model.blocks[1].attn
    cache = model.forward(inputs(case), POSITIONS, extraction_config=EVERYTHING)
    width, group = config.d_head, config.n_heads // config.n_kv_heads
    read = cache["attn_in_1"]
    for head in range(config.n_heads):
        for letter, linear, at in (
            ("values", attention.v, head // group),
            ("keys", attention.k, head // group),
        ):
            part = torch.nn.functional.linear(
                read,
                linear.weight[at * width : (at + 1) * width],
                None if linear.bias is None else linear.bias[at * width : (at + 1) * width],
            )
            assert near(cache[f"head_{letter}_L1H{head}"], part)
        values = cache[f"head_values_L1H{head}"]
        assert near(
            cache[f"projected_value_L1H{head}"],
            values @ attention.out.weight[:, head * width : (head + 1) * width].T,
        )
    assert cache["values_1"].shape[-1] == config.n_kv_heads * width  # the older name of values_L1
    assert near(cache["values_L1"][..., :width], cache["head_values_L1H0"])


@both_families
@all_inputs
def test_every_other_field_is_what_the_models_parts_make_of_their_input(family: str, case: str) -> None:
    model = face(family)
    config, block = model.model.config, model.model.blocks[1]
    cache = model.forward(inputs(case), POSITIONS, extraction_config=EVERYTHING)
    assert near(block.ln_attn(cache["resid_in_1"]), cache["attn_in_1"])
    assert torch.equal(cache["attn_in_1"], cache["resid_in_post_layernorm_1"])
    assert near(block.ln_mlp(cache["resid_mid_1"]), cache["mlp_in_1"])
    width, group = config.d_head, config.n_heads // config.n_kv_heads
    for letter, linear in (("queries", block.attn.q), ("keys", block.attn.k), ("values", block.attn.v)):
        packed = cache[f"{letter}_L1"]
        assert near(packed, linear(cache["attn_in_1"]))
        heads = packed.unflatten(-1, (-1, width)).unbind(2)
        for head in range(config.n_heads):
            own = heads[head if letter == "queries" else head // group]
            assert near(cache[f"head_{letter}_L1H{head}"], own)
            matrix = block.attn.out.weight[:, head * width : (head + 1) * width]
            name = {"queries": "query", "keys": "key", "values": "value"}[letter]
            assert near(cache[f"projected_{name}_L1H{head}"], own @ matrix.T)
        if letter != "queries":
            assert all(near(cache[f"kv_head_{letter}_L1H{i}"], heads[i]) for i in range(config.n_kv_heads))
    ids = inputs(case)["input_ids"] if isinstance(inputs(case), dict) else inputs(case)
    last = [row[-1] for row in ROWS] if case in ("left", "right") else ids[:, -1].tolist()
    assert cache["input_ids"]["last"][:, 0].tolist() == last
    known = {field.key.format(l=1, h=1) for field in FIELDS.values()}
    assert known <= set(cache)


@both_families
@all_inputs
def test_patterns_are_causal_mixtures_that_give_z(family: str, case: str) -> None:
    model = face(family)
    cache = model.forward(inputs(case), ["all"], extraction_config=EVERYTHING, ragged=True)
    for head in range(model.model.config.n_heads):
        for row, pattern in enumerate(cache[f"pattern_L2H{head}"]):
            assert near(pattern.sum(-1), torch.ones(pattern.shape[0]))
            assert not pattern.triu(1).any()
            assert near(cache[f"scores_L2H{head}"][row].softmax(-1), pattern)
            assert near(pattern @ cache[f"head_values_L2H{head}"][row], cache[f"head_z_L2H{head}"][row])
            norms = cache[f"projected_value_L2H{head}"][row].norm(dim=-1)
            assert near(cache[f"value_weighted_pattern_L2H{head}"][row], pattern * norms[None, :])


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_a_batch_is_the_row_alone(family: str, side: str) -> None:
    model = face(family)
    batch = model.forward(inputs(side), POSITIONS, extraction_config=EVERYTHING)
    for index, row in enumerate(ROWS):
        alone = model.forward(torch.tensor([row]), POSITIONS, extraction_config=EVERYTHING)
        for key in alone:
            if isinstance(alone[key], torch.Tensor):
                assert near(batch[key][index], alone[key][0]), key


@both_families
@all_inputs
def test_patching_every_position_of_a_stream_from_base_gives_bases_logits(family: str, case: str) -> None:
    model = face(family)
    target = inputs(case)
    base = (
        {**target, "input_ids": (target["input_ids"] + 3) % 23}
        if isinstance(target, dict)
        else (target + 3) % 23
    )
    source = model.forward(
        base, ["all", "last"], ragged=True, extraction_config=ExtractionConfig(extract_resid_in=True)
    )
    rows = source["resid_in_2"]
    longest = max(len(row) - 1 for row in rows)
    values = torch.stack([torch.cat((row[:-1], row[:1].expand(longest - len(row) + 1, -1))) for row in rows])
    patch = Intervention(activation="resid_in_2", token_positions=["all"], patching_values=values)
    patched = model.forward(target, ["last"], interventions=[patch])
    plain = model.forward(base, ["last"])
    assert near(patched["logits"], plain["logits"])
    assert not near(model.forward(target, ["last"])["logits"], plain["logits"])


@both_families
@all_inputs
@pytest.mark.parametrize(
    "key", ["head_out_L1H2", "head_z_L1H2", "resid_mid_1", "head_queries_L1H2", "head_values_L1H2"]
)
def test_patching_in_what_is_there_changes_nothing(family: str, case: str, key: str) -> None:
    model = face(family)
    cache = model.forward(inputs(case), POSITIONS, extraction_config=EVERYTHING)
    patch = Intervention(activation=key, token_positions=POSITIONS, patching_values=cache[key])
    assert near(model.forward(inputs(case), POSITIONS, interventions=[patch])["logits"], cache["logits"])


@both_families
@all_inputs
def test_ablating_a_head_leaves_the_others_as_they_were(family: str, case: str) -> None:
    model = face(family)
    config = ExtractionConfig(extract_head_out=True, extract_attn_out=True)
    plain = model.forward(inputs(case), POSITIONS, extraction_config=config)
    ablated = model.forward(
        inputs(case), POSITIONS, extraction_config=config, ablation_queries={"activation": "head_out_L1H2"}
    )
    for head in range(model.model.config.n_heads):
        now, before = ablated[f"head_out_L1H{head}"], plain[f"head_out_L1H{head}"]
        assert near(now, torch.zeros_like(before) if head == 2 else before)
    assert near(ablated["attn_out_1"], plain["attn_out_1"] - plain["head_out_L1H2"])
    assert not near(ablated["logits"], plain["logits"])


@both_families
@all_inputs
def test_the_mean_of_a_group_and_of_examples_is_the_mean(family: str, case: str) -> None:
    model = face(family)
    each = model.forward(
        inputs(case), ["all"], ragged=True, extraction_config=ExtractionConfig(extract_resid_out=True)
    )
    grouped = ExtractionConfig(extract_resid_out=True, avg=True, save_logits=False)
    averaged = model.forward(inputs(case), ["all", "last"], extraction_config=grouped)
    assert averaged["mapping_index"] == {"all": [0], "last": [1], "info": "avg"}
    for row, stream in enumerate(each["resid_out_1"]):
        assert near(averaged["resid_out_1"][row, 0], stream.mean(0))
        assert near(averaged["resid_out_1"][row, 1], stream[-1])
    both = ExtractionConfig(extract_resid_out=True, avg_over_example=True)
    means = model.forward(inputs(case), ["last"], extraction_config=both)
    assert near(means["avg_resid_out_1"], averaged["resid_out_1"][:, 1:].mean(0, keepdim=True))
    assert "resid_out_1" not in means


@both_families
@all_inputs
def test_gradients_of_every_row_are_those_of_finite_differences(family: str, case: str) -> None:
    model = face(family)
    model.model.double()  # norms compute in float32 all the same, so the step is not tiny
    rows = 1 if case == "one" else 3
    targets = [4, 8, 15][:rows]
    config = ExtractionConfig(
        extract_resid_in=True, extract_head_z=True, extract_embed=True, keep_gradient=True
    )
    cache = model.forward(inputs(case), POSITIONS, extraction_config=config, vocabulary_index=targets)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for key, width in (("resid_in_1", 16), ("head_z_L2H3", 4)):
        logits = []
        for sign in (1, -1):
            vector = torch.zeros(1, 4, width, dtype=torch.float64)
            vector[0, 0] = sign * 1e-2 * direction[:width]  # at the last position only
            moved = Intervention(
                activation=key, token_positions=POSITIONS, patching_values=cache[key] + vector
            )
            logits.append(model.forward(inputs(case), ["last"], interventions=[moved])["logits"][:, 0])
        slope = (logits[0] - logits[1]) / 2e-2
        for row, target in enumerate(targets):
            expected = cache[f"{key}_gradients"][row, 0] @ direction[:width]
            assert torch.allclose(slope[row, target], expected, rtol=5e-3, atol=1e-3)
    assert cache["input_embeddings_gradients"].shape == cache["input_embeddings"].shape


@both_families
@all_inputs
def test_gradients_of_what_is_made_of_a_head_move_with_the_head(family: str, case: str) -> None:
    model = face(family)
    names = "head_values head_keys head_queries head_out head_z attn_pattern value_weighted_pattern"
    names += " head_values_projected head_keys_projected head_queries_projected"
    fields = dict.fromkeys(names.split(), True)
    config = ExtractionConfig(
        **{f"extract_{name}": on for name, on in fields.items()}, keep_gradient=True, save_logits=False
    )
    cache = model.forward(inputs(case), POSITIONS, extraction_config=config, vocabulary_index=7)

    def slope(key: str) -> torch.Tensor:
        return (cache[key] * cache[f"{key}_gradients"]).sum(-1)

    for head in range(model.model.config.n_heads):
        assert cache[f"pattern_L1H{head}_gradients"].any()
        for letter, own in (("value", "values"), ("key", "keys"), ("query", "queries")):
            assert near(slope(f"projected_{letter}_L1H{head}"), slope(f"head_{own}_L1H{head}"))
            # and so does every other move of the head's own vector
            matrix = model.model.blocks[1].attn.out.weight[:, head * 4 : head * 4 + 4]
            projected = cache[f"projected_{letter}_L1H{head}_gradients"]
            assert near(projected @ matrix, cache[f"head_{own}_L1H{head}_gradients"])
        assert near(slope(f"value_weighted_pattern_L1H{head}"), slope(f"pattern_L1H{head}"))
        assert near(slope(f"head_out_L1H{head}"), slope(f"head_z_L1H{head}"))


@both_families
def test_gradients_stay_under_interventions(family: str) -> None:
    model = face(family)
    config = ExtractionConfig(extract_resid_out=True, extract_mlp_out=True, keep_gradient=True)
    halved = Intervention(activation="resid_out_1", multiplication_value=0.5, token_positions=["all"])
    replaced = Intervention(activation="resid_out_1", token_positions=["last"])
    options: dict[str, Any] = {"extraction_config": config, "vocabulary_index": [4, 8, 15]}
    half = model.forward(inputs("left"), POSITIONS, interventions=[halved], **options)
    # what is recorded stands behind the intervention, what went into it before
    assert half["resid_out_1_gradients"].any()
    assert near(half["mlp_out_1_gradients"], half["resid_out_1_gradients"] / 2)
    # overwritten at the last position: only what other positions read of it is left
    cut = model.forward(inputs("left"), ["last"], interventions=[replaced], **options)
    assert cut["resid_out_1_gradients"].any() and not cut["mlp_out_1_gradients"].any()


@both_families
def test_a_recorded_value_is_what_follows_the_intervention_however_it_was_given(family: str) -> None:
    model = face(family)
    zero = Intervention(activation="resid_out_1", token_positions=["last"])
    config = ExtractionConfig(extract_resid_out=True, extract_resid_in=True)
    given = model.forward(inputs("several"), extraction_config=config, interventions=[zero])
    model.register_interventions([zero])
    registered = model.forward(inputs("several"), extraction_config=config)
    model.clean_interventions()
    hooked = model.register_forward_hook("blocks.1.output", lambda x: x.index_fill(1, torch.tensor([3]), 0.0))
    own = model.forward(inputs("several"), extraction_config=config)
    hooked.remove()
    for cache in (given, registered, own):
        assert not cache["resid_out_1"].any()
        assert not cache["resid_in_2"].any()
        assert near(cache["logits"], given["logits"])
    assert model.forward(inputs("several"), extraction_config=config)["resid_out_1"].any()


def test_nothing_of_an_intervention_remains_after_an_exception() -> None:
    model = face()
    plain = model.forward(inputs("several"))["logits"]
    with pytest.raises(NeuronLensError):
        model.forward(torch.tensor([[1, 2, 99]]), interventions=[Intervention(activation="resid_out_1")])

    def broken(x: torch.Tensor) -> None:
        raise RuntimeError("mine")

    handle = model.register_forward_hook("resid.torso.post_mlp", broken)
    with pytest.raises(RuntimeError, match="mine"):
        model.forward(inputs("several"), interventions=[Intervention(activation="resid_out_1")])
    handle.remove()
    with pytest.raises(RequestError, match="not registered"):
        handle.remove()
    assert torch.equal(model.forward(inputs("several"))["logits"], plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


@both_families
def test_selection_keeps_only_what_was_selected(family: str) -> None:
    model = face(family)
    config = ExtractionConfig(
        extract_resid_out=True,
        extract_head_z=True,
        layers=[0, 1],
        attn_heads=[{"layer": 1, "head": 2}, {"layer": 2, "head": "all"}],
        save_logits=False,
    )
    cache = model.forward(inputs("several"), extraction_config=config)
    kept = {key for key in cache if key not in ("mapping_index", "token_dict")}
    assert kept == {"resid_out_0", "resid_out_1", "head_z_L1H2"}


def test_a_pass_stops_behind_the_last_layer_it_needs() -> None:
    model = face()
    with torch.no_grad():
        model.model.blocks[2].mlp.requires_grad_(False)
        for parameter in model.model.blocks[2].parameters():
            parameter.fill_(torch.nan)
    config = ExtractionConfig(extract_resid_out=True, layers=1, save_logits=False)
    assert model.forward(inputs("one"), extraction_config=config)["resid_out_1"].isfinite().all()
