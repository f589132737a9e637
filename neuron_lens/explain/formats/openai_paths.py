"""Where OpenAI's public neuron data lie: the published tree of paths, under any root.

    data/collated-activations/{layer}/{neuron}.json             NeuronRecord, GPT-2 XL
    data/explanations/{layer}/{neuron}.jsonl                    NeuronSimulationResults, one line
    data/related-tokens/{activation,weight}-based/{l}/{n}.json  token lists of GPT-2 XL's neurons
    data/related-neurons/weight-based/{l}/{n}.json              their class was never published
    gpt2_small_data/{collated-activations,explanations}/…       the same for GPT-2 small
    gpt2_small/attn_write_norm/collated-activations-by-token-pair/{layer}/{head}.json
    gpt2_small/autoencoder_latent/{input}_{version}/collated-activations[-by-token-pair]/{layer}/{latent}.json

The folders are those the transformer debugger's code reads; its page datasets.md spells some differently
("gpt2-small", ".pt", 3084 neurons). The published activations were computed with an approximate GELU: those
of GPT-2 small are off by up to 0.174 (99.9th percentile), so do not expect them to be reproduced exactly.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.formats.openai_json import read_record, write_record
from neuron_lens.explain.formats.openai_records import (
    NeuronRecord,
    NeuronSimulationResults,
    TokenLookupTableSummaryOfNeuron,
    WeightBasedSummaryOfNeuron,
)
from neuron_lens.files.remote import is_remote, join_remote

__all__ = ["DATASETS", "PUBLIC_ROOT", "PublishedDataset", "PublishedTree"]

PUBLIC_ROOT = "https://openaipublic.blob.core.windows.net/neuron-explainer"


@dataclass(frozen=True, kw_only=True)
class PublishedDataset:
    """One data set: the units of one site of one model, `units_per_layer` in each of `n_layers`.

    `activations` and the other folders are relative to the root; None: not published for these units.
    """

    activations: str
    explanations: str | None = None
    related_tokens: str | None = None
    n_layers: int
    units_per_layer: int


def _latents(name: str, units_per_layer: int, suffix: str = "") -> PublishedDataset:
    folder = f"gpt2_small/autoencoder_latent/{name}/collated-activations{suffix}"
    return PublishedDataset(activations=folder, n_layers=12, units_per_layer=units_per_layer)


DATASETS: dict[str, PublishedDataset] = {
    "gpt2-xl": PublishedDataset(
        activations="data/collated-activations",
        explanations="data/explanations",
        related_tokens="data/related-tokens",
        n_layers=48,
        units_per_layer=6400,
    ),
    "gpt2-small": PublishedDataset(
        activations="gpt2_small_data/collated-activations",
        explanations="gpt2_small_data/explanations",
        n_layers=12,
        units_per_layer=3072,
    ),
    "gpt2-small-heads": PublishedDataset(
        activations="gpt2_small/attn_write_norm/collated-activations-by-token-pair",
        n_layers=12,
        units_per_layer=12,
    ),
    "gpt2-small-mlp_post_act_v1": _latents("mlp_post_act_v1", 32768),
    "gpt2-small-mlp_post_act_v4": _latents("mlp_post_act_v4", 32768),
    "gpt2-small-resid_delta_mlp_v1": _latents("resid_delta_mlp_v1", 32768),
    "gpt2-small-resid_delta_mlp_v4": _latents("resid_delta_mlp_v4", 32768),
    "gpt2-small-resid_delta_attn_v4": _latents("resid_delta_attn_v4", 10240),
    "gpt2-small-resid_delta_attn_v4-by-token-pair": _latents("resid_delta_attn_v4", 10240, "-by-token-pair"),
}


@dataclass(frozen=True)
class PublishedTree:
    """One data set's files under a root: the public one, another store, or a local mirror.

    `root` is whatever blobfile opens, an https address or a local folder; `dataset` a name of `DATASETS`, or
    a PublishedDataset of your own in the same tree. Writing needs a local root. Raises RequestError for an
    unknown data set, an index outside it, or data that it does not have.
    """

    root: str | os.PathLike[str] = PUBLIC_ROOT
    dataset: str | PublishedDataset = "gpt2-xl"

    @property
    def facts(self) -> PublishedDataset:
        """The data set's folders and sizes."""
        if isinstance(self.dataset, PublishedDataset):
            return self.dataset
        if self.dataset not in DATASETS:
            hint = did_you_mean(self.dataset, DATASETS)
            raise RequestError(f"there is no published data set {self.dataset!r}: {hint}")
        return DATASETS[self.dataset]

    def activations_path(self, layer: int, index: int) -> str:
        """The file with a unit's NeuronRecord."""
        return self._path(self.facts.activations, layer, index, "json")

    def explanations_path(self, layer: int, index: int) -> str:
        """The file with a unit's NeuronSimulationResults."""
        return self._path(self._folder("explanations"), layer, index, "jsonl")

    def related_tokens_path(self, layer: int, index: int, based_on: Literal["activation", "weight"]) -> str:
        """The file with the tokens of a unit, by average activation or by its weights."""
        return self._path(f"{self._folder('related_tokens')}/{based_on}-based", layer, index, "json")

    def related_neurons_path(self, layer: int, index: int) -> str:
        """The file with a neuron's upstream and downstream neurons, by weights (a form nobody published)."""
        folder = self._folder("related_tokens").replace("related-tokens", "related-neurons")
        return self._path(f"{folder}/weight-based", layer, index, "json")

    def neuron_record(self, layer: int, index: int) -> NeuronRecord:
        """Read a unit's record; remote files are kept in the download cache."""
        return read_record(self.activations_path(layer, index), NeuronRecord)

    def simulation_results(self, layer: int, index: int) -> NeuronSimulationResults:
        """Read a unit's scored explanations."""
        return read_record(self.explanations_path(layer, index), NeuronSimulationResults)

    def lookup_tokens(self, layer: int, index: int) -> TokenLookupTableSummaryOfNeuron:
        """Read the tokens a neuron is most active on."""
        path = self.related_tokens_path(layer, index, "activation")
        return read_record(path, TokenLookupTableSummaryOfNeuron)

    def weight_tokens(self, layer: int, index: int) -> WeightBasedSummaryOfNeuron:
        """Read the tokens a neuron reads and writes by its weights."""
        return read_record(self.related_tokens_path(layer, index, "weight"), WeightBasedSummaryOfNeuron)

    def write(self, record: NeuronRecord | NeuronSimulationResults) -> str:
        """Write a record to its place in a local tree, and say where that is."""
        layer, index = record.neuron_id.layer_index, record.neuron_id.neuron_index
        is_record = isinstance(record, NeuronRecord)
        path = self.activations_path(layer, index) if is_record else self.explanations_path(layer, index)
        if is_remote(path):
            raise RequestError(f"cannot write to {path}: give a local folder as the root")
        write_record(path, record)
        return path

    def _folder(self, kind: Literal["explanations", "related_tokens"]) -> str:
        folder: str | None = getattr(self.facts, kind)
        if folder is None:
            having = ", ".join(name for name, facts in DATASETS.items() if getattr(facts, kind))
            raise RequestError(f"the data set {self.dataset!r} has no {kind}; these have: {having}")
        return folder

    def _path(self, folder: str, layer: int, index: int, suffix: str) -> str:
        for name, value, count in (
            ("layer", layer, self.facts.n_layers),
            ("index", index, self.facts.units_per_layer),
        ):
            if not 0 <= value < count:
                raise RequestError(
                    f"{name} {value} is not in the data set {self.dataset!r}: it has 0 to {count - 1}"
                )
        name = f"{folder}/{layer}/{index}.{suffix}"
        root = os.fspath(self.root)
        return join_remote(root, name) if is_remote(root) else str(Path(root) / name)
