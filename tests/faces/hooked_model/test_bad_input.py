"""What makes no sense is refused with an error of ours that names the thing, before anything runs or is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from faces.hooked_model.cases import face, inputs

from neuron_lens.errors import NeuronLensError
from neuron_lens.faces.hooked_model import (
    ActivationCache,
    ActivationLoader,
    ActivationSaver,
    ExtractionConfig,
    HookedModel,
    HookedModelConfig,
    Intervention,
    StoredCache,
)

STREAM = ExtractionConfig(extract_resid_in=True)
GRADIENT = ExtractionConfig(extract_embed=True, keep_gradient=True)
PATCH = {"patching_elem": "@last", "layers_to_patch": 0, "activation_type": "resid_in_{}"}
IDS = {"input_ids": torch.ones(1, 3).long()}


def check(act: Callable[[HookedModel], Any], message: str) -> None:
    """The error, and that the model answers as before."""
    model = face()
    plain = model.forward(inputs("left"))["logits"]
    with pytest.raises(NeuronLensError, match=message):
        act(model)
    assert torch.equal(model.forward(inputs("left"))["logits"], plain)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda m: m.forward(inputs("one"), extract_resid_out=True),
            "forward takes no argument 'extract_resid_out'; it is a field of the configuration",
        ),
        (lambda m: m.forward(inputs("one"), interventoins=[]), "did you mean 'interventions'"),
        (lambda m: m.extract_cache([IDS], extract_resid_out=True), "extract_cache takes no argument"),
        (lambda m: m.extract_cache([IDS], batch_idx=1), "set batch by batch"),
        (lambda m: m.predict(inputs("one"), top=3), "no tokenizer"),
        (lambda m: m.generate(inputs("one"), interventoins=[]), "generate takes no argument 'interventoins'"),
        (lambda m: m.generate(inputs("one"), {"max_tokens": 1}), "did you mean 'max_new_tokens'"),
        (lambda m: m.generate(inputs("one"), 5), "must be a dict"),
        (lambda m: m.compute_patching(["last"], [], [], PATCH, layers=3), "no argument 'layers'"),
        (lambda m: m.sweep(inputs("one"), [], None, ax={}), "sweep takes no argument 'ax'"),
        (lambda m: Intervention(activation="resid_out_1", positions=["last"]), "positions: Extra inputs"),
        (lambda m: HookedModelConfig(model_name="pico", dtype="x"), "dtype: Extra inputs"),
        (lambda m: HookedModel.from_pretrained("pico", dtype="x"), "dtype: Extra inputs"),
        (lambda m: HookedModel.from_pretrained("pico", device_map="abacus"), "device_map.*abacus"),
        (lambda m: HookedModel.from_pretrained("pico", padding_side="up"), "padding_side"),
        (lambda m: HookedModel.from_pretrained(HookedModelConfig(model_name="x"), seed=1), "not both"),
        (lambda m: HookedModel("pico"), "from_pretrained"),
        (lambda m: ExtractionConfig(extract_resid_ot=True), "did you mean 'extract_resid_out'"),
        (lambda m: ExtractionConfig(extract_resid_out="maybe"), "extract_resid_out"),
    ],
)
def test_unknown_arguments(act: Callable[[HookedModel], Any], message: str) -> None:
    check(act, message)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (
            lambda m: Intervention(activation="resid_out1"),
            "no activation is called 'resid_out1'; did you mean",
        ),
        (lambda m: m.register_forward_hook("blocks.1.mlpp.output", print), "did you mean"),
        (lambda m: m.register_forward_hook("blocks.9.mlp.output", print), "layer 9 does not exist"),
        (lambda m: m.register_forward_hook("blocks.1.mlp.output", 3), "must be a function"),
        (lambda m: m.set_hooks(3), "hooks must be a list"),
        (lambda m: m.set_hooks([{"component": "blocks.1.mlp.output"}]), "'intervention': function"),
        (lambda m: m.remove_hooks([3]), "a handle is"),
        (lambda m: m.get_module_from_string("blocks.1.x"), "no module 'blocks.1.x'"),
        (lambda m: m.register_interventions(["x"]), "Intervention objects; got 'x'"),
        (lambda m: m.forward(inputs("one"), interventions=3), "Intervention objects; got 3"),
        (lambda m: m.forward(inputs("one"), "last"), "list with at least one group"),
        (lambda m: m.forward(inputs("one"), ["lats"]), "did you mean 'last'"),
        (lambda m: m.forward(inputs("left"), [5]), "position 5, row 1: the row has 4 tokens"),
        (lambda m: m.forward(inputs("left"), ["last-6"]), "row 1"),
        (lambda m: m.forward(inputs("left"), [{"a": 1}]), "is no position"),
        (
            lambda m: m.forward(inputs("one"), interventions=[Intervention(activation="head_z_L1H4")]),
            "head_z_L1H4: head 4 does not exist: there are 4",
        ),
        (
            lambda m: m.forward(inputs("one"), interventions=[Intervention(activation="resid_out_3")]),
            "layer 3 does not exist",
        ),
        (
            lambda m: m.forward(inputs("one"), extraction_config=STREAM.model_copy(update={"layers": (-1,)})),
            "layer -1 does not exist",
        ),
        (lambda m: ExtractionConfig(attn_heads=[(0,)]), "attn_heads"),
        (lambda m: ExtractionConfig(attn_heads=[{"layer": 0, "head": "x"}]), "attn_heads"),
        (lambda m: ExtractionConfig(layers="x"), "layers"),
        (lambda m: m.forward(inputs("one"), extraction_config=GRADIENT, vocabulary_index="x"), "token id"),
        (lambda m: m.forward(inputs("one"), extraction_config=GRADIENT, vocabulary_index=23), "outside"),
        (lambda m: m.forward(inputs("one"), external_cache={}), "external_cache must be"),
        (lambda m: m.forward(inputs("one"), external_cache=ActivationCache()), "avg_over_example=True"),
        (lambda m: m.forward(None), "at least one prompt"),
        (lambda m: m.forward("a text"), "no tokenizer"),
        (lambda m: m.forward(torch.tensor([[1, 23]])), "outside the vocabulary"),
        (lambda m: m.forward(torch.ones(1, 3)), "whole numbers"),
        (lambda m: m.forward({**IDS, "attention_mask": torch.zeros(1, 3)}), "row 0 has no tokens"),
        (lambda m: m.forward({**IDS, "attention_mask": torch.tensor([[1, 0, 1]])}), "ends of a row"),
        (
            lambda m: m.forward({**IDS, "attention_mask": torch.ones(1, 2)}),
            r"attention_mask must be \[1, 3\]",
        ),
        (lambda m: m.forward({"input_ids": [[1, 2], [1]], "attention_mask": [[1, 1], [1]]}), "input_ids"),
        (lambda m: m.forward({**IDS, "pixel_values": torch.ones(1)}), "multimodal models are not offered"),
    ],
)
def test_sites_positions_heads_and_layers_that_do_not_exist(
    act: Callable[[HookedModel], Any], message: str
) -> None:
    check(act, message)


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("LlavaForConditionalGeneration", "vision_config"),
        ("ChameleonForConditionalGeneration", "vq_config"),
        ("Qwen2VLForConditionalGeneration", "image_token_id"),
    ],
)
def test_multimodal_models_are_said_to_be_none_of_ours(tmp_path: Path, architecture: str, field: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], field: {}}))
    for opened in (
        lambda: HookedModel.from_pretrained(tmp_path),
        lambda: HookedModel.from_pretrained(HookedModelConfig(model_name=str(tmp_path))),
        lambda: HookedModel(HookedModelConfig(model_name=str(tmp_path))),
    ):
        with pytest.raises(NeuronLensError, match=f"{architecture} is multimodal .*{field}.*text only"):
            opened()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"layers": 1, "heads": 1}, "ablation query 0 lacks the column 'activation'"),
        ({"activation": "head_z_L{}H{}", "heads": 1}, "ablation query 0: .* needs the column 'layers'"),
        ({"activation": "head_z_L{}H{}", "layers": "two", "heads": 1}, "layers must be .* got 'two'"),
        ({"activation": "head_z_L{}H{}", "layers": 1.5, "heads": 1}, "layers must be .* got 1.5"),
        ({"activation": "head_z_L{}H{}", "layers": 1, "heads": 7}, "heads must be .* from 0 to 3; got 7"),
        ({"activation": "kv_head_keys_L{}H{}", "layers": 1, "heads": 4}, "heads must be"),
        ({"activation": 3.5}, "must be a key"),
        ({"activation": "resid_out_1", "token_positions": 3.7}, "3.7 is no position"),
        ({"activation": "resid_out_1", "value": "x"}, "ablation query 0: patching_values: .*'x'"),
        ({"activation": "resid_out_1", "factor": "x"}, "ablation query 0: multiplication_value: .*'x'"),
        ({"activation": "resid_out_1", "source": "x"}, "ablation query 0: source: .*'x'"),
        ({"activation": "resid_out_1", "operation": 3}, "ablation query 0: operation: .* 3"),
        ({"activation": "resid_out_1", "seed": "x"}, "ablation query 0: seed: .*'x'"),
        ({"activation": "pattern_L1H1", "type": "x"}, "ablation query 0: type: .*'x'"),
        ({"activation": "pattern_L1H1", "apply_softmax": "maybe"}, "apply_softmax: .*'maybe'"),
        ({"type": "std", "head-layer-couple": [(0, 9)], "elem-to-ablate": "@last"}, "layer 9 does not exist"),
        ({"type": "std", "head-layer-couple": [("a", 0)], "elem-to-ablate": "@last"}, "'pattern_L0Ha'"),
        ({"type": "std", "head-layer-couple": [(0, 0)], "elem-to-ablate": 3.5}, "got 3.5"),
    ],
)
def test_ablation_tables_with_missing_columns_and_wrong_types(columns: dict[str, Any], message: str) -> None:
    for given in (columns, [columns], pandas.DataFrame([columns])):
        check(lambda m, given=given: m.forward(inputs("left"), ablation_queries=given), message)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"patching_elem": None}, "patching query 0 lacks the column 'patching_elem'"),
        ({"layers_to_patch": None}, "lacks the column 'layers_to_patch'"),
        ({"activation_type": None}, "lacks the column 'activation_type'"),
        ({"patching_activations": None}, "patching_activations must be a cache"),
        ({"patching_activations": "x"}, "patching_activations must be a cache"),
        ({"layers_to_patch": 9}, "layers_to_patch must be .* got 9"),
        ({"patching_elem": 3.5}, "got 3.5"),
        ({"patching_elem": "@first"}, "not extracted at 'first'; it has 'last'"),
        ({"activation_type": 3}, "got 3"),
        ({"activation_type": "resd_in_{}"}, "did you mean"),
        ({"activation_type": "resid_out_{}"}, "has no 'resid_out_0'"),
        ({"activation_type": "pattern_L{}H{}"}, "with type 'grid'"),
        ({"base_activation_index": "x"}, "base_activation_index must be .* got 'x'"),
        ({"base_activation_index": 3}, "base_activation_index must be .* from 0 to 2; got 3"),
        ({"base_index": 1}, "unknown column 'base_index'; did you mean 'base_activation_index'"),
    ],
)
def test_patching_tables_with_missing_columns_and_wrong_types(columns: dict[str, Any], message: str) -> None:
    base = face().forward(inputs("left"), ["last"], extraction_config=STREAM)
    row = {**PATCH, "patching_activations": base, **columns}
    check(lambda m: m.forward(inputs("left"), patching_queries=pandas.DataFrame([row])), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader": 3}, "dataloader must give batches.* got 3"),
        ({"dataloader": []}, "the dataloader is empty"),
        ({"dataloader": [IDS, {**IDS, "label": [1]}]}, r"batch 1 has other keys than batch 0: \['label'\]"),
        ({"dataloader": [{**IDS, "attention_mask": torch.ones(1, 3)}, IDS]}, "'attention_mask'"),
        ({"dataloader": [IDS, {"input_ids": torch.tensor([[99]])}]}, "outside the vocabulary"),
        ({"dataloader": [{**IDS, "pivot_positions": [1]}], "pivot_positions": [1]}, "give it once"),
        ({"batch_saver": 3}, "batch_saver must be a function"),
        ({"batch_saver": lambda own: 3}, "batch 0: batch_saver must return a dict"),
        ({"batch_saver": lambda own: {"logits": 1}}, "'logits', which the cache has"),
        ({"batch_saver": lambda own: {"odd": object()}}, "odd cannot be written as JSON"),
        ({"register_aggregation": 3}, "pair \\(prefix, function\\)"),
        ({"register_aggregation": ("x", max)}, "in memory"),
        ({"stream_to": 3}, "stream_to must be"),
    ],
)
def test_extractions_that_fail_leave_nothing_behind(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    given = {"dataloader": [IDS], "stream_to": tmp_path / "run", **options}
    check(lambda m: m.extract_cache(extraction_config=STREAM, **given), message)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_never_written_to(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = face().extract_cache([IDS], ["last"], STREAM, stream_to=folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    message = f"{folder.name} exists already, and stored activations are never overwritten"
    check(lambda m: m.extract_cache([IDS, IDS], ["last"], STREAM, stream_to=folder), message)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert isinstance(first, StoredCache) and list(tmp_path.iterdir()) == [folder]


def test_stores_without_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACTIVATION_BASE_DIR", raising=False)
    saver = ActivationSaver(tmp_path, "one")
    cache = face().forward(inputs("one"), extraction_config=STREAM)
    folder = saver.save(cache, "pico", tag="a")
    found = ActivationLoader.from_saver(saver).query()
    for act, message in (
        (lambda: StoredCache(tmp_path), "holds no stored activations"),
        (lambda: ActivationSaver(tmp_path, "a/b"), "plain folder name"),
        (lambda: ActivationSaver.from_env(), "ACTIVATION_BASE_DIR"),
        (lambda: ActivationLoader(tmp_path, "one").query(tag="b").load(), "found no run"),
        (lambda: found.load("x"), f"no run 'x'.*{folder.name}"),
        (lambda: saver.save_cache(cache), "no metadata that names its model"),
        (lambda: saver.rename_experiment("one"), "cannot rename"),
    ):
        with pytest.raises(NeuronLensError, match=message):
            act()
    (folder / "metadata.json").write_text("{")
    with pytest.raises(NeuronLensError, match="holds no stored activations"):
        ActivationLoader.from_saver(saver).query()


def test_token_ids_that_are_compared_must_pair_up() -> None:
    for base, target, message in (
        ([["a"]], [["b"]], "batch 0: .*as many token ids of each"),
        ([[1]], [[1, 2]], "as many token ids"),
        ([[23]], [[1]], "below 23"),
        ([], [], "no entry"),
    ):
        check(
            lambda m, base=base, target=target: m.compute_patching(
                ["last"], [IDS], [IDS], PATCH, base, target, return_logit_diff=True
            ),
            message,
        )
