"""The main job: a model and a corpus in, a run folder of explained units out.

    harvest -> explain -> score -> ablate -> result.json and page, one unit after the other; then the index

Without a judge everything is computed here. With one (`explainer`, `scorers`, `backend`), candidates are asked for,
chosen among on validation windows and scored on test windows, some units side by side; every answer is kept, so that
nothing is asked twice. Every unit's files are written whole before the next is begun, and a unit that is there already,
from the same model, corpus and settings, is not done again: a killed run goes on where it was. This is the one module
of the package that brings torch in, through what it calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

import neuron_lens
from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers import Explainer, TokenStatistics, explainer_named
from neuron_lens.explain.judging import Judging, Rehearsal, by_judge, controlled, with_scores
from neuron_lens.explain.kept_sources import KeptSources
from neuron_lens.explain.recipe import Recipe, recipe_of
from neuron_lens.explain.result import (
    Explanation,
    ModelFacts,
    RunFacts,
    RunResult,
    UnitResult,
    UnitSummary,
)
from neuron_lens.explain.run_folder import CorpusFacts, Manifest, Method, RunFolder, SourceFacts
from neuron_lens.explain.scorers import BaseScorer, scorer_named
from neuron_lens.explain.source_work import SourceWork
from neuron_lens.explain.unit_sources import NamesUnits, blocks, source_of, sources_of
from neuron_lens.llm import Backend, CachedBackend, Estimate, Price, estimate
from neuron_lens.records import Unit

if TYPE_CHECKING:
    from neuron_lens.autoencoders import Autoencoder
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.reproduce import Reproduction
    from neuron_lens.harvest.settings import HarvestSettings
    from neuron_lens.harvest.sources import Direction, UnitSource
    from neuron_lens.transformer import Transformer

__all__ = ["Pipeline"]

_VERSION = 5  # of the method: raise it when results change for the same input

_BLOCK = 8  # units whose calls to a judge run side by side


@dataclass(eq=False)
class Pipeline(NamesUnits):
    """Explains units of one model on one corpus into one folder.

    `units = pipeline.neurons(2, [17])`, or `heads`, `latents`, `directed`; then `pipeline.run(units)`.

    Args:
        explainer: a name, or an explainer with its options; token statistics need no judge, the others ask `backend`.
            None: the one the folder was explained by, whose explanations are only scored.
        scorers: names, or scorers with their options, in the order they are shown; the first one also chooses among
            several candidates of the explainer. Without a backend "ablate_to_simulation" simulates by the rules of token
            statistics.
        backend: the judge, whose answers are kept in the folder.
        autoencoders, directions: those whose units can be asked for. Of those that are used, and that `recipe` does not
            name, a copy is kept in the folder where there is a recipe.
        pages: also write an HTML page for every unit and an index.
        progress: show progress bars on stderr.
        recipe: how model, corpus and autoencoders can be had again, for commands that are given the folder only; found
            out where model and corpus were opened by name and path.

    Raises RequestError for names there are not, and when it runs, for a judge that is needed and not given, or a
    folder that holds a run of something else.
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
    explainer: str | Explainer | None = "token_statistics"
    scorers: Sequence[str | BaseScorer] = ()
    backend: Backend | None = None
    recipe: Recipe | None = None
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
        self._kept = KeptSources(self._dictionaries, self.directions)
        explainer = self.explainer
        explainer = explainer_named(explainer)() if isinstance(explainer, str) else explainer
        self._explainer = None if isinstance(explainer, TokenStatistics) else explainer
        self._named = tuple(scorer_named(one)() if isinstance(one, str) else one for one in self.scorers)
        self._run_folder = RunFolder(self.folder)
        self._evidence = lru_cache(maxsize=2 * _BLOCK)(self._evidence_of)

    def harvest(self, units: Sequence[Unit]) -> Manifest:
        """Only harvest what the units need, and return what the folder now holds a run of."""
        return self._prepare(units)

    def run(self, units: Sequence[Unit]) -> RunResult:
        """Explain and score the units, write everything, and return the index of the folder.

        Raises RequestError for units the model does not have, or a folder that cannot be written to, and
        BackendError when no further call can be answered (BudgetExceeded, for one): what is done stays, and the
        same call goes on from there. Units of the same run that the folder already holds stay in the index.
        """
        self._require_judge()
        self._prepare(units, self._method, self._scorers)
        summaries, reasons = self._run_folder.finished(self.model_facts, self._run_facts), dict[str, str]()
        todo = [unit for unit in units if unit.name not in summaries or self._unscored(summaries[unit.name])]
        try:
            with tqdm(todo, desc="units", unit="unit", disable=not self.progress or not todo) as bar:
                for block in self._blocks(todo):
                    for result in self._scored(self._explained(block, summaries, reasons)):
                        summaries[result.unit.name] = result.summary()
                    bar.update(len(block))
        except BackendError:
            self._index(summaries, reasons)
            raise
        failed = [unit for unit in units if unit.name in reasons]
        if len(failed) == len(units):
            raise RequestError(f"no unit could be explained; {failed[0]}: {reasons[failed[0].name]}")
        return self._index(summaries, reasons)

    def estimate(self, units: Sequence[Unit], price: Price | None = None) -> Estimate:
        """The calls, tokens and cost `run` would take, without making any. Harvests first, which costs nothing but time.

        Failed calls, repairs and sentences that come out equal change the number.
        """
        self._require_judge()
        self._prepare(units, self._method, self._scorers)
        summaries, rehearsal = self._run_folder.finished(self.model_facts, self._run_facts), Rehearsal()
        for block in self._blocks(units):
            judging = self._judging(block)
            scorers = tuple(scorer.rehearsed() for scorer in judging.scorers)
            judging = replace(judging, scorers=scorers, rehearsal=rehearsal, progress=False)
            done = [self._run_folder.read(unit) if unit.name in summaries else None for unit in block]
            new = [unit for unit, result in zip(block, done, strict=True) if result is None]
            known = [result for result in done if result and self._unscored(result.summary())]
            pairs = [(one.unit, controlled(one)) for one in known]
            pairs += [
                (unit, explanation)
                for unit, explanation in zip(new, self._explanations(new, judging), strict=True)
                if isinstance(explanation, Explanation)
            ]
            judging.score([(self._evidence(unit), explanation) for unit, explanation in pairs])
        backend = self._judge
        return estimate(rehearsal.requests, price=price, is_cached=backend.has if backend else None)

    def verify(self, n_units: int = 8, n_windows: int = 8) -> list[Reproduction]:
        """Run some of the folder's recorded windows again, and say of each source whether its activations reproduce.

        Raises RequestError when nothing was harvested, or model or corpus are others than the folder's.
        """
        from neuron_lens.harvest.reproduce import reproduce

        manifest = self._run_folder.require_manifest()
        manifest.joined(self._manifest([], []), self.folder)
        if not manifest.sources:
            raise RequestError(f"{self.folder} holds no harvest to verify")
        found = []
        for facts in manifest.sources:
            source = source_of(facts.units(), self.model, self._dictionaries, self.directions)
            folder, fingerprint = self._run_folder.harvest / source.name, self.model_facts.fingerprint
            found.append(reproduce(source, folder, fingerprint, n_units=n_units, n_windows=n_windows))
        return found

    def explain(self, unit: Unit) -> UnitResult:
        """Everything about one unit that needs no judge, without writing it."""
        work = self._work[self._sources[unit].name]
        return work.result(unit.index, self.model_facts, self._run_facts)

    def results(self) -> Iterator[UnitResult]:
        """Every finished unit of this run in the folder, in order of layer and index."""
        return self._run_folder.results()

    def _check(self, units: Sequence[Unit]) -> list[UnitSource]:
        """The sources of the units. Raises RequestError for a unit that does not exist, before any work."""
        of_units = sources_of(
            units, self.model, self._dictionaries, self.directions, model_name=self.model_facts.name
        )
        self._sources |= of_units
        return list(dict.fromkeys(of_units.values()))

    def _require_judge(self) -> None:
        """Refuse before any work what would be refused after it."""
        asking = [] if self._explainer is None else [f"the explainer {self._explainer.name!r}"]
        asking += [f"the scorer {scorer.name!r}" for scorer in self._scorers if scorer.asks]
        if self.backend is None and asking:
            raise RequestError(
                f"{asking[0]} asks a judge: give it a backend (by command: --judge; see neuron_lens.llm)"
            )
        names = [scorer.name for scorer in self._scorers]
        if len(set(names)) < len(names):
            raise RequestError(f"each scorer is named once; got {', '.join(names)}")

    def _prepare(
        self, units: Sequence[Unit], explainer: Method | None = None, scorers: Sequence[BaseScorer] = ()
    ) -> Manifest:
        """Harvest what the units need, and write down what is done here."""
        sources = self._check(units)
        manifest = self._run_folder.check(self._manifest(sources, units, explainer, scorers))
        self._harvest(sources)
        self._kept.write(self.folder, manifest.recipe)
        self._run_folder.write_manifest(manifest)
        return manifest

    @cached_property
    def _judge(self) -> CachedBackend | None:
        if self.backend is None or isinstance(self.backend, CachedBackend):
            return self.backend
        return CachedBackend(self.backend, self._run_folder.requests)

    @cached_property
    def _scorers(self) -> tuple[BaseScorer, ...]:
        """The scorers that were named, by rule where nobody can be asked and explanations carry one."""
        if self.backend is None and self._named and self._method.name == TokenStatistics.name:
            return tuple(scorer.by_rule() for scorer in self._named)
        return self._named

    @cached_property
    def _asking_scorers(self) -> tuple[BaseScorer, ...]:
        """The scorers, with what they pay others than the judge for kept in the folder."""
        return tuple(scorer.kept_in(self._run_folder.embeddings) for scorer in self._scorers)

    @cached_property
    def _method(self) -> Method:
        """How explanations are made, or were."""
        if self.explainer is not None:
            return Method.of(self._explainer or TokenStatistics(), self.backend)
        found = self._run_folder.require_manifest().explainer
        if found is None:
            raise RequestError(
                f"{self.folder} holds no explanations to score; run neuron-lens explain into it"
            )
        return found

    def _manifest(
        self,
        sources: Sequence[UnitSource],
        units: Sequence[Unit],
        explainer: Method | None = None,
        scorers: Sequence[BaseScorer] = (),
    ) -> Manifest:
        return Manifest(
            method_version=_VERSION,
            model=self.model_facts,
            corpus=CorpusFacts.of(self.corpus),
            harvest=self._settings.plain(),
            sources=tuple(
                SourceFacts.of(source, [unit for unit in units if self._sources[unit] is source])
                for source in sources
            ),
            explainer=explainer,
            scorers={scorer.name: Method.of(scorer, self.backend) for scorer in scorers},
            recipe=self._kept.added(
                self.recipe or recipe_of(self.model, self.corpus), {source.dictionary for source in sources}
            ),
        ).with_prompts()

    def _evidence_of(self, unit: Unit) -> Evidence:
        return self._work[self._sources[unit].name].evidence(unit.index)

    def _blocks(self, units: Sequence[Unit]) -> Iterator[list[Unit]]:
        """Units of one source each, so many as a judge is asked about together."""
        return blocks(units, 1 if self._explainer is None and not self._scorers else _BLOCK)

    def _judging(self, block: Sequence[Unit]) -> Judging:
        work = self._work[self._sources[block[0]].name]
        seed = self._settings.seed
        scorers = tuple(work.equipped(scorer, seed) for scorer in self._asking_scorers)
        return Judging(self._explainer, scorers, self._judge, seed, self.progress)

    def _explanations(self, units: Sequence[Unit], judging: Judging) -> list[Explanation | str]:
        """The explanation of each unit, or why there is none."""
        if judging.explainer is None:
            return [self._offline(unit) for unit in units]
        pairs: list[tuple[Evidence, Evidence | None]] = []
        for unit in units:
            work = self._work[self._sources[unit].name]
            other = work.source.unit(work.partner(unit.index))
            self._sources.setdefault(other, work.source)
            pairs.append((self._evidence(unit), None if other == unit else self._evidence(other)))
        return judging.explain(pairs)

    def _offline(self, unit: Unit) -> Explanation:
        """By token statistics, with those of its partner."""
        work = self._work[self._sources[unit].name]
        other = work.explained(work.partner(unit.index)).explanation.sentence
        return work.explained(unit.index).explanation.model_copy(update={"another": other})

    def _explained(
        self, block: Sequence[Unit], summaries: dict[str, UnitSummary], reasons: dict[str, str]
    ) -> list[UnitResult]:
        """The results of a block with an explanation each, written where they are new."""
        done = {unit: self._run_folder.read(unit) for unit in block if unit.name in summaries}
        new = [unit for unit in block if unit not in done]
        results = [result for result in done.values() if result is not None]
        if self._explainer is None:
            made: list[Explanation | str | None] = [None] * len(new)
        else:
            made = [*self._explanations(new, self._judging(block))] if new else []
        for unit, explanation in zip(new, made, strict=True):
            if isinstance(explanation, str):
                reasons[unit.name] = explanation
                continue
            result = self.explain(unit)
            if explanation is not None:
                result = by_judge(result, explanation)
            self._run_folder.write_result(result, page=self.pages)
            summaries[unit.name] = result.summary()
            results.append(result)
        return results

    def _unscored(self, summary: UnitSummary) -> bool:
        """Whether a scorer has nothing said of the unit yet, or had no answer at all."""
        judged = {headline.scorer for headline in summary.judged if headline.score.coverage > 0}
        judged |= set(summary.unscored)
        return not {scorer.name for scorer in self._scorers} <= judged

    def _scored(self, results: Sequence[UnitResult]) -> list[UnitResult]:
        """The results with the scores of the judge, written."""
        if not self._scorers or not results:
            return list(results)
        judging = self._judging([results[0].unit])
        scored = judging.score([(self._evidence(one.unit), controlled(one)) for one in results])
        changed = []
        for result, said in zip(results, scored, strict=True):
            changed.append(with_scores(result, said))
            self._run_folder.write_result(changed[-1], page=self.pages)
        return changed

    def _harvest(self, sources: list[UnitSource]) -> None:
        from neuron_lens.harvest.run import harvest

        harvests = harvest(
            self.model,
            self.corpus,
            sources,
            self._run_folder.harvest,
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
        method = [] if self._method.name == TokenStatistics.name else [self._method.model_dump()]
        digest = hashlib.blake2b(json.dumps([_VERSION, settings, *method]).encode(), digest_size=8)
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

    def _index(self, summaries: dict[str, UnitSummary], reasons: dict[str, str]) -> RunResult:
        """Write the index of what is done, and return it."""
        run = RunResult.of(self.model_facts, self._run_facts, summaries.values(), reasons)
        self._run_folder.write_run(run, page=self.pages)
        return run
