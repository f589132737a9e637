"""Base of scorers whose judge says more or less rather than yes or no."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.base import BaseScorer
from neuron_lens.explain.scorers.outcome import Outcome, ranking_figures
from neuron_lens.explain.scores import auc

__all__ = ["RankingScorer"]


@dataclass(frozen=True, kw_only=True)
class RankingScorer(BaseScorer):
    """Ranked by the area under the ROC curve; see `ranking_figures`. `n_firing`, `n_silent`: examples, at most."""

    headline: ClassVar[str] = "auc"
    chance: ClassVar[float] = 0.5

    n_firing: int = 25
    n_silent: int = 25

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See `ranking_figures`."""
        return ranking_figures(outcome, self.density(evidence), seed)

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The area under the curve."""
        return auc(outcome.predictions, 0.5, seed)
