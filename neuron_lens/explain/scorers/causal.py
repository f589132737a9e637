"""Causal scoring: does the explanation tell this unit's effects on the model's predictions from other units'?

The unit is steered or ablated at some places of test texts, and the change of the next-token prediction is recorded
(`effects`, which needs the model and comes from outside: `harvest.effects.UnitEffects`). A judge is shown such records,
half of them of other units of the same model (the random-unit control is in the test itself), and says which are of
the unit described. After the intervention scoring of Paulo et al. (2024), with answers in words instead of the
likelihood of the explanation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import NonNegativeInt

from neuron_lens.errors import RequestError
from neuron_lens.explain.evidence import Evidence
from neuron_lens.explain.explainers.base import prompt_named
from neuron_lens.explain.plan import Plan
from neuron_lens.explain.scorers.batches import ask_in_batches
from neuron_lens.explain.scorers.detection import BinaryScorer
from neuron_lens.explain.scorers.outcome import Outcome, judgements
from neuron_lens.llm import Backend
from neuron_lens.records import Record, Unit

__all__ = ["Causal", "Effect", "Effects"]

_DONE = {"steer": "made stronger", "ablate": "switched off"}
_LISTED = 8


class Effect(Record):
    """What changing a unit did to the next-token prediction at some places of one text.

    `text` ends with the (last) token it was changed at. `raised` and `lowered`: the next tokens whose logit (centred
    over the vocabulary) changed most, most changed first. `divergence`: mean KL(intact || changed) at those places,
    nats. `of`: the document and first token of the window.
    """

    kind: Literal["steer", "ablate"]
    text: str
    raised: tuple[str, ...]
    lowered: tuple[str, ...]
    divergence: float | None = None
    of: tuple[NonNegativeInt, NonNegativeInt] | None = None


# What is known of a unit's effects, strongest evidence first; called once a unit and never with a judge running.
Effects = Callable[[Unit], Sequence[Effect]]


@dataclass(frozen=True, kw_only=True)
class Causal(BinaryScorer):
    """Records of effects, yes or no; `n_firing` of the unit itself and `n_silent` of `random_units`, in turn.

    Raises RequestError without `effects`, or without a random unit other than the one scored. There is no precision at
    the unit's density: effects have none.
    """

    name: ClassVar[str] = "causal"

    effects: Effects | None = None
    random_units: tuple[Unit, ...] = ()

    def check(self, evidence: Evidence, backend: Backend | None) -> None:
        """See `BaseScorer.check`."""
        super().check(evidence, backend)
        if self.effects is None or not any(unit != evidence.unit for unit in self.random_units):
            raise RequestError(
                f"causal scoring of {evidence.unit} needs effects (a callable that changes a unit and records what "
                "happens, such as harvest.effects.UnitEffects) and random_units, other units to compare with"
            )

    def density(self, evidence: Evidence) -> float | None:
        """Effects have none."""
        return None

    def ask(self, evidence: Evidence, explanation: str, backend: Backend | None, seed: int) -> Plan[Outcome]:
        """See `BaseScorer.ask`."""
        records = self._records(evidence.unit, seed)
        asked = ask_in_batches(
            prompt_named(self.name),
            [_shown(effect) for effect, _ in records],
            self.batch,
            lambda shown: {
                "explanation": explanation,
                "records": "\n".join(f"{number}: {record}" for number, record in enumerate(shown, 1)),
            },
        )
        own = [is_own for _, is_own in records]
        return asked.then(lambda answers: judgements(answers, fires=own, natural=[True] * len(own)))

    def _records(self, unit: Unit, seed: int) -> list[tuple[Effect, bool]]:
        assert self.effects is not None, "checked before anything is asked"
        rng = np.random.default_rng([seed, 6])
        own = list(self.effects(unit))[: self.n_firing]
        others = [list(self.effects(other)) for other in self.random_units if other != unit]
        turns = [
            found for place in range(max(map(len, others))) for one in others for found in one[place:][:1]
        ]
        # As many of other units as of this one: the share must not give the answer away.
        records = [(effect, True) for effect in own]
        records += [(effect, False) for effect in turns[: min(self.n_silent, max(len(own), 1))]]
        return [records[place] for place in rng.permutation(len(records))]


def _shown(effect: Effect) -> str:
    return json.dumps(
        {
            "done": _DONE[effect.kind],
            "text": effect.text,
            "more likely": list(effect.raised[:_LISTED]),
            "less likely": list(effect.lowered[:_LISTED]),
        },
        ensure_ascii=False,
    )
