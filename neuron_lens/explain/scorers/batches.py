"""One answer for each of some texts, several texts a call: the form most scorers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from neuron_lens.explain.plan import Answer, Plan
from neuron_lens.llm import Missing, Prompt, Request, StructuredRequest

__all__ = ["YesOrNo", "ask_in_batches"]

_TOKENS_AN_ANSWER, _TOKENS_AROUND = 8, 64


class YesOrNo(BaseModel):
    """One answer a text, in order."""

    model_config = ConfigDict(extra="forbid")
    answers: list[bool]


def ask_in_batches(
    prompt: Prompt,
    texts: Sequence[str],
    batch: int,
    render: Callable[[Sequence[str]], dict[str, Any]],
    shape: type[BaseModel] = YesOrNo,
    field: str = "answers",
) -> Plan[list[float | None]]:
    """A number (yes is 1, no is 0), or None (missing), for each text; `render` gives the prompt's slots for some texts.

    `shape` is the answer's type, and `field` its list. The last batch may be smaller than the others.
    """
    batches = [texts[begin : begin + batch] for begin in range(0, len(texts), batch)]
    calls = tuple(
        StructuredRequest(
            request=Request(
                messages=prompt.messages(**render(some)),
                max_tokens=_TOKENS_AROUND + _TOKENS_AN_ANSWER * len(some),
                prompt_version=prompt.version,
            ),
            shape=shape,
            lengths={field: len(some)},
            name=field,
        )
        for some in batches
    )

    def read(answers: Sequence[Answer]) -> list[float | None]:
        found: list[float | None] = []
        for some, answer in zip(batches, answers, strict=True):
            missing = isinstance(answer, Missing)
            found += [None] * len(some) if missing else [float(value) for value in getattr(answer, field)]
        return found

    return Plan(calls, read)
