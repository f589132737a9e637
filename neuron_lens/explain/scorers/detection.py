"""Detection: does the unit fire anywhere in this text? (EleutherAI's Delphi, Paulo et al. 2024.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.rendering import quoted_texts, text_of
from neuron_lens.explain.result import Score
from neuron_lens.explain.scorers.base import BaseScorer
from neuron_lens.explain.scorers.batches import ask_in_batches
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.scorers.outcome import Outcome, binary_figures, judgements_of
from neuron_lens.explain.scores import share_score
from neuron_lens.llm import Backend

__all__ = ["BinaryScorer", "Detection"]


@dataclass(frozen=True, kw_only=True)
class BinaryScorer(BaseScorer):
    """Base of scorers whose judge says yes or no to every example; see `binary_figures`.

    Args:
        n_firing, n_silent: examples of each sort, at most.
        batch: texts a call; more are cheaper, and harder for a small judge.
    """

    headline: ClassVar[str] = "balanced_accuracy"
    chance: ClassVar[float] = 0.5

    n_firing: int = 25
    n_silent: int = 25
    batch: int = 5

    def figures(self, outcome: Outcome, evidence: Evidence, seed: int) -> dict[str, Score]:
        """See `binary_figures`."""
        return binary_figures(outcome, self.density(evidence), seed)

    def quantile_figure(self, outcome: Outcome, evidence: Evidence, seed: int) -> Score:
        """The recall in the stratum: what is silent is the same for all."""
        true = outcome.fires & (outcome.true[:, 0] > 0.5)
        return share_score(outcome.predicted[true, 0] > 0.5, outcome.given[true])


@dataclass(frozen=True, kw_only=True)
class Detection(BinaryScorer):
    """Whole texts, yes or no; see `BinaryScorer`."""

    name: ClassVar[str] = "detection"

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        examples = draw_examples(evidence, self.part, firing=self.n_firing, silent=self.n_silent, seed=seed)
        asked = ask_in_batches(
            prompt_named(self.name),
            [text_of(example.window) for example in examples],
            self.batch,
            lambda texts: {"explanation": explanation, "texts": quoted_texts(texts)},
        )
        return asked.then(lambda answers: judgements_of(examples, answers))
