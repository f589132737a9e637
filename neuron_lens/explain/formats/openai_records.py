"""OpenAI's records of neurons, simulations and scores, under its class and field names.

The classes are those of openai/automated-interpretability and openai/transformer-debugger, with the names a
field or class once had. NaN, which their tools hold in memory and write as null, is `None` here. Unlike
theirs, records are checked: types, lengths, indices, unknown fields. Their JSON is in `openai_json`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, NonNegativeInt, Strict, model_validator

from neuron_lens.errors import RequestError
from neuron_lens.records import Record

__all__ = [
    "CLASSES",
    "KINDS",
    "ActivationRecord",
    "ActivationScale",
    "AttentionSimulation",
    "AttentionSimulationResults",
    "NeuronId",
    "NeuronRecord",
    "NeuronSimulationResults",
    "OpenAIRecord",
    "ScoredAttentionExplanation",
    "ScoredAttentionSimulation",
    "ScoredExplanation",
    "ScoredSequenceSimulation",
    "ScoredSimulation",
    "SequenceSimulation",
    "TokenLookupTableSummaryOfNeuron",
    "TokensAndWeights",
    "WeightBasedSummaryOfNeuron",
]

ActivationScale = Literal[
    "neuron_activations", "simulated_normalized_activations", "human_predicted_activations"
]


def _without_nan(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


Number = Annotated[float, Strict()]
Missing = Annotated[Number | None, BeforeValidator(_without_nan)]
Index = Annotated[NonNegativeInt, Field(description="counted from 0")]


class OpenAIRecord(Record):
    """Base of the classes: `renames` maps old field names to new ones, `dropped` are fields of the past."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renames: ClassVar[dict[str, str]] = {}
    dropped: ClassVar[frozenset[str]] = frozenset()
    former_names: ClassVar[tuple[str, ...]] = ()
    debugger_names: ClassVar[dict[str, str]] = {}  # names in the transformer debugger's dialect

    @model_validator(mode="before")
    @classmethod
    def _current_form(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            return value
        name = value.get("dataclass_name", cls.__name__)
        if name not in (cls.__name__, *cls.former_names):
            known = "" if str(name) in CLASSES else ", which is no known class"
            raise ValueError(f"dataclass_name is {name!r}{known}; {cls.__name__} is expected here")
        current = {}
        for key, content in value.items():
            new = cls.renames.get(key, key)
            if new in current:
                raise ValueError(f"{new} is given twice, under its own and an older name")
            if new != "dataclass_name" and new not in cls.dropped:
                current[new] = content
        return current


class NeuronId(OpenAIRecord):
    """Which neuron (or attention head, or latent): `neuron_index` counts within its layer."""

    renames: ClassVar[dict[str, str]] = {"layer": "layer_index", "idx": "neuron_index"}

    layer_index: Index
    neuron_index: Index


class ActivationRecord(OpenAIRecord):
    """A text as tokens, and the activations on it, unnormalised.

    One activation a token; or, for an attention head, one a token pair: row by row, every token's activations
    to the first tokens up to itself (or up to a largest number of them), so n (n + 1) / 2 for n tokens.
    """

    tokens: tuple[str, ...]
    activations: tuple[Missing, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        n, given = len(self.tokens), len(self.activations)
        if given != n and self._width() is None:
            raise ValueError(
                f"activations holds {given} values for {n} tokens; expected {n}, or {n * (n + 1) // 2} for the "
                "token pairs of an attention head"
            )
        return self

    def _width(self) -> int | None:
        """How many tokens the last token attends to at most, read as token pairs; None when it does not fit."""
        n = len(self.tokens)
        cut = n * (n + 1) // 2 - len(self.activations)  # the corner that is missing, a triangle itself
        if cut < 0:
            return None
        side = (math.isqrt(1 + 8 * cut) - 1) // 2
        return n - side if side * (side + 1) // 2 == cut and side < max(n, 1) else None

    @property
    def max_activation(self) -> float | None:
        """The largest activation; None without any."""
        return max((value for value in self.activations if value is not None), default=None)

    def token_pairs(self) -> tuple[tuple[Missing, ...], ...]:
        """Read as an attention head's: for every token, the activations to tokens 0, 1, ….

        Raises RequestError when the number of activations is not that of token pairs.
        """
        width = self._width()
        if width is None:
            raise RequestError(
                f"{len(self.activations)} activations are not those of the pairs of {len(self.tokens)} tokens"
            )
        rows, start = [], 0
        for place in range(len(self.tokens)):
            end = start + min(place + 1, width)
            rows.append(self.activations[start:end])
            start = end
        return tuple(rows)

    @classmethod
    def of_token_pairs(cls, tokens: tuple[str, ...], rows: tuple[tuple[Missing, ...], ...]) -> Self:
        """The record of an attention head: `rows[i][j]` is the activation of token i attending to token j."""
        return cls(tokens=tokens, activations=tuple(value for row in rows for value in row))


class NeuronRecord(OpenAIRecord):
    """What was collected of one neuron: its highest records, random ones, and moments over the corpus.

    `quantile_boundaries` are the edges of the quantiles that `random_sample_by_quantile` was drawn from.
    """

    neuron_id: NeuronId
    random_sample: tuple[ActivationRecord, ...] = ()
    random_sample_by_quantile: tuple[tuple[ActivationRecord, ...], ...] | None = None
    quantile_boundaries: tuple[Missing, ...] | None = None
    mean: Missing = None
    variance: Missing = None
    skewness: Missing = None
    kurtosis: Missing = None
    most_positive_activation_records: tuple[ActivationRecord, ...] = ()

    @property
    def max_activation(self) -> float | None:
        """The largest activation in the highest records; None without any."""
        values = (record.max_activation for record in self.most_positive_activation_records)
        return max((value for value in values if value is not None), default=None)


class SequenceSimulation(OpenAIRecord):
    """What an explanation predicts on one text: per token, an expected value and the distribution it is of.

    The two distribution lists have one list a token, or are empty where a simulator gives no distribution.
    """

    renames: ClassVar[dict[str, str]] = {"unit": "activation_scale"}
    dropped = frozenset({"response"})

    tokens: tuple[str, ...]
    expected_activations: tuple[Missing, ...]
    activation_scale: ActivationScale
    distribution_values: tuple[tuple[Missing, ...], ...]
    distribution_probabilities: tuple[tuple[Missing, ...], ...]
    uncalibrated_simulation: SequenceSimulation | None = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        _check_length("expected_activations", self.expected_activations, self.tokens)
        values = [len(row) for row in self.distribution_values]
        if values != [len(row) for row in self.distribution_probabilities]:
            raise ValueError("distribution_values and distribution_probabilities differ in their lengths")
        if values:
            _check_length("distribution_values", self.distribution_values, self.tokens)
        return self


class ScoredSequenceSimulation(OpenAIRecord):
    """A simulation of one text beside the true activations (unnormalised), with the scores on it alone."""

    renames: ClassVar[dict[str, str]] = {"sequence_simulation": "simulation"}
    debugger_names: ClassVar[dict[str, str]] = {"simulation": "sequence_simulation"}

    simulation: SequenceSimulation
    true_activations: tuple[Missing, ...]
    ev_correlation_score: Missing
    rsquared_score: Missing = None
    absolute_dev_explained_score: Missing = None

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        _check_length("true_activations", self.true_activations, self.simulation.tokens)
        return self


class ScoredSimulation(OpenAIRecord):
    """Simulations of several texts, with the scores over all their tokens together."""

    scored_sequence_simulations: tuple[ScoredSequenceSimulation, ...]
    ev_correlation_score: Missing = None
    rsquared_score: Missing = None
    absolute_dev_explained_score: Missing = None

    def get_preferred_score(self) -> float | None:
        """The correlation score; None where it is undefined."""
        return self.ev_correlation_score


class ScoredExplanation(OpenAIRecord):
    """An explanation and how well it predicts."""

    renames: ClassVar[dict[str, str]] = {"explanation_or_baseline": "explanation"}
    former_names = ("ScoredExplanationOrBaseline",)

    explanation: str
    scored_simulation: ScoredSimulation

    def get_preferred_score(self) -> float | None:
        """The correlation score; None where it is undefined."""
        return self.scored_simulation.get_preferred_score()


class NeuronSimulationResults(OpenAIRecord):
    """The scored explanations of one neuron: the one line of a published explanation file."""

    renames: ClassVar[dict[str, str]] = {"scored_explanation_or_baseline_list": "scored_explanations"}

    neuron_id: NeuronId
    scored_explanations: tuple[ScoredExplanation, ...]


class AttentionSimulation(OpenAIRecord):
    """Whether a head attends from one token to another: `token_pair_coords` is (from, to), the label 0 or 1."""

    tokens: tuple[str, ...]
    token_pair_coords: tuple[Index, Index]
    token_pair_label: Literal[0, 1]
    simulation_prediction: Missing

    @model_validator(mode="after")
    def _coords_are_tokens(self) -> Self:
        if max(self.token_pair_coords) >= len(self.tokens):
            raise ValueError(
                f"token_pair_coords {self.token_pair_coords} lie outside {len(self.tokens)} tokens"
            )
        return self


class ScoredAttentionSimulation(OpenAIRecord):
    """Predictions for several token pairs, and the area under their ROC curve."""

    attention_simulations: tuple[AttentionSimulation, ...]
    roc_auc_score: Missing = None

    def get_preferred_score(self) -> float | None:
        """The area under the ROC curve; None where it is undefined."""
        return self.roc_auc_score


class ScoredAttentionExplanation(OpenAIRecord):
    """An explanation of an attention head and how well it predicts."""

    explanation: str
    scored_attention_simulation: ScoredAttentionSimulation

    def get_preferred_score(self) -> float | None:
        """The area under the ROC curve; None where it is undefined."""
        return self.scored_attention_simulation.get_preferred_score()


class AttentionSimulationResults(OpenAIRecord):
    """The scored explanations of one attention head."""

    renames: ClassVar[dict[str, str]] = {"attention_id": "attention_head_id"}

    attention_head_id: NeuronId
    scored_explanations: tuple[ScoredAttentionExplanation, ...]


class TokenLookupTableSummaryOfNeuron(OpenAIRecord):
    """The tokens on which a neuron is most active on average."""

    tokens: tuple[str, ...]
    average_activations: tuple[Missing, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        _check_length("average_activations", self.average_activations, self.tokens)
        return self


class TokensAndWeights(OpenAIRecord):
    """Tokens with the strength of their connection to a neuron."""

    tokens: tuple[str, ...]
    strengths: tuple[Missing, ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        _check_length("strengths", self.strengths, self.tokens)
        return self


class WeightBasedSummaryOfNeuron(OpenAIRecord):
    """The tokens a neuron reads and writes, by its weights."""

    input_positive: TokensAndWeights
    input_negative: TokensAndWeights
    output_positive: TokensAndWeights
    output_negative: TokensAndWeights


def _check_length(field: str, values: tuple[Any, ...], tokens: tuple[str, ...]) -> None:
    if len(values) != len(tokens):
        raise ValueError(f"{field} holds {len(values)} values for {len(tokens)} tokens")


KINDS: tuple[type[OpenAIRecord], ...] = tuple(OpenAIRecord.__subclasses__())
CLASSES = {name: kind for kind in KINDS for name in (kind.__name__, *kind.former_names)}
