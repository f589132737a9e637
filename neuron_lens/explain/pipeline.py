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
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

import neuron_lens
from neuron_lens.errors import RequestError
from neuron_lens.explain.features import FeatureSet
from neuron_lens.explain.result import (
    AblationEffect,
    CausalEffect,
    ModelFacts,
    RunFacts,
    RunResult,
    TokenValue,
    UnitResult,
    UnitSummary,
)
from neuron_lens.explain.scores import mean_score
from neuron_lens.explain.unit import ExplainedUnit, UnitWindows, explain_windows
from neuron_lens.files.atomic import write_text_atomic
from neuron_lens.records import Unit

if TYPE_CHECKING:
    from neuron_lens.harvest.ablation import AblatedTokens
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.run import HarvestSettings
    from neuron_lens.harvest.shard import LayerHarvest
    from neuron_lens.transformer import Transformer

__all__ = ["Pipeline"]

_VERSION = 1  # of the method: raise it when results change for the same input
_LISTED = 10  # promoted and suppressed tokens
_ABLATED_WINDOWS = (4, 2)  # test windows the unit is ablated on: from the top, at random


@dataclass(eq=False)
class Pipeline:
    """Explains units of one model on one corpus into one folder.

    `pages`: also write an HTML page for every unit and an index. `progress`: show progress bars on stderr.
    """

    model: Transformer
    corpus: Corpus
    folder: Path
    name: str = ""
    settings: HarvestSettings | None = None
    pages: bool = True
    progress: bool = True
    _layers: dict[int, _LayerWork] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        from neuron_lens.harvest.run import HarvestSettings, fitting_shape, model_fingerprint

        config = self.model.config
        if config.mlp == "none" or not hasattr(self.model.blocks[0].mlp, "down"):
            raise RequestError(f"this model's layers have no neurons to explain (its MLP is {config.mlp!r})")
        self.folder = Path(self.folder)
        self._settings = self.settings or HarvestSettings(shape=fitting_shape(self.model))
        self.model_facts = ModelFacts(
            name=self.name or config.name or "model",
            n_layers=config.n_layers,
            d_model=config.d_model,
            d_mlp=config.d_mlp,
            fingerprint=model_fingerprint(self.model),
        )

    def run(self, units: Sequence[Unit]) -> RunResult:
        """Explain the units, write everything, and return the index of the folder.

        Raises RequestError for units the model does not have, or a folder that cannot be written to. Units
        of the same run that the folder already holds stay in the index.
        """
        self._check(units)
        self._harvest(sorted({unit.layer for unit in units}))
        summaries = self._finished()
        missing = [unit for unit in units if unit.name not in summaries]
        with tqdm(missing, desc="explaining", unit="unit", disable=not self.progress or not missing) as bar:
            for unit in bar:
                result = self.explain(unit)
                self._write(result)
                summaries[unit.name] = result.summary()
        ordered = sorted(summaries.values(), key=lambda one: (one.unit.layer, one.unit.index))
        run = RunResult(model=self.model_facts, run=self._run_facts, units=tuple(ordered))
        write_text_atomic(self.folder / "run.json", run.model_dump_json() + "\n")
        if self.pages:
            from neuron_lens.report.pages import write_index

            write_index(run, self.folder)
        return run

    def explain(self, unit: Unit) -> UnitResult:
        """Everything about one unit, without writing it."""
        layer = self._layers[unit.layer]
        explained = layer.explained(unit.index)
        partner = layer.explained(_partner(unit.index, self.model.config.d_mlp))
        seed = self._settings.seed
        promoted, suppressed = layer.output_tokens(unit.index)
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
            causal=layer.causal(explained, seed),
        )

    def default_units(self, layer: int | None = None, count: int = 8) -> tuple[Unit, ...]:
        """Units to show when none are named: spread evenly over a layer's neurons (default: the middle
        layer)."""
        config = self.model.config
        layer = config.n_layers // 2 if layer is None else layer
        places = np.linspace(0, config.d_mlp - 1, min(count, config.d_mlp)).astype(int)
        return tuple(Unit(layer=layer, index=int(index)) for index in places)

    def results(self) -> Iterator[UnitResult]:
        """Every finished unit of this run in the folder, in order of layer and index."""
        for summary in RunResult.read(self.folder / "run.json").units:
            yield UnitResult.read(self.folder / summary.path / "result.json")

    def _check(self, units: Sequence[Unit]) -> None:
        config = self.model.config
        if not units:
            raise RequestError("no units to explain: name at least one layer and neuron")
        name = self.model_facts.name
        for unit in units:
            if unit.layer >= config.n_layers:
                last = config.n_layers - 1
                raise RequestError(f"layer {unit.layer} does not exist: {name} has layers 0 to {last}")
            if unit.index >= config.d_mlp:
                last = config.d_mlp - 1
                raise RequestError(
                    f"neuron {unit.index} does not exist: {name} has 0 to {last} in every layer"
                )
            if unit.kind != "neuron" or unit.site != "mlp.post_act":
                raise RequestError(
                    f"only neurons at mlp.post_act can be explained so far; got a {unit.kind} at {unit.site}"
                )

    def _harvest(self, layers: list[int]) -> None:
        from neuron_lens.harvest.run import harvest_layers

        harvests = harvest_layers(
            self.model,
            self.corpus,
            layers,
            self.folder / "harvest",
            self._settings,
            fingerprint=self.model_facts.fingerprint,
            progress=self.progress,
        )
        for layer, harvest in harvests.items():
            if layer not in self._layers:
                self._layers[layer] = _LayerWork(self.model, layer, harvest)

    @cached_property
    def _run_facts(self) -> RunFacts:
        facts = next(iter(self._layers.values())).harvest.facts
        settings = asdict(self._settings)
        settings.pop("batch_rows")  # how the work is cut up changes nothing
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


class _LayerWork:
    """What the units of one layer share."""

    def __init__(self, model: Transformer, layer: int, harvest: LayerHarvest) -> None:
        self.model = model
        self.layer = layer
        self.harvest = harvest
        # A unit and its control are each other's partners: both are asked for twice, close together.
        self.explained = lru_cache(maxsize=4)(self._explain)

    @cached_property
    def features(self) -> FeatureSet:
        return FeatureSet(self.harvest.windows)

    @cached_property
    def _logits(self) -> NDArray[np.float32]:
        from neuron_lens.harvest.ablation import output_logits

        return np.asarray(output_logits(self.model, self.layer).cpu().numpy())

    def _explain(self, index: int) -> ExplainedUnit:
        kept = self.harvest.unit(index)
        held = UnitWindows.of(
            self.harvest.windows,
            kept.random_rows,
            kept.random,
            kept.top_rows,
            kept.top,
            kept.moments,
            self.harvest.facts["n_tokens"],
        )
        unit = Unit(layer=self.layer, index=index)
        return explain_windows(unit, held, self.features, self._logits[index])

    def output_tokens(self, index: int) -> tuple[tuple[TokenValue, ...], tuple[TokenValue, ...]]:
        """The tokens the unit's output weights raise and lower most."""
        return self._extremes(self._logits[index].astype(np.float64))

    def _extremes(self, values: NDArray[np.float64]) -> tuple[tuple[TokenValue, ...], tuple[TokenValue, ...]]:
        texts = self.harvest.windows.token_texts
        order = np.argsort(-values, kind="stable")
        raised, lowered = (
            tuple(
                TokenValue(token=texts[token], id=int(token), value=float(f"{values[token]:.5g}"))
                for token in chosen
            )
            for chosen in (order[:_LISTED], order[::-1][:_LISTED])
        )
        return raised, lowered

    def causal(self, explained: ExplainedUnit, seed: int) -> CausalEffect:
        """The unit replaced by its mean on some test windows, where it fires and where it is silent."""
        from neuron_lens.harvest.ablation import ablate_where

        test = explained.held.part("test")
        falling = np.argsort(-test.largest(), kind="stable")
        n_top, n_random = _ABLATED_WINDOWS
        others = [i for i in np.flatnonzero(test.random) if i not in falling[:n_top]]
        chosen = np.array([*falling[:n_top], *others[:n_random]], dtype=int)
        mean = float(f"{explained.held.moments[0]:.6g}")
        fires = (test.activations[chosen] > explained.firing_threshold) & test.mask[chosen]
        silent = ~fires & test.mask[chosen]
        rows = [int(row) for row in test.rows[chosen]]
        firing, quiet = ablate_where(
            self.model, self.layer, explained.unit.index, mean, self.harvest.windows, rows, [fires, silent]
        )
        return CausalEffect(
            replaced_by="mean",
            value=mean,
            where_firing=self._effect(firing, seed),
            where_silent=self._effect(quiet, seed),
        )

    def _effect(self, tokens: AblatedTokens, seed: int) -> AblationEffect:
        n = int(tokens.n.sum())
        weights = tokens.n.astype(np.float64)

        def mean(values: NDArray[np.float64]) -> float | None:
            return float(f"{(values * weights).sum() / n:.6g}") if n else None

        raised, lowered = self._extremes(tokens.log_probability_change) if n else ((), ())
        return AblationEffect(
            n_positions=n,
            loss_intact=mean(tokens.intact),
            loss_ablated=mean(tokens.ablated),
            loss_change=mean_score(tokens.ablated - tokens.intact, weights, len(weights), seed),
            divergence=mean(tokens.divergence),
            raised=raised,
            lowered=lowered,
        )


def _partner(index: int, n_units: int) -> int:
    """The unit whose explanation is the control: a neighbour, so that pairs serve each other."""
    other = index ^ 1
    return other if other < n_units else max(index - 1, 0)
