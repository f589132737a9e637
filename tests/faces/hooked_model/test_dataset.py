"""Extraction over data sets, joined, streamed, stored and found again; patching in three passes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from faces.hooked_model.cases import both_families, face, inputs, near

from neuron_lens.analysis.attention_blocks import attention_blocks
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model import (
    ActivationCache,
    ActivationLoader,
    ActivationSaver,
    ExtractionConfig,
    HookedModel,
    Intervention,
    StoredCache,
)

STREAM = ExtractionConfig(
    extract_resid_out=True, extract_attn_pattern=True, extract_last_layernorm=True, save_input_ids=True
)


def batches() -> list[dict[str, Any]]:
    """Three batches of unequal length and padding, with entries of their own."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, (rows, length) in enumerate([(2, 5), (3, 7), (1, 6)]):
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[0, : number + 1] = 0
        made.append(
            {
                "input_ids": torch.randint(23, (rows, length), generator=generator),
                "attention_mask": mask,
                "label": [f"{number}.{row}" for row in range(rows)],
            }
        )
    return made


def test_a_data_set_is_its_batches_one_after_another(tmp_path: Path) -> None:
    model = face("llama")
    whole = model.extract_cache(
        (batch for batch in batches()),
        ["last", "first"],
        STREAM,
        batch_saver=lambda own: {"label": own["label"]},
    )
    assert isinstance(whole, ActivationCache)
    each = [
        model.forward(
            {k: v for k, v in batch.items() if k != "label"}, ["last", "first"], extraction_config=STREAM
        )
        for batch in batches()
    ]
    for key in ("resid_out_1", "pattern_L0H1", "logits"):
        assert torch.equal(whole[key], torch.cat([cache[key] for cache in each]))
    assert whole["label"] == ["0.0", "0.1", "1.0", "1.1", "1.2", "2.0"]
    assert whole["mapping_index"] == {"last": [0], "first": [1]}
    assert len(whole["token_dict"]["last"]) == whole.examples() == 6
    assert whole["last_layernorm"]["mean"].shape == (6, 2)
    assert whole["input_ids"]["last"].shape == (6, 1)
    assert torch.equal(whole.map_to_dict("resid_out_1")["first"][:, 0], whole["resid_out_1"][:, 1])
    streamed = model.extract_cache(batches(), ["last", "first"], STREAM, stream_to=tmp_path / "run")
    assert isinstance(streamed, StoredCache)
    for key in set(streamed) - {"label"}:
        assert repr(streamed[key]) == repr(whole[key])
    assert streamed.load()["metadata"]["target_token_positions"] == ["last", "first"]


def test_ragged_rows_are_lists_and_means_over_examples_are_weighted() -> None:
    model = face()
    ragged = model.extract_cache(batches(), ["all", "last"], STREAM, ragged=True)
    lengths = [4, 5, 5, 7, 7, 3]
    assert [row.shape[0] for row in ragged["resid_out_1"]] == [length + 1 for length in lengths]
    assert ragged["mapping_index"][5] == {"all": [0, 1, 2], "last": [3]}
    assert [row.shape for row in ragged["pattern_L0H1"]] == [(n + 1, n + 1) for n in lengths]
    averaging = ExtractionConfig(extract_attn_pattern=True, extract_resid_out=True, avg_over_example=True)
    means = model.extract_cache(batches(), ["last", "first"], averaging)
    plain = model.extract_cache(batches(), ["last", "first"], STREAM)
    assert near(means["avg_resid_out_1"][0], plain["resid_out_1"].mean(0))
    assert near(means["avg_pattern_L0H1"][0], plain["pattern_L0H1"].mean(0))
    assert means.examples() == 6
    running = ActivationCache()
    for batch in batches():
        own = {k: v for k, v in batch.items() if k != "label"}
        model.forward(own, ["last", "first"], extraction_config=averaging, external_cache=running)
    assert near(running["avg_resid_out_1"], means["avg_resid_out_1"])
    with pytest.raises(RequestError, match="ragged=True"):
        model.extract_cache([torch.ones(2, 4).long(), torch.ones(2, 5).long()], ["all"], STREAM)


def live_bytes(shown: set[int]) -> int:
    """Bytes of all tensors that python knows of, without those shown."""
    storages = [
        one.untyped_storage()
        for one in gc.get_objects()
        if type(one) is torch.Tensor and id(one) not in shown
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def most_alive(model: HookedModel, folder: Path, count: int) -> tuple[int, int]:
    """The most bytes alive before every fourth of `count` batches that are streamed, and the bytes of one batch."""
    shown = {id(one) for one in gc.get_objects() if type(one) is torch.Tensor}
    alive: list[int] = []

    def loader() -> Iterator[dict[str, Any]]:
        for number in range(count):
            if number % 4 == 3:
                alive.append(live_bytes(shown))
            yield {"input_ids": torch.full((8, 10), number % 23), "label": torch.zeros(8, 1000)}

    stored = model.extract_cache(
        loader(), ["all"], STREAM, batch_saver=lambda own: {"label": own["label"]}, stream_to=folder
    )
    assert isinstance(stored, StoredCache)
    sizes = [batch.memory_size() for batch in stored.iter_batches()]
    assert len(sizes) == count
    return max(alive), sizes[0]


def test_memory_does_not_grow_with_the_number_of_batches(tmp_path: Path) -> None:
    model = face()
    gc.collect()
    gc.disable()  # what is not needed goes at once, not when python happens to look for cycles
    try:
        (few, one), (many, _) = (most_alive(model, tmp_path / str(count), count) for count in (4, 40))
    finally:
        gc.enable()
    assert many < few + one


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "empty"),
        (
            [{"input_ids": torch.ones(1, 3).long()}, {"input_ids": torch.ones(1, 3).long(), "label": [1]}],
            "other keys",
        ),
        ([{"pixel_values": torch.ones(1), "input_ids": torch.ones(1, 3).long()}], "multimodal"),
        ([{"label": [1]}], "must hold 'input_ids'"),
        ([torch.ones(1, 3).long(), torch.ones(1, 2).long() * 99], "outside the vocabulary"),
    ],
)
def test_a_failed_extraction_leaves_nothing_on_disk(tmp_path: Path, loader: list[Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        face().extract_cache(loader, ["last"], STREAM, stream_to=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_store_never_overwrites_and_is_queried_by_what_runs_were(tmp_path: Path) -> None:
    model = face()
    saver = ActivationSaver(tmp_path / "store", "heads")
    cache = model.extract_cache(batches(), ["last", (0, 2)], STREAM)
    assert isinstance(cache, ActivationCache)
    folders = [saver.save_cache(cache, tag=tag) for tag in ("a", "b", "a")]
    assert len(set(folders)) == 3
    streamed = model.extract_cache(batches(), ["last"], STREAM, stream_to=saver, tag="c")
    loader = ActivationLoader.from_saver(saver)
    assert len(loader.query()) == 4
    assert loader.query(tag="a").get_paths() == [folders[0], folders[2]]
    assert len(loader.query(target_token_positions=["last", (0, 2)])) == 3
    assert len(loader.query(extraction_config=STREAM)) == 4
    assert len(loader.query(extraction_config=ExtractionConfig(), where=lambda told: True)) == 0
    assert len(ActivationLoader(tmp_path / "store", "other").query()) == 0
    loaded, metadata = loader.query(tag="b").load()
    assert metadata["tag"] == "b" and metadata["experiment_name"] == "heads"
    for key in set(cache) - {"metadata"}:
        assert repr(loaded[key]) == repr(cache[key])
    with pytest.raises(RequestError, match="never overwritten"):
        model.extract_cache(batches(), ["last"], STREAM, stream_to=streamed.folder)  # type: ignore[union-attr]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match="JSON"):
        saver.save(cache, "pico", other_metadata={"bad": object()})
    with pytest.raises(RequestError, match="cannot be written"):
        saver.save(cache + {"odd": object()}, "pico")
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == [
        p for p in before if p.is_file()
    ]
    assert json.loads((folders[0] / "metadata.json").read_text())["batches"] == 1


def test_caches_that_do_not_fit_are_refused_and_rules_of_ones_own_go_first() -> None:
    one = ActivationCache({"x": torch.ones(2, 3), "y": [1]})
    with pytest.raises(RequestError, match="other keys"):
        ActivationCache.join([one, ActivationCache({"x": torch.ones(1, 3)})])
    with pytest.raises(RequestError, match="do not fit behind"):
        ActivationCache.join([one, ActivationCache({"x": torch.ones(1, 4), "y": [2]})])
    with pytest.raises(RequestError, match="different kinds"):
        ActivationCache.join([one, ActivationCache({"x": [1], "y": [2]})])
    joined = ActivationCache.join([one, one], {"x": lambda old, new: old + new})
    assert torch.equal(joined["x"], torch.full((2, 3), 2.0)) and joined["y"] == [1, 1]
    assert one.memory_size("x") == 24 and "24 B" in one.memory_tree()
    with pytest.raises(KeyError, match="did you mean"):
        ActivationCache({"resid_out_1": one["x"]})["resid_out_2"]


def test_deferred_joins_are_the_joins_made_at_once() -> None:
    model = face()
    averaging = ExtractionConfig(extract_resid_out=True, avg_over_example=True)
    for config in (STREAM, averaging):
        each = [
            model.forward(torch.full((rows, 4), rows), ["last"], extraction_config=config)
            for rows in (1, 2, 3)
        ]
        plain, deferred = ActivationCache(), ActivationCache()
        with deferred.deferred_mode() as collecting:
            for cache in each:
                plain.cat(cache)
                collecting.cat(cache)
            assert deferred.is_empty()
        assert set(plain) == set(deferred)
        for key in plain:
            same = plain[key], deferred[key]
            assert near(*same) if isinstance(same[0], torch.Tensor) else repr(same[0]) == repr(same[1])
    with pytest.raises(RequestError, match="other keys"), deferred.deferred_mode():
        deferred.cat(ActivationCache({"x": torch.ones(1)}))
    assert set(plain) == set(deferred)
    with deferred.deferred_mode(), pytest.raises(RequestError, match="already"), deferred.deferred_mode():
        pass


def test_runs_move_between_experiments_and_are_found_by_what_was_asked(tmp_path: Path) -> None:
    model, saver = face(), ActivationSaver(tmp_path, "first")
    config = ExtractionConfig(extract_resid_out=True)
    ablation = pandas.DataFrame([{"activation": "resid_out_1"}])
    for pivots in ([1], [2]):
        model.extract_cache(
            [torch.ones(1, 4).long()],
            ["inputs-partition-0"],
            config,
            stream_to=saver,
            pivot_positions=pivots,
            ablation_queries=ablation,
        )
    loader = ActivationLoader(tmp_path, None)
    found = loader.query(pivot_positions=[2], ablation_queries=[{"activation": "resid_out_1"}])
    assert len(found) == len(loader.query(custom_keys={"pivot_positions": [2]})) == 1
    assert found[0]["resid_out_0"].shape == (1, 2, 16)
    found.update_run_experiment("second")
    assert len(loader.query(experiment_name="second")) == len(loader.query(experiment_name="first")) == 1
    assert found[0].metadata["experiment_name"] == "second"
    moved = loader.query(experiment_name="second")
    (tmp_path / "first" / moved[0].folder.parent.name / moved[0].folder.name).mkdir()
    with pytest.raises(RequestError, match="never overwritten"):
        moved.update_run_experiment("first")


def test_the_ratio_to_the_baseline_is_one_for_uniform_causal_attention() -> None:
    size = 6
    uniform = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    positions, mask = torch.arange(size)[None], torch.ones(1, size, dtype=torch.bool)
    queries, keys = [positions[:, 3:], positions[:, :2]], [positions[:, :2], positions[:, 1:5]]
    masks = [mask[:, 3:], mask[:, :2]], [mask[:, :2], mask[:, 1:5]]
    cells = torch.cat([uniform[q[0]] for q in queries])
    pattern = torch.cat([cells[:, k[0]] for k in keys], 1)[None, None]
    assert near(attention_blocks(pattern, queries, keys, *masks, "baseline_ratio"), torch.ones(1, 1, 2, 2))
    total = attention_blocks(pattern, queries, keys, *masks, "sum")
    assert near(total[0, 0, 0, 1], uniform[3:, 1:5].sum())
    assert near(attention_blocks(pattern, queries, keys, *masks, "mean")[0, 0, 1, 0], uniform[:2, :2].mean())


@pytest.mark.parametrize("side", ["left", "right"])
def test_blocks_of_a_padded_row_are_those_of_the_row_alone(side: str) -> None:
    model = face()
    for reduction in ("mean", "sum", "baseline_ratio"):
        config = ExtractionConfig(
            extract_attn_pattern=True,
            attn_pattern_avg=reduction,
            attn_pattern_row_positions=["last", (1, None)],
            save_logits=False,
        )
        batch = model.forward(inputs(side), ["first", (0, -1)], extraction_config=config, ragged=True)
        ids = inputs(side)["input_ids"][1][inputs(side)["attention_mask"][1] == 1]
        alone = model.forward(ids, ["first", (0, -1)], extraction_config=config)
        assert near(batch["pattern_L1H1"][1], alone["pattern_L1H1"][0])
        assert alone["pattern_L1H1"].shape == (1, 2, 2)


@both_families
def test_patching_measures_how_far_the_patch_carries(family: str) -> None:
    model = face(family)
    base, target = [inputs("several"), inputs("several") + 1], [inputs("several") + 2, inputs("several") + 1]
    query = {"patching_elem": "@last", "layers_to_patch": "all", "activation_type": "resid_in_{}"}
    ids = [[1, 2], [3, 4]]
    result = model.compute_patching(
        ["last"], base, target, query, ids, [[5, 6], [7, 8]], return_logit_diff=True, each="layer"
    )
    # the whole stream at the last position is base's from layer 0 on; attention reads target's other positions
    assert result["kl_clean|base"].shape == (6,) and result["logit_diff_variation"].shape == (6, 2)
    assert near(result["kl_difference"], result["kl_patched|base"] - result["kl_clean|base"])
    # where base and target are the same prompts, nothing moves
    assert near(result["kl_patched|clean"][3:], torch.zeros(3))
    assert near(result["target_patched_logits"][3:], result["target_clean_logits"][3:])
    assert float(result["kl_patched|clean"][:3].min()) > 1e-4
    clean = result["target_clean_logits"][0, 0]
    assert near(result["logit_diff_in_clean"][0], torch.stack((clean[5] - clean[1], clean[6] - clean[2])))
    layers = model.model.config.n_layers
    assert result["sweep_kl_patched|base"].shape == (6, layers, 1)
    for layer in range(layers):
        alone = model.compute_patching(["last"], base, target, {**query, "layers_to_patch": layer})
        assert near(result["sweep_kl_patched|base"][:, layer, 0], alone["kl_patched|base"])


def test_patching_all_positions_at_the_first_layer_makes_it_base() -> None:
    model = face()
    query = [{"patching_elem": "@all", "layers_to_patch": [0], "activation_type": "resid_in_{}"}]
    result = model.compute_patching(["last", "first"], [inputs("several")], [inputs("several") + 2], query)
    assert near(result["target_patched_logits"], result["base_logits"])
    assert near(result["kl_patched|base"], torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_dataloader": []}, "target dataloader has more"),
        ({"base_dataloader": [], "target_dataloader": []}, "empty"),
        ({"base_dataloader": [torch.ones(2, 4).long()]}, "rows"),
        ({"patching_query": {"patching_elem": "@last"}}, "lacks the column"),
        (
            {"patching_query": {"patching_elem": "@last", "layers_to_patch": 0, "activation_type": "resid"}},
            "with {} for",
        ),
        ({"return_logit_diff": True}, "give base_dictonary_idxs"),
        ({"each": "head"}, "each must be"),
    ],
)
def test_patching_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "base_dataloader": [inputs("several")],
        "target_dataloader": [inputs("several")],
        "patching_query": {"patching_elem": "@last", "layers_to_patch": 0, "activation_type": "resid_in_{}"},
    }
    with pytest.raises(RequestError, match=message):
        face().compute_patching(["last"], **{**given, **options})


def test_a_sweep_of_requests_is_each_request_alone() -> None:
    model = face("llama")
    cells = [Intervention(activation=f"head_z_L{layer}H{head}") for layer in range(3) for head in range(4)]
    result = model.sweep(
        inputs("left"),
        cells,
        lambda logits: logits[:, 0, 3] - logits[:, 0, 5],
        axes={"layer": range(3), "head": range(4)},
        metric_positions=["last"],
    )
    alone = model.forward(inputs("left"), ["last"], interventions=[cells[6]])["logits"][:, 0]
    assert near(result.per_example()[1, 2], alone[:, 3] - alone[:, 5])
    with pytest.raises(RequestError, match="the axes have 4 entries"):
        model.sweep(inputs("left"), cells, lambda x: x[:, 0, 0], axes={"head": range(4)})
