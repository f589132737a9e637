"""This library's evidence and results as OpenAI's records, and the windows of their records back.

What their records have no place for (statistics beyond the moments, intervals, controls, causal effects) is
left out; what they ask for and we lack is null or empty, never made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence, Part
from neuron_lens.explain.formats.openai_records import (
    ActivationRecord,
    NeuronId,
    NeuronRecord,
    NeuronSimulationResults,
    ScoredExplanation,
    SequenceSimulation,
)
from neuron_lens.explain.formats.openai_scores import aggregate, score_sequence
from neuron_lens.explain.result import UnitResult
from neuron_lens.records import QuantileStratum, TokenWindow, Unit, UnitStatistics

__all__ = [
    "UNKNOWN_TOKEN",
    "activation_record",
    "neuron_record",
    "neuron_record_of_evidence",
    "part_of_record",
    "simulation_results",
]

UNKNOWN_TOKEN = -1  # the id of a token whose id the file does not say


def activation_record(window: TokenWindow) -> ActivationRecord:
    """A window as their record: tokens and activations."""
    return ActivationRecord(tokens=window.tokens, activations=window.activations)


def neuron_record(
    unit: Unit,
    statistics: UnitStatistics,
    *,
    top: Sequence[TokenWindow] = (),
    random: Sequence[TokenWindow] = (),
    strata: Sequence[QuantileStratum] = (),
) -> NeuronRecord:
    """A unit's windows and moments as their record.

    `top` are put in order, most active first; `strata` become `random_sample_by_quantile`, with their lower
    ends and the last upper end as `quantile_boundaries`. Without strata both are null.
    """
    ordered = sorted(strata, key=lambda stratum: stratum.index)
    return NeuronRecord(
        neuron_id=NeuronId(layer_index=unit.layer, neuron_index=unit.index),
        random_sample=_records(random),
        random_sample_by_quantile=tuple(_records(stratum.windows) for stratum in ordered) or None,
        quantile_boundaries=(*(stratum.low for stratum in ordered), ordered[-1].high) if ordered else None,
        mean=statistics.mean,
        variance=statistics.variance,
        skewness=statistics.skewness,
        kurtosis=statistics.kurtosis,
        most_positive_activation_records=_records(sorted(top, key=lambda window: -window.max_activation)),
    )


def neuron_record_of_evidence(evidence: Evidence) -> NeuronRecord:
    """All windows of a unit's evidence as their record.

    Their record knows no parts, and their split deals the windows anew: an explanation made from our train
    part must not be scored on their test split. The strata are those of the train part.
    """
    parts = [part for _, part in evidence.parts()]
    return neuron_record(
        evidence.unit,
        evidence.statistics,
        top=[window for part in parts for window in part.top],
        random=[window for part in parts for window in part.random],
        strata=evidence.train.strata,
    )


def simulation_results(result: UnitResult) -> NeuronSimulationResults:
    """A unit's explanation and its simulations of the test windows kept in the result, in true activations.

    The scores are theirs, over these windows only: a result keeps the windows it shows, and its own scores
    rest on more. Windows without a prediction are left out. The predictions are single values, so the
    distributions are empty. Raises RequestError when no window has a prediction.
    """
    scored = [
        score_sequence(
            SequenceSimulation(
                tokens=test.window.tokens,
                expected_activations=test.simulated,
                activation_scale="neuron_activations",
                distribution_values=(),
                distribution_probabilities=(),
            ),
            test.window.activations,
        )
        for test in result.test_windows
        if test.simulated is not None
    ]
    if not scored:
        raise RequestError(f"the result of {result.unit} holds no simulated test window; explain it anew")
    explanation = ScoredExplanation(
        explanation=result.explanation.sentence, scored_simulation=aggregate(scored)
    )
    return NeuronSimulationResults(
        neuron_id=NeuronId(layer_index=result.unit.layer, neuron_index=result.unit.index),
        scored_explanations=(explanation,),
    )


def part_of_record(record: NeuronRecord, token_id: Callable[[str], int] | None = None) -> Part:
    """The record's windows as ours. Their files do not say where a text comes from, or its token ids.

    Every distinct text becomes a document of its own, so that one in two of the lists is one window.
    `token_id` gives a token's id from its text (your tokenizer's vocabulary); without it, ids are
    UNKNOWN_TOKEN. Raises RequestError for records of token pairs or with missing activations.
    """
    unit = f"layer {record.neuron_id.layer_index}, index {record.neuron_id.neuron_index}"
    documents: dict[tuple[str, ...], int] = {}

    def windows(records: Iterable[ActivationRecord]) -> tuple[TokenWindow, ...]:
        return tuple(
            _window(one, documents.setdefault(one.tokens, len(documents)), unit, token_id) for one in records
        )

    top = windows(record.most_positive_activation_records)
    random = windows(record.random_sample)
    by_quantile = [windows(sample) for sample in record.random_sample_by_quantile or ()]
    return Part(top=top, random=random, strata=_strata(by_quantile, record.quantile_boundaries))


def _records(windows: Iterable[TokenWindow]) -> tuple[ActivationRecord, ...]:
    return tuple(activation_record(window) for window in windows)


def _window(
    record: ActivationRecord, document: int, unit: str, token_id: Callable[[str], int] | None
) -> TokenWindow:
    activations = tuple(value for value in record.activations if value is not None)
    if len(activations) != len(record.tokens) or not activations:
        raise RequestError(
            f"a record of {unit} holds {len(activations)} activations for {len(record.tokens)} tokens; a window "
            "needs one a token (records of attention heads are read with token_pairs)"
        )
    return TokenWindow(
        document=f"text {document} of {unit}",
        document_index=document,
        start=0,
        character_start=0,
        context_position=0,
        tokens=record.tokens,
        ids=tuple(UNKNOWN_TOKEN if token_id is None else token_id(token) for token in record.tokens),
        activations=activations,
    )


def _strata(
    samples: Sequence[tuple[TokenWindow, ...]], boundaries: Sequence[float | None] | None
) -> tuple[QuantileStratum, ...]:
    """Strata between the boundaries, where there is one more of them; else between the windows' own extremes."""
    edges = [edge for edge in boundaries or () if edge is not None]
    strata = []
    for index, sample in enumerate(samples):
        largest = [window.max_activation for window in sample]
        if len(edges) == len(samples) + 1:
            low, high = edges[index], edges[index + 1]
        elif largest:
            low, high = min(largest), max(largest)
        else:
            continue  # nothing says where an empty quantile lies
        strata.append(QuantileStratum(index=index, low=low, high=high, windows=sample))
    return tuple(strata)
