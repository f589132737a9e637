"""Neuronpedia's batches and import folders: what is written is read, and a file's meaning is kept."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report.samples import many_results, unit_result

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.neuronpedia import (
    DashboardActivation,
    DashboardBatch,
    DashboardFeature,
    dashboard_batch,
    dashboard_feature,
    read_batch,
    write_batch,
)
from neuron_lens.explain.formats.neuronpedia_export import (
    ExportActivation,
    ExportExplanation,
    ExportFeature,
    ExportFolder,
    export_activations,
    export_explanation,
    export_features,
)

PUBLISHED: dict[str, Any] = {
    "model_id": "gpt2-small",
    "layer": 8,
    "sae_set": "res-jb",
    "sae_id_suffix": None,
    "features": [
        {
            "feature_index": 12,
            "neuron_alignment_indices": [1, 2], "neuron_alignment_values": [0.1, 0.2],
            "neuron_alignment_l1": [0.3, 0.4], "correlated_neurons_indices": [4],
            "correlated_neurons_pearson": [0.7], "correlated_neurons_l1": [0.8],
            "correlated_features_indices": [9], "correlated_features_pearson": [0.6],
            "correlated_features_l1": [0.5], "neg_str": ["bad"], "neg_values": [-1.2], "pos_str": ["good"],
            "pos_values": [1.4], "frac_nonzero": 0.25, "freq_hist_data_bar_heights": [1, 2],
            "freq_hist_data_bar_values": [0.1, 0.2], "logits_hist_data_bar_heights": [3.0, 4.0],
            "logits_hist_data_bar_values": [0.3, 0.4], "n_prompts_total": 24576, "n_tokens_in_prompt": 128,
            "dataset": "openwebtext", "decoder_weights_dist": [0.9, 1.1], "vector": [0.25, -0.5],
            "activations": [
                {"bin_min": -1, "bin_max": 1.5, "bin_contains": -1, "tokens": ["hello", " world"],
                 "values": [0.25, 1.5], "qualifying_token_index": 1},
                {"bin_min": 0.0, "bin_max": 0.5, "bin_contains": 0.9, "tokens": ["a"], "values": [0.5],
                 "qualifying_token_index": 0, "dfa_values": [0.1], "dfa_maxValue": 0.1, "dfa_targetIndex": 0,
                 "loss_values": [1.25]},
            ],
        }
    ],
}  # fmt: skip

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)


@st.composite
def activations(draw: st.DrawFn) -> DashboardActivation:
    tokens = draw(st.lists(st.text(max_size=3), min_size=1, max_size=4).map(tuple))
    n = len(tokens)
    dfa = draw(st.booleans())
    attribution = {
        "dfa_values": (0.5,) * n,
        "dfa_maxValue": 0.5,
        "dfa_targetIndex": draw(st.integers(0, n - 1)),
    }
    return DashboardActivation(
        bin_min=draw(numbers),
        tokens=tokens,
        values=draw(st.lists(numbers, min_size=n, max_size=n).map(tuple)),
        qualifying_token_index=draw(st.integers(0, n - 1)),
        **(attribution if dfa else {}),
    )


tables = st.lists(st.tuples(st.text(max_size=3), numbers), max_size=3)
features = st.builds(
    lambda index, table, vector, texts: DashboardFeature(
        feature_index=index,
        pos_str=tuple(text for text, _ in table),
        pos_values=tuple(value for _, value in table),
        vector=vector,
        activations=texts,
    ),
    st.integers(0, 10**6),
    tables,
    st.lists(numbers, max_size=3).map(tuple),
    st.lists(activations(), max_size=3).map(tuple),
)
batches = st.builds(
    DashboardBatch,
    model_id=st.text(max_size=5),
    layer=st.integers(0, 99),
    sae_set=st.text(max_size=5),
    sae_id_suffix=st.none() | st.text(max_size=5),
    features=st.lists(features, max_size=3).map(tuple),
)


@given(batches)
@settings(max_examples=30)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, batch: DashboardBatch) -> None:
    path = tmp_path_factory.mktemp("batch") / "batch-0.json"
    write_batch(path, batch)
    assert read_batch(path) == batch
    first = path.read_bytes()
    write_batch(path, read_batch(path))
    assert path.read_bytes() == first


def test_the_meaning_of_a_published_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "batch-0.json"
    path.write_text(json.dumps(PUBLISHED))
    batch = read_batch(path)
    assert batch.source_id == "8-res-jb"
    assert batch.features[0].activations[1].dfa_maxValue == 0.1
    write_batch(path, batch)
    assert json.loads(path.read_text()) == PUBLISHED  # also the field that is not ours


def test_a_result_becomes_a_dashboard(tmp_path: Path) -> None:
    result = unit_result()
    batch = dashboard_batch([result], sae_set="neurons", model_id="pico-v1", sae_id_suffix="x")
    assert (batch.model_id, batch.source_id) == ("pico-v1", "2-neurons__x")
    (feature,) = batch.features
    top = [text for text in feature.activations if text.bin_contains == -1]
    assert [text.values for text in top] == [window.activations for window in result.train_top]
    assert {text.bin_min for text in top} == {-1.0}
    for text in feature.activations:
        assert text.qualifying_token_index is not None
        assert text.values[text.qualifying_token_index] == max(text.values)
    strata = {(s.low, s.high): len(s.windows) for s in result.strata if s.windows}
    rest = [(text.bin_min, text.bin_max) for text in feature.activations if text not in top]
    assert {bounds: rest.count(bounds) for bounds in set(rest)} == strata
    assert feature.pos_str == tuple(entry.token for entry in result.promoted)
    assert feature.neg_values == tuple(entry.value for entry in result.suppressed)
    assert min(feature.freq_hist_data_bar_values) > 0
    assert sum(feature.freq_hist_data_bar_heights) <= sum(result.statistics.histogram.counts)
    write_batch(tmp_path / "batch-0.json", batch)
    assert read_batch(tmp_path / "batch-0.json") == batch
    written = json.loads((tmp_path / "batch-0.json").read_text())["features"][0]
    known = PUBLISHED["features"][0].keys()
    assert known - written.keys() == {"frac_nonzero"}  # a density above a threshold is another figure
    assert written["correlated_features_indices"] == written["vector"] == []


def test_density_above_zero_is_the_share_that_is_not_zero() -> None:
    result = unit_result()
    statistics = result.statistics.model_copy(update={"firing_threshold": 0.0})
    feature = dashboard_feature(result.model_copy(update={"statistics": statistics}))
    assert feature.frac_nonzero == statistics.density


def test_a_batch_is_of_one_layer() -> None:
    with pytest.raises(RequestError, match=r"pico, layer 1, .*; pico, layer 2"):
        dashboard_batch(many_results(2), sae_set="neurons")
    with pytest.raises(RequestError, match="nothing"):
        dashboard_batch([], sae_set="neurons")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["activations"][0].update(values=[1.0]), r"features\.0\.activations\.0: values holds 1 .* 2 tokens"),
        (lambda f: f["activations"][0].update(qualifying_token_index=2), "qualifying_token_index is 2 for 2 tokens"),
        (lambda f: f["activations"][0].update(qualifying_token_index=-1), r"activations\.0\.qualifying_token_index"),
        (lambda f: f["activations"][1].update(dfa_values=[1.0, 2.0]), "dfa_values holds 2 values for 1 tokens"),
        (lambda f: f.update(feature_index=-1), r"features\.0\.feature_index"),
        (lambda f: f.update(pos_values=[1.0, 2.0]), r"features\.0: .* pos_str has 1, pos_values has 2"),
        (lambda f: f.update(correlated_neurons_indices=[-4]), r"features\.0\.correlated_neurons_indices\.0"),
    ],
)  # fmt: skip
def test_wrong_batches_are_named(tmp_path: Path, change: Any, said: str) -> None:
    wrong = json.loads(json.dumps(PUBLISHED))
    change(wrong["features"][0])
    path = tmp_path / "batch-7.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(RequestError, match=said) as caught:
        read_batch(path)
    assert "batch-7.json" in str(caught.value)
    path.write_text(json.dumps(PUBLISHED)[:-20])
    with pytest.raises(RequestError, match=r"batch-7\.json is not JSON .* cut off"):
        read_batch(path)


@given(batches)
@settings(max_examples=20)
def test_an_export_holds_what_the_batch_does(
    tmp_path_factory: pytest.TempPathFactory, batch: DashboardBatch
) -> None:
    folder = ExportFolder(tmp_path_factory.mktemp("exports"), "model", "0-set")
    batch = batch.model_copy(
        update={"model_id": "model", "layer": 0, "sae_set": "set", "sae_id_suffix": None}
    )
    units, texts = export_features(batch, creator_id="me"), export_activations(batch)
    assert [(int(unit.index), unit.pos_values, unit.vector) for unit in units] == [
        (feature.feature_index, feature.pos_values, feature.vector) for feature in batch.features
    ]
    shown = [text for feature in batch.features for text in feature.activations]
    assert [(row.tokens, row.values, row.maxValue) for row in texts] == [
        (text.tokens, text.values, max(text.values)) for text in shown
    ]
    if units:
        folder.write(0, units[:1])
        folder.write(10, units[1:2] or units[:1])
        folder.write(2, units[:1], compress=False)
        expected = [units[0], units[0], units[1] if len(units) > 1 else units[0]]
        assert list(folder.features()) == expected  # batches in order of number, plain and gzipped
    if texts:
        path = folder.write(0, texts)
        assert list(folder.activations()) == list(texts)
        written = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        assert all(row.keys() == ExportActivation.model_fields.keys() for row in written)


def test_explanations_and_metadata(tmp_path: Path) -> None:
    result = unit_result()
    batch = dashboard_batch([result], sae_set="neurons")
    folder = ExportFolder(tmp_path, batch.model_id, batch.source_id)
    row = export_explanation(result, batch, author_id="me")
    assert (row.index, row.description, row.typeName) == (
        "17",
        result.explanation.sentence,
        "token_statistics",
    )
    assert row.embedding is None and row.explanationModelName is None and row.scoreV1 is None
    path = folder.write(0, [row])
    assert path == tmp_path / "pico" / "2-neurons" / "explanations" / "batch-0.jsonl.gz"
    assert list(folder.explanations()) == [row]
    first = path.read_bytes()
    assert first[4:8] == b"\0\0\0\0"  # no time of writing in the gzip header
    assert folder.write(0, [export_explanation(result, batch, author_id="me")]).read_bytes() == first
    folder.write_metadata("model", {"id": "pico", "layers": 4})
    assert folder.metadata("model") == {"id": "pico", "layers": 4}
    with pytest.raises(RequestError, match="there is no file"):
        folder.metadata("release")


def test_rows_of_neuronpedia_itself_are_kept(tmp_path: Path) -> None:
    """A database's dump: null columns, a number for the index, columns that came later."""
    folder = ExportFolder(tmp_path, "gpt2-small", "8-res-jb")
    (folder.path / "features").mkdir(parents=True)
    line = {"modelId": "gpt2-small", "layer": "8-res-jb", "index": "12", "maxActApprox": 3.5, "hasVector": False,
            "umap_x": None, "topkCosSimIndices": [1], "topkCosSimValues": [0.5]}  # fmt: skip
    path = folder.path / "features" / "batch-0.jsonl"
    path.write_text(json.dumps(line) + "\n\n" + json.dumps({**line, "index": 13}) + "\n")
    one, two = folder.features()
    assert isinstance(one, ExportFeature) and (one.index, two.index) == ("12", "13")
    assert one.as_json() == line
    for wrong, said in (
        ({**line, "index": -1}, r"batch-0\.jsonl, line 2 is not a ExportFeature: index"),
        ({**line, "frac_nonzero": "many"}, r"batch-0\.jsonl, line 2 .* frac_nonzero"),
    ):
        path.write_text(json.dumps(line) + "\n" + json.dumps(wrong))
        with pytest.raises(RequestError, match=said):
            list(folder.features())
    path.write_text(json.dumps(line) + "\n" + json.dumps(line)[:-4])
    with pytest.raises(RequestError, match=r"line 2 is not JSON .* cut off"):
        list(folder.features())
    cut = gzip.compress((json.dumps(line) * 50).encode())[:-12]
    path.unlink()
    path.with_name("batch-0.jsonl.gz").write_bytes(cut)
    with pytest.raises(RequestError, match=r"batch-0\.jsonl\.gz is cut off"):
        list(folder.features())


def test_wrong_rows_are_not_written(tmp_path: Path) -> None:
    folder = ExportFolder(tmp_path, "m", "0-s")
    row = ExportExplanation(modelId="m", layer="0-s", index="1", id="a", description="b")
    unit = ExportFeature(modelId="m", layer="0-s", index="1")
    for rows, said in (
        ([row, unit], "ExportExplanation, ExportFeature"),
        ([], "no rows"),
        ([row.model_copy(update={"layer": "1-s"})], "m, 1-s does not belong"),
    ):
        with pytest.raises(RequestError, match=said):
            folder.write(0, rows)
    folder.write(0, [unit])
    folder.write(0, [unit], compress=False)
    with pytest.raises(RequestError, match="batch twice"):
        list(folder.features())
