"""Scorers: how well an explanation tells what a unit does, with intervals, coverage and controls. See `base`.

detection         does it fire anywhere in this text?                          any chat judge
fuzzing           are these the tokens it fires at?                            any chat judge
graded_detection, graded_fuzzing
                  the same, by the probability of "yes"                        a chat judge with logprobs
intruder          in which of these texts does it not fire?                    any chat judge
simulation        how strongly does it fire at each token?                     any chat judge, or prompt_logprobs
ablate_to_simulation
                  does the model do the same with the simulation in its place? as simulation (or a rule), and the model
attention_pairs   does the head act from this token on that one?               any chat judge; heads
causal            are these its effects on the prediction?                     any chat judge or prompt_logprobs, and
                                                                               the model itself
surprisal         is the text likelier, knowing the explanation?               prompt_logprobs
embedding         is the text nearer to the explanation?                       an embedder, no judge
"""

from __future__ import annotations

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.explain.scorers.ablation import AblateToSimulation, Remembered, SimulatedDivergences
from neuron_lens.explain.scorers.attention_pairs import AttentionPairsScorer
from neuron_lens.explain.scorers.base import (
    NULL_EXPLANATION,
    BaseScorer,
    QuantileScore,
    Scorer,
    ScorerControl,
    ScorerResult,
)
from neuron_lens.explain.scorers.causal import Causal, Effect, Effects
from neuron_lens.explain.scorers.causal_likelihood import CausalLikelihood, Continuation, Continuations
from neuron_lens.explain.scorers.detection import Detection
from neuron_lens.explain.scorers.embedders import (
    BagOfWords,
    Embedder,
    EmbeddingEndpoint,
    SentenceTransformer,
    embedder_named,
)
from neuron_lens.explain.scorers.embedding import Embedding
from neuron_lens.explain.scorers.embedding_cache import EmbeddingCache
from neuron_lens.explain.scorers.fuzzing import Fuzzing
from neuron_lens.explain.scorers.graded import GradedDetection, GradedFuzzing
from neuron_lens.explain.scorers.intruder import Intruder
from neuron_lens.explain.scorers.simulation import Simulation
from neuron_lens.explain.scorers.surprisal import Surprisal

__all__ = [
    "NULL_EXPLANATION",
    "SCORERS",
    "AblateToSimulation",
    "AttentionPairsScorer",
    "BagOfWords",
    "BaseScorer",
    "Causal",
    "CausalLikelihood",
    "Continuation",
    "Continuations",
    "Detection",
    "Effect",
    "Effects",
    "Embedder",
    "Embedding",
    "EmbeddingCache",
    "EmbeddingEndpoint",
    "Fuzzing",
    "GradedDetection",
    "GradedFuzzing",
    "Intruder",
    "QuantileScore",
    "Remembered",
    "Scorer",
    "ScorerControl",
    "ScorerResult",
    "SentenceTransformer",
    "SimulatedDivergences",
    "Simulation",
    "Surprisal",
    "embedder_named",
    "scorer_named",
]

SCORERS: dict[str, type[BaseScorer]] = {
    scorer.name: scorer
    for scorer in (
        Detection,
        Fuzzing,
        GradedDetection,
        GradedFuzzing,
        Intruder,
        Simulation,
        AblateToSimulation,
        AttentionPairsScorer,
        Causal,
        Surprisal,
        Embedding,
    )
}


def scorer_named(name: str) -> type[BaseScorer]:
    """The scorer of that name. Raises RequestError for one there is not."""
    if name not in SCORERS:
        raise RequestError(f"there is no scorer {name!r}; {did_you_mean(name, SCORERS)}")
    return SCORERS[name]
