"""What the units of one harvested source share: features, output logits, ablation. Brings torch in when asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.features import FeatureSet
from neuron_lens.explain.result import (
    AblationEffect,
    CausalEffect,
    ModelFacts,
    RunFacts,
    SimilarUnit,
    TokenValue,
    UnitResult,
)
from neuron_lens.explain.scorers import (
    AblateToSimulation,
    BaseScorer,
    Causal,
    Continuations,
    Effects,
    Remembered,
    SimulatedDivergences,
    Simulation,
)
from neuron_lens.explain.scores import mean_score
from neuron_lens.explain.simulators import RuleSimulator
from neuron_lens.explain.unit import ExplainedUnit, UnitWindows, explain_windows
from neuron_lens.records import Unit

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.harvest.ablation import AblatedTokens
    from neuron_lens.harvest.effects import UnitEffects
    from neuron_lens.harvest.shard import LayerHarvest, UnitActivations
    from neuron_lens.harvest.sources import UnitSource
    from neuron_lens.windows import TextWindows

__all__ = ["SourceWork"]

GROUP_UNITS = 32  # units whose windows and features are in memory together
_LISTED = 10  # promoted and suppressed tokens
_RANDOM_UNITS = 6  # whose effects a judge must tell from the unit's own
_ABLATED_WINDOWS = (4, 2)  # test windows the unit is ablated on: from the top, at random

Tokens = tuple[TokenValue, ...]


@dataclass(frozen=True, eq=False)
class _Group:
    """Some neighbouring units with the windows they were seen on, and the features of those.

    A wide layer's windows are too many to hold the features of all at once: every unit has a list of its own.
    """

    windows: TextWindows
    units: dict[int, UnitActivations]  # their rows count in these windows

    @classmethod
    def of(cls, harvest: LayerHarvest, indices: Sequence[int]) -> _Group:
        """The units with these indices."""
        units = {index: harvest.unit(index) for index in indices}
        rows = np.unique(
            np.concatenate(
                [
                    np.concatenate([kept.random_rows, kept.top_rows, kept.fired_rows, kept.near_rows])
                    for kept in units.values()
                ]
            )
        )

        def placed(own: NDArray[np.int32]) -> NDArray[np.int32]:
            return np.searchsorted(rows, own).astype(np.int32)

        moved = {
            index: replace(
                kept,
                random_rows=placed(kept.random_rows),
                top_rows=placed(kept.top_rows),
                fired_rows=placed(kept.fired_rows),
                near_rows=placed(kept.near_rows),
            )
            for index, kept in units.items()
        }
        return cls(harvest.windows.select(rows), moved)

    @cached_property
    def features(self) -> FeatureSet:
        """The features of these windows."""
        return FeatureSet(self.windows)


class SourceWork:
    """Explains units of one source out of its harvest."""

    def __init__(self, source: UnitSource, harvest: LayerHarvest) -> None:
        self.source, self.harvest = source, harvest
        # A unit and its control are each other's partners: both are asked for twice, close together.
        self.explained = lru_cache(maxsize=4)(self._explain)
        self._group = lru_cache(maxsize=2)(self._make_group)
        self._logits = lru_cache(maxsize=2)(self._make_logits)
        self._embeddings = lru_cache(maxsize=2)(self._make_embeddings)

    @cached_property
    def _written(self) -> Tensor | None:
        """The directions the kept units write; None without a single one each."""
        return self.source.written()

    def _make_logits(self, number: int) -> NDArray[np.float32] | None:
        """What the output of each unit of a group adds to the logits `[unit, d_vocab]`; None without a direction."""
        from neuron_lens.harvest.sources.base import logits_written

        if self._written is None:
            return None
        own = self._written[self._columns(number)]
        return np.asarray(logits_written(self.source.model, own).cpu().numpy())

    def _make_embeddings(self, number: int) -> NDArray[np.float32] | None:
        """What the embedding of every token adds to the inputs of a group's units `[unit, d_vocab]`; None likewise."""
        from neuron_lens.harvest.sources.embeddings import embeddings_read

        if self._read is None:
            return None
        own = self._read[self._columns(number)]
        return np.asarray(embeddings_read(self.source.model, own).cpu().numpy())

    def _explain(self, index: int) -> ExplainedUnit:
        group = self._group(self._number_of(index))
        held = UnitWindows.of(group.windows, group.units[index], self.harvest.facts["n_tokens"])
        return explain_windows(self.source.unit(index), held, group.features, self._logits_of(index))

    def _number_of(self, index: int) -> int:
        """The group of a unit. A unit left over alone goes with the group before it: its control is there."""
        return min(self.source.column(index) // GROUP_UNITS, self._last)

    @property
    def _last(self) -> int:
        """The number of the last group."""
        return max((len(self.source.indices) - 2) // GROUP_UNITS, 0)

    def _columns(self, number: int) -> slice:
        """Where the units of a group stand among the kept ones."""
        return slice(number * GROUP_UNITS, None if number == self._last else (number + 1) * GROUP_UNITS)

    def _make_group(self, number: int) -> _Group:
        return _Group.of(self.harvest, self.source.indices[self._columns(number)])

    def _logits_of(self, index: int) -> NDArray[np.float32] | None:
        return self._row(self._logits(self._number_of(index)), index)

    def _row(self, of_group: NDArray[np.float32] | None, index: int) -> NDArray[np.float32] | None:
        """A unit's row of what its group holds."""
        first = self._columns(self._number_of(index)).start
        return None if of_group is None else of_group[self.source.column(index) - first]

    def partner(self, index: int) -> int:
        """The unit whose explanation is the control: a neighbour, so that pairs serve each other, and one that
        fires at all."""
        group = self._group(self._number_of(index)).units
        alive = {one for one in group if self.harvest.maxima[self.source.column(one)] > 0}
        others = sorted(set(group) - {index}, key=lambda one: (abs(one - index), one))
        if index ^ 1 in alive and index ^ 1 in group:
            return index ^ 1
        return next((one for one in others if one in alive), others[0] if others else index)

    def output_tokens(self, index: int) -> tuple[Tokens, Tokens]:
        """The tokens the unit's output raises and lowers most; none for a unit of no single direction."""
        logits = self._logits_of(index)
        return ((), ()) if logits is None else self._extremes(logits.astype(np.float64))

    @cached_property
    def _read(self) -> Tensor | None:
        """The directions the kept units read; None without a single one each."""
        return self.source.read()

    def input_tokens(self, index: int) -> Tokens:
        """The tokens whose embeddings drive the unit most, by its weights; none where it reads no single direction."""
        added = self._row(self._embeddings(self._number_of(index)), index)
        return () if added is None else self._extremes(added.astype(np.float64))[0]

    def _extremes(self, values: NDArray[np.float64]) -> tuple[Tokens, Tokens]:
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

    @cached_property
    def _unit_effects(self) -> UnitEffects:
        from neuron_lens.harvest.effects import UnitEffects

        return UnitEffects(self.source, self.harvest.windows, self.explained)

    @cached_property
    def _effects(self) -> Effects:
        """Of any unit; those of the random units are asked for again and again."""
        return lru_cache(maxsize=64)(self._unit_effects)

    @cached_property
    def _continuations(self) -> Continuations:
        """Of any unit, likewise."""
        return lru_cache(maxsize=64)(self._unit_effects.continuations)

    @cached_property
    def _divergences(self) -> SimulatedDivergences:
        return Remembered(self._unit_effects.simulated)

    def _rules(self, unit: Unit) -> RuleSimulator:
        """What token statistics say of a unit and of its control, as rules; said in the same words, the unit's own."""
        pair = self.explained(self.partner(unit.index)), self.explained(unit.index)
        return RuleSimulator({one.explanation.sentence: one.simulated for one in pair})

    def evidence(self, index: int) -> Evidence:
        """What explainers and scorers that ask a judge see of a unit."""
        promoted, suppressed = self.output_tokens(index)
        return Evidence.of(
            self.explained(index),
            promoted=promoted,
            suppressed=suppressed,
            reads=self.input_tokens(index),
        )

    def result(self, index: int, model: ModelFacts, run: RunFacts) -> UnitResult:
        """Everything about a unit that needs no judge; drawn by the run's seed."""
        explained = self.explained(index)
        partner = self.explained(self.partner(index))
        promoted, suppressed = self.output_tokens(index)
        return UnitResult(
            model=model,
            run=run,
            unit=self.source.unit(index),
            explanation=explained.explanation,
            statistics=explained.statistics(),
            scores=explained.scores(run.seed),
            controls=explained.controls(partner, run.seed),
            splits=explained.splits(),
            train_top=explained.train_top(),
            strata=explained.strata(),
            test_windows=explained.shown_tests(),
            promoted=promoted,
            suppressed=suppressed,
            reads=self.input_tokens(index),
            causal=self.causal(explained, run.seed),
            similar=self.similar(index),
        )

    def similar(self, index: int) -> tuple[SimilarUnit, ...]:
        """The units that are active at the same tokens, most similar first."""
        nearest = self.harvest.unit(index).nearest
        if nearest is None:
            return ()
        cosines = nearest.cosine if nearest.cosine is not None else [None] * len(nearest.index)
        return tuple(
            SimilarUnit(
                unit=self.source.unit(int(other)),
                pearson=round(float(pearson), 4),
                jaccard=round(float(jaccard), 4),
                cosine=None if cosine is None else round(float(cosine), 4),
            )
            for other, pearson, jaccard, cosine in zip(
                nearest.index, nearest.pearson, nearest.jaccard, cosines, strict=True
            )
        )

    def equipped(self, scorer: BaseScorer, seed: int) -> BaseScorer:
        """The scorer with what it takes of this source and its model, where it takes something and has none: effects,
        other units that fire to compare with, divergences, rules."""
        if isinstance(scorer, Simulation):
            scorer = replace(scorer, rules=scorer.rules or self._rules)
        if isinstance(scorer, AblateToSimulation):
            return replace(scorer, divergences=scorer.divergences or self._divergences)
        if not isinstance(scorer, Causal):
            return scorer
        alive = self.harvest.indices[self.harvest.maxima > 0]
        drawn = np.random.default_rng([seed, 9]).permutation(alive)[:_RANDOM_UNITS]
        return replace(
            scorer,
            effects=scorer.effects or self._effects,
            continuations=scorer.continuations or self._continuations,
            random_units=scorer.random_units or tuple(self.source.unit(int(index)) for index in drawn),
        )

    def causal(self, explained: ExplainedUnit, seed: int) -> CausalEffect:
        """The unit replaced on some test windows, where it fires and where it is silent."""
        from neuron_lens.harvest.ablation import ablate_where

        test = explained.held.part("test")
        falling = np.argsort(-test.largest(), kind="stable")
        n_top, n_random = _ABLATED_WINDOWS
        others = [i for i in np.flatnonzero(test.random) if i not in falling[:n_top]]
        chosen = np.array([*falling[:n_top], *others[:n_random]], dtype=int)
        by = self.source.replaced_by
        value = float(f"{explained.held.moments[0]:.6g}") if by == "mean" else 0.0
        fires = (test.activations[chosen] > explained.firing_threshold) & test.mask[chosen]
        silent = ~fires & test.mask[chosen]
        rows = [int(row) for row in test.rows[chosen]]
        firing, quiet = ablate_where(
            self.source, explained.unit.index, value, explained.held.windows, rows, [fires, silent]
        )
        return CausalEffect(
            replaced_by=by,
            value=value,
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
