"""The classic explainer: every token of a few windows with its activation from 0 to 10.

The form is that of OpenAI's "Language models can explain neurons in language models" (2023); the words are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import JudgeExplainer, most_active
from neuron_lens.explain.rendering import activation_table, largest_of

__all__ = ["TokenActivationPairs"]


@dataclass(frozen=True, kw_only=True)
class TokenActivationPairs(JudgeExplainer):
    """Shows `token<tab>activation` lines; zeros are left out in a second listing where most are zero."""

    name: ClassVar[str] = "token_activation_pairs"
    n_windows: int = 5

    def slots(self, evidence: Evidence) -> dict[str, Any]:
        """The table."""
        shown = most_active(evidence, self.n_windows)
        return {"activations": activation_table(shown, largest_of(shown))}
