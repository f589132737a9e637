"""Our evidence and results as OpenAI's records and back; the published tree of files under a local root."""

from __future__ import annotations

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from report.samples import unit_result

from explain.test_evidence import evidence, statistics, window
from neuron_lens.errors import CheckpointError, RequestError
from neuron_lens.explain.evidence import Part, strata_of
from neuron_lens.explain.formats.openai_json import write_record
from neuron_lens.explain.formats.openai_paths import DATASETS, PUBLIC_ROOT, PublishedTree
from neuron_lens.explain.formats.openai_records import (
    ActivationRecord,
    NeuronId,
    NeuronRecord,
    TokenLookupTableSummaryOfNeuron,
)
from neuron_lens.explain.formats.openai_results import (
    UNKNOWN_TOKEN,
    neuron_record,
    neuron_record_of_evidence,
    part_of_record,
    simulation_results,
)
from neuron_lens.explain.formats.openai_scores import ev_correlation_score, rsquared_score
from neuron_lens.records import TokenWindow, Unit


def named(document: int, *activations: float) -> TokenWindow:
    """A window whose tokens say which one it is."""
    tokens = tuple(f"{document}.{i}" for i in range(len(activations)))
    return window(document, 0, activations).model_copy(update={"tokens": tokens})


def test_windows_come_back_from_their_record() -> None:
    random = tuple(named(i, 0.1 * i, 0.3 * i) for i in range(6))
    top = (random[5], named(8, 4.0), named(7, 9.0))
    strata = strata_of(random, 0.0, 2)
    record = neuron_record(Unit(layer=3, index=4), statistics(), top=top, random=random, strata=strata)
    assert record.neuron_id == NeuronId(layer_index=3, neuron_index=4)
    assert (record.mean, record.variance, record.skewness) == (0.1, 1.0, None)
    assert record.max_activation == 9.0
    assert [one.max_activation for one in record.most_positive_activation_records] == [9.0, 4.0, 1.5]
    part = part_of_record(record, token_id=lambda text: len(text))
    seen = [(one.tokens, one.activations) for one in part.random]
    assert seen == [(one.tokens, one.activations) for one in random]
    assert [(s.low, s.high, len(s.windows)) for s in part.strata] == [
        (s.low, s.high, len(s.windows)) for s in strata
    ]
    assert part.top[2] == part.random[5]  # one text is one window, whichever list it is in
    assert len(part.windows) == 8
    assert part.random[0].ids == (3, 3)
    assert part_of_record(record).random[0].ids == (UNKNOWN_TOKEN, UNKNOWN_TOKEN)


def test_evidence_of_all_parts_is_in_the_record() -> None:
    parts = {name: Part(top=(named(i, 1.0 + i),), random=(named(10 + i, 0.0),)) for i, name in enumerate(
        ("train", "validation", "test"))}  # fmt: skip
    record = neuron_record_of_evidence(evidence(**parts))
    assert [one.max_activation for one in record.most_positive_activation_records] == [3.0, 2.0, 1.0]
    assert len(record.random_sample) == 3
    assert record.random_sample_by_quantile is None and record.quantile_boundaries is None


def test_quantiles_without_outer_boundaries_lie_between_their_own_windows() -> None:
    quantiles = ((ActivationRecord(tokens=("a",), activations=(1.0,)),), ())
    record = NeuronRecord(
        neuron_id=NeuronId(layer_index=0, neuron_index=0), random_sample_by_quantile=quantiles,
        quantile_boundaries=(0.5,),
    )  # fmt: skip
    (only,) = part_of_record(record).strata
    assert (only.low, only.high) == (1.0, 1.0)


def test_token_pairs_are_no_windows() -> None:
    head = ActivationRecord(tokens=("a", "b"), activations=(1.0, 2.0, 3.0))
    record = NeuronRecord(neuron_id=NeuronId(layer_index=1, neuron_index=2), random_sample=(head,))
    with pytest.raises(RequestError, match="3 activations for 2 tokens"):
        part_of_record(record)


def test_a_result_becomes_scored_simulations_of_the_windows_it_shows() -> None:
    result = unit_result()
    results = simulation_results(result)
    (explanation,) = results.scored_explanations
    shown = [test for test in result.test_windows if test.simulated is not None]
    assert len(shown) < len(result.test_windows)  # the missing prediction is left out
    scored = explanation.scored_simulation.scored_sequence_simulations
    assert [one.simulation.tokens for one in scored] == [test.window.tokens for test in shown]
    true = [value for test in shown for value in test.window.activations]
    predicted = [value for test in shown for value in test.simulated or ()]
    assert explanation.get_preferred_score() == ev_correlation_score(true, predicted)
    assert explanation.scored_simulation.rsquared_score == rsquared_score(true, predicted)
    nothing = result.model_copy(update={"test_windows": ()})
    with pytest.raises(RequestError, match="no simulated test window"):
        simulation_results(nothing)


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_the_published_tree_under_a_local_root(tmp_path: Path, dataset: str) -> None:
    tree = PublishedTree(tmp_path, dataset)
    record = NeuronRecord(neuron_id=NeuronId(layer_index=2, neuron_index=3), mean=0.5)
    assert tree.write(record) == tree.activations_path(2, 3)
    assert tree.neuron_record(2, 3) == record
    public = PublishedTree(dataset=dataset).activations_path(2, 3)
    assert public == f"{PUBLIC_ROOT}/{Path(tree.activations_path(2, 3)).relative_to(tmp_path).as_posix()}"


def test_paths_are_the_published_ones(tmp_path: Path) -> None:
    xl, small = PublishedTree("az://openaipublic/neuron-explainer"), PublishedTree(dataset="gpt2-small")
    assert (
        xl.activations_path(9, 6236)
        == "az://openaipublic/neuron-explainer/data/collated-activations/9/6236.json"
    )
    assert xl.explanations_path(9, 6236).endswith("/data/explanations/9/6236.jsonl")
    assert xl.related_tokens_path(0, 1, "weight").endswith("/data/related-tokens/weight-based/0/1.json")
    assert xl.related_neurons_path(0, 1).endswith("/data/related-neurons/weight-based/0/1.json")
    assert small.explanations_path(0, 1) == f"{PUBLIC_ROOT}/gpt2_small_data/explanations/0/1.jsonl"
    latents = PublishedTree(dataset="gpt2-small-resid_delta_attn_v4-by-token-pair").activations_path(0, 1)
    assert latents.endswith(
        "/gpt2_small/autoencoder_latent/resid_delta_attn_v4/collated-activations-by-token-pair/0/1.json"
    )
    mirror = PublishedTree(tmp_path)
    table = TokenLookupTableSummaryOfNeuron(tokens=("a",), average_activations=(1.0,))
    write_record(mirror.related_tokens_path(1, 2, "activation"), table)
    assert mirror.lookup_tokens(1, 2) == table
    results = simulation_results(unit_result())
    written = Path(mirror.write(results))
    assert written == tmp_path / "data" / "explanations" / "2" / "17.jsonl"
    assert mirror.simulation_results(2, 17) == results
    assert json.loads(written.read_text())["dataclass_name"] == "NeuronSimulationResults"


def test_units_that_were_not_published_are_refused(tmp_path: Path) -> None:
    record = NeuronRecord(neuron_id=NeuronId(layer_index=0, neuron_index=0))
    small = PublishedTree(tmp_path, "gpt2-small")
    for wrong, said in (
        (lambda: small.activations_path(0, 3072), "index 3072 .* 0 to 3071"),
        (lambda: small.activations_path(-1, 0), "layer -1"),
        (lambda: small.related_tokens_path(0, 0, "weight"), "no related_tokens; these have: gpt2-xl"),
        (lambda: PublishedTree(dataset="gpt2-smal").activations_path(0, 0), "did you mean 'gpt2-small'"),
        (lambda: PublishedTree().write(record), "give a local folder"),
    ):
        with pytest.raises(RequestError, match=said):
            wrong()


def test_the_tree_is_read_from_a_web_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_LENS_CACHE", str(tmp_path / "cache"))
    results = simulation_results(unit_result())
    PublishedTree(tmp_path / "site").write(results)
    handler = partial(QuietHandler, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        tree = PublishedTree(f"http://127.0.0.1:{server.server_port}")
        assert tree.simulation_results(2, 17) == results
        with pytest.raises(CheckpointError, match="there is no file http"):
            tree.neuron_record(2, 17)
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder, and says nothing."""

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
