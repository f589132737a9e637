"""OpenAI's records go to JSON and back unchanged; files in all their forms are read; wrong ones are named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.openai_json import Dialect, dumps, loads, read_record, write_record
from neuron_lens.explain.formats.openai_records import (
    KINDS,
    ActivationRecord,
    AttentionSimulation,
    AttentionSimulationResults,
    NeuronId,
    NeuronRecord,
    NeuronSimulationResults,
    OpenAIRecord,
    ScoredAttentionExplanation,
    ScoredAttentionSimulation,
    ScoredExplanation,
    ScoredSequenceSimulation,
    ScoredSimulation,
    SequenceSimulation,
    TokenLookupTableSummaryOfNeuron,
    TokensAndWeights,
    WeightBasedSummaryOfNeuron,
)

numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
maybe = st.none() | numbers
texts = st.lists(st.text(max_size=4), max_size=4).map(tuple)
neuron_ids = st.builds(NeuronId, layer_index=st.integers(0, 99), neuron_index=st.integers(0, 99999))


def per_token(values: st.SearchStrategy[Any], n: int) -> st.SearchStrategy[Any]:
    return st.lists(values, min_size=n, max_size=n).map(tuple)


@st.composite
def activation_records(draw: st.DrawFn) -> ActivationRecord:
    tokens = draw(texts)
    n = len(tokens)
    return ActivationRecord(
        tokens=tokens, activations=draw(per_token(maybe, draw(st.sampled_from([n, n * (n + 1) // 2]))))
    )


@st.composite
def simulations(draw: st.DrawFn, deep: bool = True) -> SequenceSimulation:
    tokens = draw(texts)
    sizes = draw(st.just([]) | per_token(st.integers(0, 3), len(tokens)))
    return SequenceSimulation(
        tokens=tokens,
        expected_activations=draw(per_token(maybe, len(tokens))),
        activation_scale=draw(st.sampled_from(["neuron_activations", "simulated_normalized_activations"])),
        distribution_values=tuple(draw(per_token(numbers, size)) for size in sizes),
        distribution_probabilities=tuple(draw(per_token(numbers, size)) for size in sizes),
        uncalibrated_simulation=draw(st.none() | simulations(deep=False)) if deep else None,
    )


@st.composite
def scored_sequences(draw: st.DrawFn) -> ScoredSequenceSimulation:
    simulation = draw(simulations())
    return ScoredSequenceSimulation(
        simulation=simulation,
        true_activations=draw(per_token(maybe, len(simulation.tokens))),
        ev_correlation_score=draw(maybe),
        rsquared_score=draw(maybe),
    )


@st.composite
def attention_simulations(draw: st.DrawFn) -> AttentionSimulation:
    tokens = draw(st.lists(st.text(max_size=3), min_size=1, max_size=4).map(tuple))
    place = st.integers(0, len(tokens) - 1)
    return AttentionSimulation(
        tokens=tokens,
        token_pair_coords=draw(st.tuples(place, place)),
        token_pair_label=draw(st.sampled_from([0, 1])),
        simulation_prediction=draw(maybe),
    )


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=2).map(tuple)


neuron_records = st.builds(
    NeuronRecord,
    neuron_id=neuron_ids,
    random_sample=some(activation_records()),
    random_sample_by_quantile=st.none() | some(some(activation_records())),
    quantile_boundaries=st.none() | some(maybe),
    mean=maybe,
    variance=maybe,
    skewness=maybe,
    kurtosis=maybe,
    most_positive_activation_records=some(activation_records()),
)
scored_simulations = st.builds(
    ScoredSimulation, scored_sequence_simulations=some(scored_sequences()), ev_correlation_score=maybe
)
weights = texts.flatmap(
    lambda t: st.builds(TokensAndWeights, tokens=st.just(t), strengths=per_token(maybe, len(t)))
)
records: st.SearchStrategy[Any] = st.one_of(
    neuron_records,
    st.builds(
        NeuronSimulationResults,
        neuron_id=neuron_ids,
        scored_explanations=some(st.builds(ScoredExplanation, explanation=st.text(), scored_simulation=scored_simulations)),
    ),
    st.builds(
        AttentionSimulationResults,
        attention_head_id=neuron_ids,
        scored_explanations=some(
            st.builds(
                ScoredAttentionExplanation,
                explanation=st.text(),
                scored_attention_simulation=st.builds(
                    ScoredAttentionSimulation, attention_simulations=some(attention_simulations()), roc_auc_score=maybe
                ),
            )
        ),
    ),
    texts.flatmap(
        lambda t: st.builds(
            TokenLookupTableSummaryOfNeuron, tokens=st.just(t), average_activations=per_token(maybe, len(t))
        )
    ),
    st.builds(
        WeightBasedSummaryOfNeuron,
        input_positive=weights,
        input_negative=weights,
        output_positive=weights,
        output_negative=weights,
    ),
)  # fmt: skip


@given(records, st.sampled_from(["neuron_explainer", "transformer_debugger"]))
def test_what_is_written_is_read(record: OpenAIRecord, dialect: Dialect) -> None:
    text = dumps(record, dialect)
    assert loads(text) == record
    assert loads(text, type(record)) == record
    assert dumps(loads(text), dialect) == text


def without_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_names(content) for key, content in value.items() if key != "dataclass_name"}
    return [without_names(item) for item in value] if isinstance(value, list) else value


@given(neuron_records)
def test_files_without_class_names_are_read_by_their_fields(record: NeuronRecord) -> None:
    bare = without_names(json.loads(dumps(record)))
    assert loads(json.dumps(bare)) == record  # exactly its fields
    del bare["quantile_boundaries"], bare["kurtosis"]
    fewer = loads(json.dumps(bare))  # some of its fields, as files older than a field have
    assert fewer == record.model_copy(update={"quantile_boundaries": None, "kurtosis": None})


PUBLISHED = """{"dataclass_name": "NeuronSimulationResults", "neuron_id": {"dataclass_name": "NeuronId", "layer_index": 9,
"neuron_index": 6236}, "scored_explanations": [{"dataclass_name": "ScoredExplanation", "explanation": " numbers",
"scored_simulation": {"dataclass_name": "ScoredSimulation", "scored_sequence_simulations": [{"dataclass_name":
"ScoredSequenceSimulation", "simulation": {"dataclass_name": "SequenceSimulation", "tokens": [" a", " 4"],
"expected_activations": [0.5, 8.0], "activation_scale": "simulated_normalized_activations", "distribution_values":
[[0.0, 1.0], [8.0]], "distribution_probabilities": [[0.5, 0.5], [1.0]], "uncalibrated_simulation": null},
"true_activations": [-0.1, 3.0], "ev_correlation_score": 1.0, "rsquared_score": null,
"absolute_dev_explained_score": null}], "ev_correlation_score": 0.75, "rsquared_score": null,
"absolute_dev_explained_score": null}}]}""".replace("\n", " ")  # fmt: skip


def test_the_meaning_of_a_published_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "6236.jsonl"
    path.write_text(PUBLISHED + "\n")
    results = read_record(path, NeuronSimulationResults)
    assert results.neuron_id == NeuronId(layer_index=9, neuron_index=6236)
    assert results.scored_explanations[0].get_preferred_score() == 0.75
    write_record(tmp_path / "again.jsonl", results)
    again = (tmp_path / "again.jsonl").read_text()
    assert json.loads(again) == json.loads(PUBLISHED)
    assert again.count("\n") == 1


def test_names_of_the_debugger_and_of_the_past_are_read() -> None:
    debugger = PUBLISHED.replace('"simulation"', '"sequence_simulation"')
    past = (
        PUBLISHED.replace('"layer_index"', '"layer"').replace('"neuron_index"', '"idx"')
        .replace('"activation_scale"', '"response": "text", "unit"')
        .replace('"ScoredExplanation"', '"ScoredExplanationOrBaseline"')
        .replace('"explanation"', '"explanation_or_baseline"')
        .replace('"scored_explanations"', '"scored_explanation_or_baseline_list"')
    )  # fmt: skip
    assert debugger != PUBLISHED != past
    assert loads(debugger) == loads(past) == loads(PUBLISHED)
    assert json.loads(dumps(loads(past), "transformer_debugger")) == json.loads(debugger)


def test_nan_is_null_and_none() -> None:
    record = NeuronRecord(neuron_id=NeuronId(layer_index=0, neuron_index=0), mean=math.nan)
    assert record.mean is None
    assert json.loads(dumps(record))["mean"] is None
    assert loads(dumps(record).replace('"mean":null', '"mean":NaN')) == record


@given(st.integers(1, 6), st.data())
def test_token_pairs_are_rows_of_a_triangle(n: int, data: st.DataObject) -> None:
    width = data.draw(st.integers(1, n))
    rows = tuple(tuple(float(10 * i + j) for j in range(min(i + 1, width))) for i in range(n))
    record = ActivationRecord.of_token_pairs(tuple("t" * n), rows)
    assert record.token_pairs() == rows
    assert loads(dumps(record)) == record


HEAD = '{"neuron_id":{"layer_index":0,"neuron_index":1},'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"dataclass_name":"NeuronRecrd"}', "dataclass_name 'NeuronRecrd' is no known class; did you mean"),
        (HEAD + '"random_sample":[{"dataclass_name":"Foo","tokens":[],"activations":[]}]}',
         "random_sample.0: dataclass_name is 'Foo', which is no known class; ActivationRecord is expected"),
        (HEAD + '"random_sample":[{"tokens":["a","b","c"],"activations":[1,2]}]}',
         "random_sample.0: activations holds 2 values for 3 tokens"),
        ('{"neuron_id":{"layer_index":-1,"neuron_index":1},"mean":0}', "neuron_id.layer_index"),
        ('{"neuron_id":{"layer":0,"layer_index":1,"neuron_index":1},"mean":0}', "layer_index is given twice"),
        (HEAD + '"mean":"0.5"}', "mean: Input should be a valid number"),
        (HEAD + '"mean":Infinity}', "holds Infinity"),
        (HEAD + '"random_sample":[{"tokens":["a"', r"file\.json is not JSON at line 1.*cut off"),
        ('{"tokens":["a"]}', "may be any of ActivationRecord"),
        ('{"colour":"red"}', "no class has the fields colour"),
        ("[1]", "a JSON list; expected an object"),
        ('{"dataclass_name":"AttentionSimulation","tokens":["a"],"token_pair_coords":[0,1],"token_pair_label":1,'
         '"simulation_prediction":0.5}', "lie outside 1 tokens"),
        ('{"dataclass_name":"NeuronRecord","neuron_id":{"layer_index":0,"neuron_index":1},"colour":1}', "colour"),
    ],
)  # fmt: skip
def test_wrong_files_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=said) as caught:
        read_record(path)
    assert "file.json" in str(caught.value)


def test_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text(PUBLISHED + "\n" + PUBLISHED)
    with pytest.raises(RequestError, match="2 records; expected exactly one line"):
        read_record(path)
    path.write_text("\n" + PUBLISHED[:200])
    with pytest.raises(RequestError, match="line 2 is not JSON at character"):
        read_record(path)
    with pytest.raises(RequestError, match="there is no file"):
        read_record(tmp_path / "absent.json")


def test_every_class_has_an_example_here() -> None:
    drawn = {NeuronRecord, NeuronSimulationResults, AttentionSimulationResults, WeightBasedSummaryOfNeuron}
    drawn |= {
        TokenLookupTableSummaryOfNeuron,
        NeuronId,
        ActivationRecord,
        SequenceSimulation,
        TokensAndWeights,
    }
    drawn |= {ScoredExplanation, ScoredSimulation, ScoredSequenceSimulation, AttentionSimulation}
    drawn |= {ScoredAttentionSimulation, ScoredAttentionExplanation}
    assert drawn == set(KINDS)


@given(neuron_records, st.data())
def test_a_file_cut_anywhere_is_an_error_that_names_it(record: NeuronRecord, data: st.DataObject) -> None:
    text = dumps(record)
    cut = data.draw(st.integers(1, len(text) - 1))
    with pytest.raises(RequestError, match=r"the file is not JSON at line 1, character \d+: .*cut off"):
        loads(text[:cut], place="the file")
