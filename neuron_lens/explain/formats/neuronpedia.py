"""Neuronpedia's batch JSON, as SAEDashboard writes it: the dashboards of several units of one layer.

    {"model_id", "layer", "sae_set", "sae_id_suffix", "features": [{"feature_index", …, "activations": […]}]}

Fields that a version of SAEDashboard adds are kept and written back; a field that a file leaves out stays out.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import NonNegativeInt, model_validator

from neuron_lens.errors import RequestError
from neuron_lens.explain.formats.json_file import ForeignRecord, read_json, validate, write_json
from neuron_lens.explain.result import UnitResult
from neuron_lens.records import Histogram, TokenWindow

__all__ = [
    "TOP_GROUP",
    "DashboardActivation",
    "DashboardBatch",
    "DashboardFeature",
    "FeatureTables",
    "dashboard_batch",
    "dashboard_feature",
    "read_batch",
    "write_batch",
]

TOP_GROUP = -1.0  # bin_min and bin_contains of the group of the highest activations

Numbers = tuple[float, ...]
Indices = tuple[NonNegativeInt, ...]


class DashboardActivation(ForeignRecord):
    """One text of a group, with the unit's activation at each token.

    The group holds texts whose activation lies between `bin_min` and `bin_max`, as `bin_contains` of the
    tokens do; `qualifying_token_index` is the token for which the text was chosen. `dfa_*` is the direct
    feature attribution of latents of attention, absent otherwise.
    """

    bin_min: float = 0.0
    bin_max: float = 0.0
    bin_contains: float | None = None
    tokens: tuple[str, ...] = ()
    values: Numbers = ()
    qualifying_token_index: NonNegativeInt | None = None
    dfa_values: Numbers | None = None
    dfa_maxValue: float | None = None
    dfa_targetIndex: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _one_value_a_token(self) -> Self:
        n = len(self.tokens)
        for name, values in (("values", self.values), ("dfa_values", self.dfa_values or self.values)):
            if len(values) != n:
                raise ValueError(f"{name} holds {len(values)} values for {n} tokens")
        for name in ("qualifying_token_index", "dfa_targetIndex"):
            index = getattr(self, name)
            if n and index is not None and index >= n:
                raise ValueError(f"{name} is {index} for {n} tokens")
        return self


class FeatureTables(ForeignRecord):
    """The tables and histograms of a unit. Lists of one table have one length, or are empty where there is none.

    Attributes:
        neuron_alignment_*: neurons most aligned with the unit's decoder direction; `l1` is the share of its norm.
        correlated_neurons_*, correlated_features_*: the most correlated ones (`l1`: the cosine).
        neg_*, pos_*: the next tokens the unit lowers and raises most, and by how much.
        frac_nonzero: the share of tokens on which the unit is not zero, 0 to 1.
        freq_hist_data_*: histogram of the activations that are not zero: centres of bars, and counts.
        logits_hist_data_*: histogram of the unit's effects on all tokens' logits.
        decoder_weights_dist: of an attention latent, the share of each head in its decoder norm.
        vector: the unit's direction.
    """

    neuron_alignment_indices: Indices = ()
    neuron_alignment_values: Numbers = ()
    neuron_alignment_l1: Numbers = ()
    correlated_neurons_indices: Indices = ()
    correlated_neurons_l1: Numbers = ()
    correlated_neurons_pearson: Numbers = ()
    correlated_features_indices: Indices = ()
    correlated_features_l1: Numbers = ()
    correlated_features_pearson: Numbers = ()
    neg_str: tuple[str, ...] = ()
    neg_values: Numbers = ()
    pos_str: tuple[str, ...] = ()
    pos_values: Numbers = ()
    frac_nonzero: float | None = None
    freq_hist_data_bar_values: Numbers = ()
    freq_hist_data_bar_heights: Numbers = ()
    logits_hist_data_bar_heights: Numbers = ()
    logits_hist_data_bar_values: Numbers = ()
    decoder_weights_dist: Numbers = ()
    vector: Numbers = ()

    @model_validator(mode="after")
    def _tables_are_whole(self) -> Self:
        for table, names in _TABLES.items():
            lengths = {name: len(getattr(self, name)) for name in names}
            if len({length for length in lengths.values() if length}) > 1:
                said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
                raise ValueError(f"the lists of {table} differ in length: {said}")
        return self


# table -> the fields that are its columns
_TABLES: dict[str, list[str]] = {
    table: [name for name in FeatureTables.model_fields if name.startswith(f"{table}_")]
    for table in (
        "neuron_alignment",
        "correlated_neurons",
        "correlated_features",
        "neg",
        "pos",
        "freq_hist_data",
        "logits_hist_data",
    )
}


class DashboardFeature(FeatureTables):
    """The dashboard of one unit: its tables, what they are from, and texts.

    `n_prompts_total` texts of `dataset` were read, each `n_tokens_in_prompt` long.
    """

    feature_index: NonNegativeInt
    n_prompts_total: NonNegativeInt = 0
    n_tokens_in_prompt: NonNegativeInt = 0
    dataset: str = ""
    activations: tuple[DashboardActivation, ...] = ()


class DashboardBatch(ForeignRecord):
    """The dashboards of several units of one layer: the content of a `batch-<n>.json`."""

    model_id: str
    layer: NonNegativeInt
    sae_set: str = ""
    sae_id_suffix: str | None = None
    features: tuple[DashboardFeature, ...] = ()

    @property
    def source_id(self) -> str:
        """Neuronpedia's name of the layer's units: "{layer}-{set}", and "__{suffix}" where there is one."""
        return f"{self.layer}-{self.sae_set}" + (f"__{self.sae_id_suffix}" if self.sae_id_suffix else "")


def read_batch(path: Path | str) -> DashboardBatch:
    """Read a batch file. Raises RequestError, naming the field, when it is none."""
    return validate(DashboardBatch, read_json(path), str(path))


def write_batch(path: Path | str, batch: DashboardBatch) -> None:
    """Write a batch file, atomically."""
    write_json(path, batch.as_json())


def dashboard_batch(
    results: Sequence[UnitResult],
    *,
    sae_set: str,
    model_id: str | None = None,
    sae_id_suffix: str | None = None,
) -> DashboardBatch:
    """The dashboards of results of one model and layer.

    `model_id` is the model's name on Neuronpedia; without it, the name it was explained under. Raises
    RequestError for results of several models, layers or kinds of unit, or none.
    """
    groups = {(result.model.name, result.unit.layer, result.unit.site) for result in results}
    if len(groups) != 1:
        found = (
            "; ".join(f"{model}, layer {layer}, {site}" for model, layer, site in sorted(groups)) or "nothing"
        )
        raise RequestError(f"a batch holds units of one model, layer and site; these are of {found}")
    model, layer, _ = groups.pop()
    return DashboardBatch(
        model_id=model if model_id is None else model_id,
        layer=layer,
        sae_set=sae_set,
        sae_id_suffix=sae_id_suffix,
        features=tuple(dashboard_feature(result) for result in results),
    )


def dashboard_feature(result: UnitResult) -> DashboardFeature:
    """A unit's dashboard from its result.

    Groups: the highest training windows (bin -1), then every stratum with its bounds; `bin_contains` of a
    stratum is left out, since our strata hold equal numbers of windows and not a share of the tokens. The
    frequency histogram holds the bins that lie above zero. `frac_nonzero` is the density where firing means
    "above zero", and is left out elsewhere. What a result does not hold is empty: alignment, correlated units,
    the logit histogram, the decoder's distribution, the vector.
    """
    statistics = result.statistics
    centres, counts = _above_zero(statistics.histogram)
    top = [_activation(window, TOP_GROUP, statistics.maximum, TOP_GROUP) for window in result.train_top]
    others = [
        _activation(window, stratum.low, stratum.high, None)
        for stratum in result.strata
        for window in stratum.windows
    ]
    known: dict[str, Any] = {
        name: () for name, field in DashboardFeature.model_fields.items() if field.default == ()
    }
    known |= {
        "neg_str": tuple(entry.token for entry in result.suppressed),
        "neg_values": tuple(entry.value for entry in result.suppressed),
        "pos_str": tuple(entry.token for entry in result.promoted),
        "pos_values": tuple(entry.value for entry in result.promoted),
        "freq_hist_data_bar_values": centres,
        "freq_hist_data_bar_heights": counts,
        "activations": (*top, *others),
    }
    if statistics.firing_threshold == 0:
        known["frac_nonzero"] = statistics.density
    return DashboardFeature(
        feature_index=result.unit.index,
        n_prompts_total=result.run.n_documents,
        n_tokens_in_prompt=result.run.row_length,
        dataset=result.run.corpus,
        **known,
    )


def _activation(window: TokenWindow, low: float, high: float, contains: float | None) -> DashboardActivation:
    share = {} if contains is None else {"bin_contains": contains}
    return DashboardActivation(
        bin_min=low,
        bin_max=high,
        tokens=window.tokens,
        values=window.activations,
        qualifying_token_index=int(np.argmax(window.activations)),
        **share,
    )


def _above_zero(histogram: Histogram) -> tuple[Numbers, Numbers]:
    """Centres and counts of the bins that hold no zero."""
    bins = [
        ((low + high) / 2, float(count))
        for (low, high), count in zip(pairwise(histogram.edges), histogram.counts, strict=True)
        if low > 0
    ]
    return tuple(centre for centre, _ in bins), tuple(count for _, count in bins)
