"""What the units of one harvested source share: features, output logits, ablation. Brings torch in when asked."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from neuron_lens.explain.features import FeatureSet
from neuron_lens.explain.result import AblationEffect, CausalEffect, TokenValue
from neuron_lens.explain.scores import mean_score
from neuron_lens.explain.unit import ExplainedUnit, UnitWindows, explain_windows

if TYPE_CHECKING:
    from neuron_lens.harvest.ablation import AblatedTokens
    from neuron_lens.harvest.shard import LayerHarvest
    from neuron_lens.harvest.sources import UnitSource

__all__ = ["SourceWork"]

_LISTED = 10  # promoted and suppressed tokens
_ABLATED_WINDOWS = (4, 2)  # test windows the unit is ablated on: from the top, at random

Tokens = tuple[TokenValue, ...]


class SourceWork:
    """Explains units of one source out of its harvest."""

    def __init__(self, source: UnitSource, harvest: LayerHarvest) -> None:
        self.source, self.harvest = source, harvest
        # A unit and its control are each other's partners: both are asked for twice, close together.
        self.explained = lru_cache(maxsize=4)(self._explain)

    @cached_property
    def features(self) -> FeatureSet:
        """The features of the kept windows, shared by all units."""
        return FeatureSet(self.harvest.windows)

    @cached_property
    def _logits(self) -> NDArray[np.float32] | None:
        """What each kept unit's output adds to the logits `[unit, d_vocab]`; None without a single direction."""
        from neuron_lens.harvest.sources.base import logits_written

        written = self.source.written()
        if written is None:
            return None
        return np.asarray(logits_written(self.source.model, written).cpu().numpy())

    def _explain(self, index: int) -> ExplainedUnit:
        held = UnitWindows.of(self.harvest.windows, self.harvest.unit(index), self.harvest.facts["n_tokens"])
        return explain_windows(self.source.unit(index), held, self.features, self._logits_of(index))

    def _logits_of(self, index: int) -> NDArray[np.float32] | None:
        return None if self._logits is None else self._logits[self.source.column(index)]

    def partner(self, index: int) -> int:
        """The unit whose explanation is the control: a neighbour, so that pairs serve each other, and one that
        fires at all."""
        alive = set(self.harvest.indices[self.harvest.maxima > 0].tolist())
        others = sorted(set(self.harvest.indices.tolist()) - {index}, key=lambda one: (abs(one - index), one))
        if index ^ 1 in alive:
            return index ^ 1
        return next((one for one in others if one in alive), others[0] if others else index)

    def output_tokens(self, index: int) -> tuple[Tokens, Tokens]:
        """The tokens the unit's output raises and lowers most; none for a unit of no single direction."""
        logits = self._logits_of(index)
        return ((), ()) if logits is None else self._extremes(logits.astype(np.float64))

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
            self.source, explained.unit.index, value, self.harvest.windows, rows, [fires, silent]
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
