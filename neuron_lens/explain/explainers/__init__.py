"""Explainers: from what was seen of a unit to a sentence. See `base`.

token_statistics         rules over tokens, fitted; no judge, no network
token_activation_pairs   every token with its activation from 0 to 10
max_activating           texts with the firing tokens marked
contrastive              the same, beside texts in which it is silent
logit_weights            what it reads and promotes by its weights
attention_pairs          which token attends to which (heads)
"""

from __future__ import annotations

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.explainers.attention_pairs import AttentionPairs
from neuron_lens.explain.explainers.base import Candidate, Explainer, JudgeExplainer
from neuron_lens.explain.explainers.contrastive import Contrastive
from neuron_lens.explain.explainers.logit_weights import LogitWeights
from neuron_lens.explain.explainers.max_activating import MaxActivating
from neuron_lens.explain.explainers.token_activation_pairs import TokenActivationPairs
from neuron_lens.explain.explainers.token_statistics import TokenStatistics

__all__ = [
    "EXPLAINERS",
    "AttentionPairs",
    "Candidate",
    "Contrastive",
    "Explainer",
    "JudgeExplainer",
    "LogitWeights",
    "MaxActivating",
    "TokenActivationPairs",
    "TokenStatistics",
    "explainer_named",
]

EXPLAINERS: dict[str, type[JudgeExplainer] | type[TokenStatistics]] = {
    explainer.name: explainer
    for explainer in (
        TokenStatistics,
        TokenActivationPairs,
        MaxActivating,
        Contrastive,
        LogitWeights,
        AttentionPairs,
    )
}


def explainer_named(name: str) -> type[JudgeExplainer] | type[TokenStatistics]:
    """The explainer of that name. Raises RequestError for one there is not."""
    if name not in EXPLAINERS:
        raise RequestError(f"there is no explainer {name!r}; {did_you_mean(name, EXPLAINERS)}")
    return EXPLAINERS[name]
