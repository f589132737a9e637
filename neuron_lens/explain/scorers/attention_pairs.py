"""Attention heads: which pairs of tokens does the explanation pick out?

As in OpenAI's transformer-debugger (2024): the strongest pairs against pairs below a tenth of the largest write norm,
ranked by the area under the ROC curve; drawn with a seed, more of them, and with an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.attention_pairs import Pair, pairs_of
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import largest_of
from neuron_lens.explain.scorers.outcome import Outcome, judgements
from neuron_lens.explain.scorers.ranking import RankingScorer
from neuron_lens.explain.simulators.attention_pairs import PairSimulator
from neuron_lens.llm import Backend

__all__ = ["AttentionPairsScorer"]

_SILENT = 0.1  # of the largest write norm: below, a pair counts as one the head does not act on


@dataclass(frozen=True, kw_only=True)
class AttentionPairsScorer(RankingScorer):
    """`n_firing` strong pairs (above the unit's threshold, one a token) and `n_silent` weak ones, `batch` a call.

    Raises RequestError for units whose windows hold no pairs. There is no precision at the unit's density: that of
    pairs is not known.
    """

    name: ClassVar[str] = "attention_pairs"

    batch: int = 5

    def prompt(self, backend: Backend | None) -> str:
        """The version of the prompt used."""
        return PairSimulator().prompt

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        super().check(evidence, backend)
        if all(window.sources is None for window in evidence.part(self.part).windows):
            raise RequestError(
                f"the {self.part} windows of {evidence.unit} hold no pairs of tokens (TokenWindow.sources): attention "
                "pairs are scored of heads that were harvested by token pair"
            )

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        pairs = self._pairs(evidence, seed)
        asked = PairSimulator(batch=self.batch).plan(explanation, [pair for pair, _ in pairs])
        strong = [is_strong for _, is_strong in pairs]
        return asked.then(lambda ratings: judgements(ratings, fires=strong, natural=[False] * len(strong)))

    def _pairs(self, evidence: Evidence, seed: int) -> list[tuple[Pair, bool]]:
        rng = np.random.default_rng([seed, 8])
        windows = evidence.part(self.part).windows
        found = sorted((pair for window in windows for pair in pairs_of(window)), key=lambda pair: -pair.norm)
        strong = [pair for pair in found if pair.norm > evidence.firing_threshold][: self.n_firing]
        below = _SILENT * largest_of(windows)
        # Where the head writes little, no pair matters much.
        quiet = [
            (window, place)
            for window in windows
            for place, norm in enumerate(window.activations)
            if norm < below and place > 0
        ]
        drawn = rng.permutation(len(quiet))[: self.n_silent]
        weak = [
            Pair(window, place, int(rng.integers(place)), window.activations[place])
            for window, place in (quiet[index] for index in drawn)
        ]
        pairs = [(pair, True) for pair in strong] + [(pair, False) for pair in weak]
        return [pairs[index] for index in rng.permutation(len(pairs))]
