"""Records in, explanations and scores out: everything here runs without torch.

`pipeline` is the exception by intent: it brings the model, the harvest and this package together, and
imports them when it is run. The names below are loaded on first use.

One unit by hand: `Evidence` is what was seen of it, an explainer makes sentences of its training windows, a scorer says
how well a sentence tells its test windows. (`Evidence.of` makes it of a harvested unit; a puzzle is a planted one.)

    >>> from neuron_lens.explain.explainers import TokenStatistics
    >>> from neuron_lens.explain.puzzles import puzzle_named
    >>> from neuron_lens.explain.scorers import Embedding
    >>> evidence = puzzle_named("bank").evidence()
    >>> (candidate,) = TokenStatistics().explain(evidence)
    >>> candidate.sentence
    "Fires strongly on the token ' bank'."
    >>> result = Embedding(embedder="bag_of_words").score(evidence, candidate.sentence, None, seed=0)
    >>> result.score.value > result.chance, [control.name for control in result.controls]
    (True, ['null', 'shuffled'])

With a judge (`neuron_lens.llm`): `MaxActivating(n_candidates=4).explain(evidence, judge)`, the choice among the
candidates by `best_of.best_of(evidence, candidates, Detection(), judge, seed=0)`, then
`Fuzzing().score(evidence, sentence, judge, seed=0)`. Every explainer and scorer also has `plan`, which makes no call:
`plan.carry_out(judge, plans)` makes those of many units side by side.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuron_lens.explain.pipeline import Pipeline
    from neuron_lens.explain.result import RunResult, UnitResult

__all__ = ["Pipeline", "RunResult", "UnitResult"]

_MODULES = {"Pipeline": "pipeline", "RunResult": "result", "UnitResult": "result"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
