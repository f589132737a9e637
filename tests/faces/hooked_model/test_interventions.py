"""Requests and query tables do what they say, in the rows and heads they name, and never undo the causal mask."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas
import pytest
import torch
from faces.hooked_model.cases import all_inputs, both_families, face, inputs, near

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model import ExtractionConfig, Intervention
from neuron_lens.interventions import Zero

PATTERN = ExtractionConfig(extract_attn_pattern=True, extract_head_z=True)


def patterns(
    case: str, family: str, *interventions: Any, queries: Any = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """Head 2's pattern of layer 1 without and with interventions, and head 1's with, row by row."""
    model = face(family)
    plain = model.forward(inputs(case), ["all"], extraction_config=PATTERN, ragged=True)
    edited = model.forward(
        inputs(case),
        ["all"],
        extraction_config=PATTERN,
        ragged=True,
        interventions=interventions,
        ablation_queries=queries,
    )
    for before, after in zip(plain["pattern_L1H1"], edited["pattern_L1H1"], strict=True):
        assert near(before, after)
    return plain["pattern_L1H2"], edited["pattern_L1H2"], edited["logits"]


@both_families
@all_inputs
@pytest.mark.parametrize("kind", ["columns", "rows", "grid", "columns_pre_softmax", "grid_pre_softmax"])
def test_attention_is_cut_where_it_is_said(family: str, case: str, kind: str) -> None:
    keys, queries = [1], ["last"]
    positions = {"rows": queries, "grid": (queries, keys)}.get(kind.removesuffix("_pre_softmax"), keys)
    cut = Intervention(activation="pattern_L1H2", type=kind, token_positions=positions)
    before, after, _ = patterns(case, family, cut)
    for plain, edited in zip(before, after, strict=True):
        mask = torch.zeros_like(plain, dtype=torch.bool)
        last = plain.shape[0] - 1
        if kind.startswith("columns"):
            mask[:, 1] = True
        elif kind == "rows":
            mask[last] = True
        else:
            mask[last, 1] = True
        expected = plain.masked_fill(mask, 0.0)
        if kind.endswith("_pre_softmax"):
            expected = expected / expected.sum(-1, keepdim=True)
        assert near(edited, expected)
        assert not edited.triu(1).any()


@both_families
@all_inputs
def test_older_queries_cut_only_the_heads_they_name(family: str, case: str) -> None:
    query = {"type": "std", "head-layer-couple": [(2, 1)], "elem-to-ablate": "@first"}
    before, after, _ = patterns(case, family, queries=[query])
    for plain, edited in zip(before, after, strict=True):
        assert near(edited[:, 1:], plain[:, 1:])
        assert not edited[:, 0].any()
    frame = pandas.DataFrame([query])
    _, same, _ = patterns(case, family, queries=frame)
    assert all(map(near, same, after))


@both_families
def test_a_query_may_see_only_itself(family: str) -> None:
    query = {"type": "keep-self-attn", "head-layer-couple": [[2, 1]], "elem-to-ablate": "@last"}
    _, after, _ = patterns("left", family, queries=query)
    for edited in after:
        assert near(edited[-1], torch.eye(edited.shape[0])[-1])


def test_a_renormalised_pattern_sums_to_one() -> None:
    cut = Intervention(
        activation="pattern_L1H2", type="columns", token_positions=["last"], apply_softmax=True
    )
    before, after, _ = patterns("several", "gpt2", cut)
    assert near(after[0].sum(-1), torch.ones(4))
    assert near(after[0][:3], before[0][:3])


def test_scaling_and_writing_patterns_keep_the_future_unseen() -> None:
    scale = Intervention(
        activation="pattern_L1H2", type="columns", token_positions=[0], multiplication_value=0.5
    )
    before, after, _ = patterns("several", "gpt2", scale)
    assert near(after[1][:, 0], before[1][:, 0] / 2)
    written = torch.eye(4)
    write = Intervention(activation="pattern_L1H2", patching_values=written)
    _, after, _ = patterns("several", "gpt2", write)
    assert near(after[2], written)
    forbidden = Intervention(activation="pattern_L1H2", patching_values=torch.ones(4, 4))
    with pytest.raises(RequestError, match="later keys"):
        patterns("several", "gpt2", forbidden)
    negative = Intervention(
        activation="pattern_L1H2", type="columns_pre_softmax", token_positions=[0], multiplication_value=-1.0
    )
    with pytest.raises(RequestError, match="negative factor"):
        patterns("several", "gpt2", negative)


@both_families
@all_inputs
@pytest.mark.parametrize(
    "key", ["head_z_L1H3", "head_queries_L1H3", "head_keys_L1H3", "kv_head_values_L1H1", "resid_mid_1"]
)
def test_set_scale_and_add_act_at_their_positions_only(family: str, case: str, key: str) -> None:
    model = face(family)
    flags = dict.fromkeys(["head_z", "head_queries", "head_keys", "kv_head_values", "resid_mid"], True)
    config = ExtractionConfig(**{f"extract_{name}": on for name, on in flags.items()}, save_logits=False)
    positions = ["last", "first"]
    plain = model.forward(inputs(case), positions, extraction_config=config)[key]
    vector = torch.arange(plain.shape[-1], dtype=torch.float32)

    def edited(**fields: Any) -> torch.Tensor:
        one = Intervention(activation=key, token_positions=["last"], **fields)
        return model.forward(inputs(case), positions, extraction_config=config, interventions=[one])[key]

    for now, expected in (
        (edited(patching_values=vector), vector.expand_as(plain[:, 0])),
        (edited(patching_values=2.0), torch.full_like(plain[:, 0], 2.0)),
        (edited(multiplication_value=3.0), plain[:, 0] * 3),
        (edited(operation="add", patching_values=vector), plain[:, 0] + vector),
        (edited(patching_values="ablation"), torch.zeros_like(plain[:, 0])),
    ):
        assert near(now[:, 0], expected)
        assert near(now[:, 1], plain[:, 1])


@both_families
@all_inputs
def test_mean_and_resample_take_from_their_source(family: str, case: str) -> None:
    model = face(family)
    config = ExtractionConfig(extract_head_z=True)
    others = torch.tensor([[4, 8, 15, 16], [22, 3, 1, 2], [7, 7, 2, 9], [1, 9, 8, 6]])
    source = model.forward(others, ["last", "first"], extraction_config=config)
    means = model.forward(
        others,
        ["last", "first"],
        extraction_config=ExtractionConfig(extract_head_z=True, avg_over_example=True),
    )
    fields: dict[str, Any] = {"activation": "head_z_L1H2", "token_positions": ["last", "first"]}
    expected = source["head_z_L1H2"].mean(0)
    for given in (source, means):
        one = Intervention(**fields, source=given)
        now = model.forward(inputs(case), ["last", "first"], extraction_config=config, interventions=[one])
        assert near(now["head_z_L1H2"], expected.expand_as(now["head_z_L1H2"]))
    drawn = Intervention(**fields, operation="resample", source=source, seed=3)
    now = model.forward(inputs(case), ["last", "first"], extraction_config=config, interventions=[drawn])
    again = model.forward(inputs(case), ["last", "first"], extraction_config=config, interventions=[drawn])
    for row, same in zip(now["head_z_L1H2"], again["head_z_L1H2"], strict=True):
        assert any(near(row, other) for other in source["head_z_L1H2"])
        assert torch.equal(row, same)


def test_a_patching_table_writes_what_the_base_had() -> None:
    model = face("llama")
    config = ExtractionConfig(extract_resid_in=True, extract_head_z=True)
    base = model.forward(inputs("several"), ["last", 1], extraction_config=config)
    other = (inputs("several") + 5) % 23
    frame = pandas.DataFrame(
        [
            {
                "pos_token_to_patch": "@last",
                "activation_type": "resid_in_{}",
                "layer": 2,
                "patching_activations": base,
            },
            {
                "pos_token_to_patch": 1,
                "activation_type": "head_z_L{}H{}",
                "layer": 0,
                "patching_activations": base,
            },
        ]
    )
    patched = model.forward(other, ["last", 1], extraction_config=config, patching_queries=frame)
    assert near(patched["resid_in_2"][:, 0], base["resid_in_2"][:, 0])
    assert near(patched["head_z_L0H3"][:, 1], base["head_z_L0H3"][:, 1])
    assert not near(patched["head_z_L0H3"][:, 0], base["head_z_L0H3"][:, 0])


def test_declared_interventions_pass_as_they_are_and_work_while_generating() -> None:
    model = face("llama")
    options = {"max_new_tokens": 3, "temperature": 0.0}
    zero = Zero(site="resid.torso.delta_mlp", layers=1)
    ours = [Intervention(activation="mlp_out_1", token_positions=["all"])]
    plain = model.generate(inputs("right"), options)
    given = model.generate(
        inputs("right"),
        options,
        ["last"],
        interventions=ours,
        extraction_config=ExtractionConfig(extract_mlp_out=True),
    )
    assert not given["cache"]["mlp_out_1"].any()
    assert given["cache"]["mlp_out_0"].shape == (3, 1, 16)
    everywhere = model.generate(inputs("right"), options, interventions=[zero])
    assert [len(one.ids) for one in everywhere] == [3, 3, 3]
    assert [one.ids for one in plain] != [one.ids for one in everywhere]


def test_user_hooks_take_either_form() -> None:
    model = face()
    seen: list[Any] = []
    handles = model.set_hooks(
        [
            {
                "component": "model.layers[1].self_attn.o_proj.output",
                "intervention": lambda module, args, output: output * 0,
            },
            {"component": "blocks.0.input", "intervention": lambda x, layer: seen.append(layer)},
        ]
    )
    config = ExtractionConfig(extract_attn_out=True)
    assert not model.forward(inputs("left"), extraction_config=config)["attn_out_1"].any()
    assert seen == [0]
    model.remove_hooks(handles)
    assert model.forward(inputs("left"), extraction_config=config)["attn_out_1"].any()
    assert model.get_module_from_string("blocks[1].attn") is model.model.blocks[1].attn
    with pytest.raises(RequestError, match="no component"):
        model.register_forward_hook("blocks.1.atn.output", lambda x: x)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"activation": "head_out_L1H9"}, "head 9 does not exist"),
        ({"activation": "head_out_L7H0"}, "layer 7 does not exist"),
        ({"activation": "hed_out_L1H1"}, "no activation is called"),
        ({"activation": "head_out_L{}H{}", "layers": 1}, "needs the column 'heads'"),
        ({"activation": "head_out_L1H1", "layers": 1}, "has no place for the column 'layers'"),
        ({"activation": "head_out_L{}H{}", "layers": 1, "heads": "two"}, "heads must be"),
        ({"activation": "head_out_L1H1", "positions": ["last"]}, "unknown column 'positions'"),
        ({"activation": "head_out_L1H1", "token_positions": ["lats"]}, "did you mean"),
        ({"activation": "head_out_L1H1", "token_positions": [6]}, "row 1"),
        ({"activation": "head_out_L1H1", "operation": "mean"}, "needs source"),
        ({"activation": "head_out_L1H1", "operation": "explode"}, "operation"),
        ({"activation": "projected_key_L1H1", "value": 1.0, "operation": "set"}, "own vector"),
        ({"token_positions": ["last"]}, "lacks the column 'activation'"),
        ({"type": "std", "head-layer-couple": [(0, 0)]}, "lacks the column 'elem-to-ablate'"),
        ({"type": "sdt", "head-layer-couple": [(0, 0)], "elem-to-ablate": "@last"}, "type 'sdt' is unknown"),
        ({"type": "mean", "head-layer-couple": [(0, 0)]}, "operation 'mean' and a source"),
        ({"type": "std", "head-layer-couple": [0], "elem-to-ablate": "@last"}, "pairs"),
        ([], "at least one row"),
        ("std", "must be a dict"),
        (pandas.DataFrame({"activation": [1.5]}), "must be a key"),
        (
            {"activation": "resid_out_1", "value": torch.ones(3, 1, 5), "token_positions": ["last"]},
            "d_model is 16",
        ),
        (
            {"activation": "resid_out_1", "value": torch.ones(2, 1, 16), "token_positions": ["last"]},
            "1 or 3 rows",
        ),
    ],
)
def test_queries_that_make_no_sense_are_refused(query: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        face().forward(inputs("left"), ablation_queries=query)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extraction_config": {"extract_resid_out": True}}, "must be an ExtractionConfig"),
        ({"interventions": ["head_out_L0H0"]}, "Intervention objects"),
        ({"vocabulary_index": 3}, "needs keep_gradient"),
        (
            {"extraction_config": ExtractionConfig(extract_embed=True, keep_gradient=True)},
            "give vocabulary_index",
        ),
        (
            {
                "extraction_config": ExtractionConfig(extract_embed=True, keep_gradient=True),
                "vocabulary_index": [1, 2, 3, 4],
            },
            "one for each of 3 rows",
        ),
        ({"extraction_config": ExtractionConfig(extract_resid_out=True, layers=9)}, "layer 9"),
        ({"extraction_config": ExtractionConfig(attn_heads=[{"layer": 0, "head": 9}])}, "does not exist"),
        ({"pivot_positions": [1], "split_positions": [1]}, "give one of them"),
        ({"target_token_positions": ["all"]}, "ragged=True"),
        ({"patching_queries": {"patching_elem": "@last"}}, "lacks the column"),
    ],
)
def test_forwards_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        face().forward(inputs("left"), **options)


def test_configurations_that_contradict_themselves_are_refused_and_older_names_taken() -> None:
    with pytest.raises(RequestError, match="attn_pattern_row_positions"):
        ExtractionConfig(extract_attn_pattern=True, attn_pattern_avg="mean")
    with pytest.raises(RequestError, match="baseline_ratio"):
        ExtractionConfig(
            extract_attn_pattern=True,
            attn_pattern_avg="baseline_ratio",
            attn_pattern_row_positions=["last"],
            keep_gradient=True,
        )
    older = ExtractionConfig(extract_avg_attn_pattern=True)
    assert older.extract_attn_pattern and older.avg_over_example


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("create_hooks", "register_forward_hook"),
        ("set_custom_modules", "extract_attn_pattern"),
        ("restore_original_modules", "nothing to restore"),
        ("use_language_model_only", "text only"),
        ("use_full_model", "text only"),
        ("get_processor", "get_tokenizer"),
        ("get_image_placeholder", "all-image"),
        ("assert_module_exists", "get_module_from_string"),
        ("assert_all_modules_exist", "get_module_from_string"),
    ],
)
def test_names_that_mean_nothing_here_say_what_to_use(name: str, instead: str) -> None:
    with pytest.raises(RequestError, match=f"{name} is not offered.*{instead}"):
        getattr(face(), name)("anything", at_all=True)


def test_image_blocks_are_grids_by_another_name() -> None:
    for name in ("block-img-txt", "block_img_img", "block_img_txt_pre_softmax"):
        block = Intervention(activation="pattern_L1H2", type=name)
        assert block.type == ("grid_pre_softmax" if name.endswith("softmax") else "grid")
        assert block.token_positions[1] == ("all-image",)
    with pytest.raises(RequestError, match="leave token_positions out"):
        Intervention(activation="pattern_L1H2", type="block-img-txt", token_positions=["last"])
    marks = {"<start_of_image>": 20, "<image_soft_token>": 21, "<end_of_image>": 22}
    model = face()
    model.model.tokenizer = SimpleNamespace(name="toy", special_tokens=marks)  # type: ignore[assignment]
    ids = torch.tensor([[1, 20, 21, 22, 2, 3]])
    block = Intervention(activation="pattern_L1H2", type="block-img-txt")
    older = {"type": "block-img-txt", "head-layer-couple": [(2, 1)]}
    plain = model.forward(ids, ["all"], extraction_config=PATTERN)["pattern_L1H2"][0]
    cut = model.forward(ids, ["all"], extraction_config=PATTERN, interventions=[block])["pattern_L1H2"][0]
    same = model.forward(ids, ["all"], extraction_config=PATTERN, ablation_queries=older)["pattern_L1H2"][0]
    expected = plain.clone()
    expected[torch.tensor([0, 4, 5])[:, None], torch.tensor([1, 2, 3])] = 0
    assert near(cut, expected) and near(same, expected)


def test_the_prompts_logits_come_with_a_generation() -> None:
    model, options = face("llama"), {"max_new_tokens": 2, "temperature": 0.0, "return_logits": True}
    cut = Intervention(activation="mlp_out_1", token_positions=["all"])
    config = ExtractionConfig(extract_resid_out=True)
    for case in ("several", "left", "right"):
        given = model.generate(
            inputs(case), options, ["last", 1], extraction_config=config, interventions=[cut]
        )
        prompt = model.forward(inputs(case), ["last", 1], extraction_config=config, interventions=[cut])
        for key in ("logits", "resid_out_2"):
            assert near(given["cache"][key], prompt[key])
        first = torch.stack([one.logits[0] for one in given["generation_output"]])
        assert near(first, prompt["logits"][:, 0])
    with pytest.raises(RequestError, match="give target_token_positions"):
        model.generate(inputs("one"), options, extraction_config=config)


def test_writing_the_prompts_own_stream_changes_no_generation() -> None:
    model, options = face("llama"), {"max_new_tokens": 3, "temperature": 0.0}
    base = model.forward(
        inputs("several"), ["last"], extraction_config=ExtractionConfig(extract_resid_in=True)
    )
    query = {"patching_elem": "@last", "layers_to_patch": [1, 2], "activation_type": "resid_in_{}"}
    patched = model.generate(
        inputs("several"), options, patching_queries={**query, "patching_activations": base}
    )
    plain = model.generate(inputs("several"), options)
    assert [one.ids for one in patched] == [one.ids for one in plain]
