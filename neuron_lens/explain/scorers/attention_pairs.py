"""Attention heads: which pairs of tokens does the explanation pick out?

A head acts on the pair of a token at which it writes more than the unit's threshold and the token that contributes
most to it (of what a harvest keeps, the only pairs a head is known to act on). As in OpenAI's transformer-debugger
(2024), such pairs stand against pairs below a tenth of the largest write norm, ranked by the area under the ROC curve;
here they are spread over the strata of the write norm, and half of the others are any pairs of the sample on which the
head does not act, the right token with a wrong partner among them, so that precision can be told at the share of pairs
the head acts on. Drawn with a seed, more of them, and with an interval.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

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
from neuron_lens.records import TokenWindow

__all__ = ["AttentionPairsScorer"]

_QUIET = 0.1  # of the largest write norm: below, a head writes next to nothing
_STRATA = 5
_TRIES = 20  # at drawing one pair on which the head does not act


class _Asked(NamedTuple):
    """A pair to ask about. `natural`: drawn as pairs of its sort are in the corpus."""

    pair: Pair
    acts: bool
    natural: bool
    stratum: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionPairsScorer(RankingScorer):
    """`n_firing` pairs the head acts on and `n_silent` others, `batch` a call; see the module.

    `precision_at_density` is of all pairs of a token with itself or one before it in a window of the uniform sample,
    those left out whose token takes most from outside the window; quantiles are of the write norm. Raises RequestError
    for units whose windows hold no pairs.
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
        rng = np.random.default_rng([seed, 8])
        drawn = [*self._acting(evidence, rng), *self._others(evidence, rng)]
        asked = [drawn[index] for index in rng.permutation(len(drawn))]
        plan = PairSimulator(batch=self.batch).plan(explanation, [one.pair for one in asked])
        return plan.then(
            lambda ratings: judgements(
                ratings,
                fires=[one.acts for one in asked],
                natural=[one.natural for one in asked],
                stratum=[one.stratum for one in asked],
            )
        )

    def density(self, evidence: Evidence) -> float | None:
        """The share of pairs of the uniform sample on which the head acts."""
        threshold = evidence.firing_threshold
        acting = pairs = 0
        for _, part in evidence.parts():
            for window in part.random:
                known = [place for place in range(len(window.tokens)) if _known(window, place, threshold)]
                pairs += sum(place + 1 for place in known)
                acting += len(_acting_in(window, threshold))
        return acting / pairs if pairs else None

    def bounds(self, evidence: Evidence) -> dict[int, tuple[float, float]]:
        """The write norms of the weakest and of the strongest pair of each stratum."""
        return {index: (pairs[0].norm, pairs[-1].norm) for index, pairs in enumerate(self._strata(evidence))}

    def _strata(self, evidence: Evidence) -> list[list[Pair]]:
        """The pairs of the sample on which the head acts, weakest first, in strata of equal size."""
        threshold = evidence.firing_threshold
        found = [pair for window in evidence.part(self.part).random for pair in _acting_in(window, threshold)]
        found.sort(key=lambda pair: pair.norm)
        edges = np.linspace(0, len(found), min(_STRATA, len(found)) + 1).astype(int)
        return [found[begin:end] for begin, end in pairwise(edges)]

    def _acting(self, evidence: Evidence, rng: np.random.Generator) -> list[_Asked]:
        """Pairs of the sample, one stratum after the other in turn; then, of a head that hardly acts in it, the
        strongest of other windows."""
        strata = [
            [_Asked(pairs[place], True, True, index) for place in rng.permutation(len(pairs))]
            for index, pairs in enumerate(self._strata(evidence))
        ]
        most = max(map(len, strata), default=0)
        turns = [one for place in range(most) for pairs in strata for one in pairs[place:][:1]]
        part = evidence.part(self.part)
        sampled = {window.identity for window in part.random}
        others = [
            pair
            for window in part.windows
            if window.identity not in sampled
            for pair in _acting_in(window, evidence.firing_threshold)
        ]
        others.sort(key=lambda pair: -pair.norm)
        return [*turns, *(_Asked(pair, True, False) for pair in others)][: self.n_firing]

    def _others(self, evidence: Evidence, rng: np.random.Generator) -> list[_Asked]:
        """Half of them any pairs on which the head does not act, half pairs at tokens where it is quiet."""
        part = evidence.part(self.part)
        below = _QUIET * largest_of(part.windows)
        quiet = [
            (window, place)
            for window in part.windows
            for place, norm in enumerate(window.activations)
            if norm < below and place > 0
        ]
        drawn = [quiet[index] for index in rng.permutation(len(quiet))[: self.n_silent // 2]]
        found = [
            _Asked(Pair(window, place, int(rng.integers(place)), window.activations[place]), False, False)
            for window, place in drawn
        ]
        sample = [window for window in part.random if window.sources is not None]
        natural = _drawn_pairs(sample, evidence.firing_threshold, rng)
        return found + [
            _Asked(pair, False, True)
            for pair, _ in zip(natural, range(self.n_silent - len(found)), strict=False)
        ]


def _acting_in(window: TokenWindow, threshold: float) -> list[Pair]:
    return [pair for pair in pairs_of(window) if pair.norm > threshold]


def _known(window: TokenWindow, place: int, threshold: float) -> bool:
    """Whether it is known on which pair of this token the head acts: its source may lie outside the window."""
    if window.sources is None:
        return False
    return window.activations[place] <= threshold or window.sources[place] >= 0


def _drawn_pairs(
    windows: Sequence[TokenWindow], threshold: float, rng: np.random.Generator
) -> Iterator[Pair]:
    """Pairs on which the head does not act, each once, every one as likely as every other."""
    sizes = np.array([len(window.tokens) * (len(window.tokens) + 1) / 2 for window in windows])
    seen: set[tuple[int, int, int]] = set()
    failed = 0
    while len(windows) and failed < _TRIES:
        number = int(rng.choice(len(windows), p=sizes / sizes.sum()))
        window = windows[number]
        length = len(window.tokens)
        place = int(rng.choice(length, p=np.arange(1, length + 1) / sizes[number]))
        source = int(rng.integers(place + 1))
        acts = window.activations[place] > threshold and (window.sources or ())[place] == source
        if acts or not _known(window, place, threshold) or (number, place, source) in seen:
            failed += 1
            continue
        failed = 0
        seen.add((number, place, source))
        yield Pair(window, place, source, window.activations[place])
