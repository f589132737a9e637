"""Windows the unit fires in beside ones that look alike and in which it stays silent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import JudgeExplainer, most_active
from neuron_lens.explain.explainers.max_activating import highlighted
from neuron_lens.explain.rendering import largest_of, marks_for, quoted_texts, text_of

__all__ = ["Contrastive"]


@dataclass(frozen=True, kw_only=True)
class Contrastive(JudgeExplainer):
    """Near misses first; where the harvest kept too few, silent windows of the sample fill up.

    `n_silent`: how many silent windows are shown, at most. Raises RequestError when there is none at all.
    """

    name: ClassVar[str] = "contrastive"
    n_silent: int = 5

    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """Both lists of texts."""
        shown = most_active(evidence, self.n_windows)
        train = evidence.train
        candidates = (*train.near_misses, *train.random)
        silent = {w.identity: w for w in candidates if not evidence.fires(w)}
        if not silent:
            raise RequestError(
                f"{evidence.unit} has no training window in which it is silent, and nothing to be contrasted with; "
                "harvest a random sample or near misses, or take another explainer"
            )
        against = list(silent.values())[: self.n_silent]
        begin, end = marks = marks_for((*shown, *against))
        return {
            "begin": begin,
            "end": end,
            "texts": highlighted(shown, evidence.firing_threshold, largest_of(shown), marks),
            "silent": quoted_texts(map(text_of, against)),
        }
