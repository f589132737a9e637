"""Requests the tests are made of."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from neuron_lens.llm import Message, Request, StructuredRequest


def ask(text: str, **fields: Any) -> Request:
    """One user message."""
    return Request(**{"messages": (Message(role="user", content=text),), "max_tokens": 64, **fields})


def asks(count: int) -> list[Request]:
    """Different requests."""
    return [ask(f"question {i}") for i in range(count)]


class Marks(BaseModel):
    """A mark for each of some texts."""

    model_config = ConfigDict(extra="forbid")
    marks: list[int]


def four(marks: Marks) -> None:
    """Refuse anything but four marks."""
    if len(marks.marks) != 4:
        raise ValueError(f"expected 4 marks, got {len(marks.marks)}")


def ask_marks(text: str = "mark these four texts") -> StructuredRequest[Marks]:
    """Four marks."""
    return StructuredRequest(request=ask(text), shape=Marks, check=four, name="marks")


def marks(values: Iterable[int]) -> str:
    """The answer to `ask_marks`, as JSON."""
    return json.dumps({"marks": list(values)})
