"""The main job: a model and a corpus in, a run folder of explained units out.

    harvest -> explain -> score -> ablate -> result.json and page, one unit after the other; then the index

Every unit's files are written whole before the next is begun, and a unit that is there already, from the
same model, corpus and settings, is not done again: a killed run goes on where it was. This is the one
module of the package that brings torch in, through what it calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

import neuron_lens
from neuron_lens.errors import RequestError
from neuron_lens.explain.result import ModelFacts, RunFacts, RunResult, UnitResult, UnitSummary
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.files.atomic import write_text_atomic
from neuron_lens.records import Unit

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.settings import HarvestSettings
    from neuron_lens.harvest.sources import Direction, UnitSource
    from neuron_lens.transformer import Transformer

__all__ = ["Pipeline"]

_VERSION = 2  # of the method: raise it when results change for the same input

# What the units of one source share: kind, layer, site and dictionary.
_SourceKey = tuple[str, int, str, str]


@dataclass(eq=False)
class Pipeline:
    """Explains units of one model on one corpus into one folder.

    `units = pipeline.neurons(2, [17])`, or `heads`, `latents`, `directed`; then `pipeline.run(units)`.

    `autoencoders` and `directions` are those whose units can be asked for. `pages`: also write an HTML page for
    every unit and an index. `progress`: show progress bars on stderr.
    """

    model: Transformer
    corpus: Corpus
    folder: Path
    name: str = ""
    settings: HarvestSettings | None = None
    pages: bool = True
    progress: bool = True
    autoencoders: Sequence[Autoencoder] = ()
    directions: Sequence[Direction] = ()
    _work: dict[str, SourceWork] = field(default_factory=dict, init=False)  # by name of the source
    _sources: dict[Unit, UnitSource] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from neuron_lens.harvest.settings import HarvestSettings, fitting_shape, model_fingerprint
        from neuron_lens.harvest.sources import dictionary_of

        config = self.model.config
        self.folder = Path(self.folder)
        self._settings = self.settings or HarvestSettings(shape=fitting_shape(self.model))
        self.model_facts = ModelFacts(
            name=self.name or config.name or "model",
            n_layers=config.n_layers,
            d_model=config.d_model,
            d_mlp=config.d_mlp,
            fingerprint=model_fingerprint(self.model),
        )
        self._dictionaries = {dictionary_of(each): each for each in self.autoencoders}

    def run(self, units: Sequence[Unit]) -> RunResult:
        """Explain the units, write everything, and return the index of the folder.

        Raises RequestError for units the model does not have, or a folder that cannot be written to. Units
        of the same run that the folder already holds stay in the index.
        """
        self._harvest(self._check(units))
        summaries = self._finished()
        missing = [unit for unit in units if unit.name not in summaries]
        with tqdm(missing, desc="explaining", unit="unit", disable=not self.progress or not missing) as bar:
            for unit in bar:
                result = self.explain(unit)
                self._write(result)
                summaries[unit.name] = result.summary()
        ordered = sorted(summaries.values(), key=_order)
        run = RunResult(model=self.model_facts, run=self._run_facts, units=tuple(ordered))
        write_text_atomic(self.folder / "run.json", run.model_dump_json() + "\n")
        if self.pages:
            from neuron_lens.report.pages import write_index

            write_index(run, self.folder)
        return run

    def explain(self, unit: Unit) -> UnitResult:
        """Everything about one unit, without writing it."""
        work = self._work[self._sources[unit].name]
        explained = work.explained(unit.index)
        partner = work.explained(work.partner(unit.index))
        seed = self._settings.seed
        promoted, suppressed = work.output_tokens(unit.index)
        return UnitResult(
            model=self.model_facts,
            run=self._run_facts,
            unit=unit,
            explanation=explained.explanation,
            statistics=explained.statistics(),
            scores=explained.scores(seed),
            controls=explained.controls(partner, seed),
            splits=explained.splits(),
            train_top=explained.train_top(),
            strata=explained.strata(),
            test_windows=explained.shown_tests(),
            promoted=promoted,
            suppressed=suppressed,
            causal=work.causal(explained, seed),
        )

    def default_units(self, layer: int | None = None, count: int = 8) -> tuple[Unit, ...]:
        """Units to show when none are named: spread evenly over a layer's neurons (default: the middle
        layer)."""
        config = self.model.config
        layer = config.n_layers // 2 if layer is None else layer
        places = np.linspace(0, config.d_mlp - 1, min(count, config.d_mlp)).astype(int)
        return self.neurons(layer, [int(index) for index in places])

    def neurons(self, layer: int, indices: Sequence[int]) -> tuple[Unit, ...]:
        """Neurons of a layer."""
        return tuple(Unit(layer=layer, index=index) for index in indices)

    def heads(self, layer: int, indices: Sequence[int]) -> tuple[Unit, ...]:
        """Attention heads of a layer."""
        return tuple(Unit(kind="head", layer=layer, index=index, site="attn.v_out") for index in indices)

    def latents(self, indices: Sequence[int], autoencoder: Autoencoder | None = None) -> tuple[Unit, ...]:
        """Latents of one of the pipeline's autoencoders (which one must be said when there are several)."""
        found = [
            (name, each)
            for name, each in self._dictionaries.items()
            if autoencoder is None or each is autoencoder
        ]
        if len(found) != 1:
            raise RequestError(
                f"say which autoencoder: {len(found)} of the pipeline's {len(self._dictionaries)} fit; give "
                "them as Pipeline(…, autoencoders=[…])"
            )
        name, chosen = found[0]
        site = chosen.config.site_in
        if site is None or site.layer is None:
            raise RequestError(
                "this autoencoder does not say which site and layer of a model it was made for"
            )
        return tuple(
            Unit(kind="latent", layer=site.layer, index=index, site=site.path, dictionary=name)
            for index in indices
        )

    def directed(self) -> tuple[Unit, ...]:
        """The pipeline's directions as units."""
        return tuple(
            Unit(kind="direction", layer=each.layer, index=0, site=each.site, dictionary=each.dictionary)
            for each in self.directions
        )

    def results(self) -> Iterator[UnitResult]:
        """Every finished unit of this run in the folder, in order of layer and index."""
        for summary in RunResult.read(self.folder / "run.json").units:
            yield UnitResult.read(self.folder / summary.path / "result.json")

    def _check(self, units: Sequence[Unit]) -> list[UnitSource]:
        """The sources of the units. Raises RequestError for a unit that does not exist, before any work."""
        if not units:
            raise RequestError("no units to explain: name at least one layer and neuron")
        groups: dict[_SourceKey, list[Unit]] = {}
        for unit in units:
            last = self.model.config.n_layers - 1
            if unit.layer > last:
                raise RequestError(
                    f"layer {unit.layer} does not exist: {self.model_facts.name} has layers 0 to {last}"
                )
            groups.setdefault((unit.kind, unit.layer, unit.site, unit.dictionary), []).append(unit)
        sources = []
        for own in groups.values():
            source = self._source(own)
            beyond = [unit.index for unit in own if unit.index >= source.n_units]
            if beyond:
                raise RequestError(
                    f"{source.kind} {beyond[0]} does not exist: {self.model_facts.name} has 0 to "
                    f"{source.n_units - 1} in every layer"
                )
            self._sources |= dict.fromkeys(own, source)
            sources.append(source)
        return sources

    def _source(self, units: Sequence[Unit]) -> UnitSource:
        """Where units of one kind, layer, site and dictionary are read."""
        from neuron_lens.harvest.sources import DirectionSource, HeadSource, LatentSource, NeuronSource

        first = units[0]
        expected = {"neuron": "mlp.post_act", "head": "attn.v_out"}.get(first.kind, first.site)
        if first.site != expected:
            raise RequestError(
                f"{first.kind}s are explained at {expected}; got a {first.kind} at {first.site}"
            )
        source: UnitSource
        if first.kind == "neuron":
            source = NeuronSource(self.model, first.layer)
        elif first.kind == "head":
            source = HeadSource(self.model, first.layer)
        elif first.kind == "latent":
            if first.dictionary not in self._dictionaries:
                raise RequestError(
                    f"no autoencoder {first.dictionary!r} is known for {first}; give it as "
                    "Pipeline(…, autoencoders=[…]) and name latents with pipeline.latents([…])"
                )
            source = LatentSource(
                self.model,
                self._dictionaries[first.dictionary],
                [unit.index for unit in units],
                dictionary=first.dictionary,
            )
        else:
            known = {each.dictionary: each for each in self.directions}
            if first.dictionary not in known:
                raise RequestError(
                    f"no direction {first.dictionary!r} is known; give it as Pipeline(…, directions=[…]) and "
                    "name it with pipeline.directed()"
                )
            source = DirectionSource(self.model, known[first.dictionary])
        if (source.site, source.layer) != (first.site, first.layer):
            raise RequestError(
                f"{first} at {first.site}: its {first.kind} source reads {source.site} of layer {source.layer}"
            )
        return source

    def _harvest(self, sources: list[UnitSource]) -> None:
        from neuron_lens.harvest.run import harvest

        harvests = harvest(
            self.model,
            self.corpus,
            sources,
            self.folder / "harvest",
            self._settings,
            fingerprint=self.model_facts.fingerprint,
            progress=self.progress,
        )
        for source in sources:
            if source.name not in self._work:
                self._work[source.name] = SourceWork(source, harvests[source.name])

    @cached_property
    def _run_facts(self) -> RunFacts:
        facts = next(iter(self._work.values())).harvest.facts
        settings = self._settings.plain()
        digest = hashlib.blake2b(json.dumps([_VERSION, settings]).encode(), digest_size=8)
        return RunFacts(
            package_version=neuron_lens.__version__,
            corpus=self.corpus.name,
            corpus_fingerprint=self.corpus.fingerprint,
            n_documents=facts["n_documents"],
            n_tokens=facts["n_tokens"],
            n_unlexed_documents=facts["n_unlexed_documents"],
            window_length=self._settings.shape.length,
            row_length=self._settings.shape.row_length,
            seed=self._settings.seed,
            settings=digest.hexdigest(),
        )

    def _finished(self) -> dict[str, UnitSummary]:
        """Summaries of the units of this very run that the folder holds, by name."""
        summaries: dict[str, UnitSummary] = {}
        index = self.folder / "run.json"
        if index.is_file():
            run = RunResult.read(index)
            if (run.model, run.run) == (self.model_facts, self._run_facts):
                summaries = {
                    one.unit.name: one
                    for one in run.units
                    if (self.folder / one.path / "result.json").is_file()
                }
        # A killed run has units that no index lists.
        for path in sorted((self.folder / "units").glob("*/result.json")):
            if path.parent.name not in summaries:
                result = UnitResult.read(path)
                if (result.model, result.run) == (self.model_facts, self._run_facts):
                    summaries[result.unit.name] = result.summary()
        return summaries

    def _write(self, result: UnitResult) -> None:
        """The page first: a unit counts as done when its result.json is there."""
        if self.pages:
            from neuron_lens.report.pages import write_unit_page

            write_unit_page(result, self.folder)
        path = self.folder / result.summary().path / "result.json"
        write_text_atomic(path, result.model_dump_json() + "\n")


def _order(summary: UnitSummary) -> tuple[int, str, str, int]:
    """Where a unit stands in the index: by layer, neurons first, then by index."""
    unit = summary.unit
    return (unit.layer, "" if unit.kind == "neuron" else unit.kind, unit.dictionary, unit.index)
