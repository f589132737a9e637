"""Calls to make and what to make of their answers: explainers and scorers say both at once, before anything is asked.

Because a plan is made without asking, the calls of many units run side by side, an estimate of their cost needs no
second code path, and a run that was killed makes the same calls again, which a cache answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from neuron_lens.errors import RequestError
from neuron_lens.llm import (
    Backend,
    Missing,
    Request,
    Response,
    StructuredRequest,
    run_all,
    run_all_structured,
)

__all__ = ["Answer", "Call", "Plan", "carry_out", "missing_kinds", "requests_of"]

Call = Request | StructuredRequest[Any]
# A Response to a Request, the value to a StructuredRequest, or Missing.
Answer = Any

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, eq=False)
class Plan(Generic[T]):
    """Some calls, and `read`, which turns their answers (in the order of the calls) into a result."""

    calls: tuple[Call, ...]
    read: Callable[[Sequence[Answer]], T]

    def then(self, change: Callable[[T], U]) -> Plan[U]:
        """The same calls, with something done to the result."""
        return Plan(self.calls, lambda answers: change(self.read(answers)))

    def beside(self, other: Plan[U]) -> Plan[tuple[T, U]]:
        """This plan and one of another kind, as one."""
        n = len(self.calls)
        return Plan(
            (*self.calls, *other.calls), lambda answers: (self.read(answers[:n]), other.read(answers[n:]))
        )

    @staticmethod
    def joined(plans: Sequence[Plan[U]]) -> Plan[list[U]]:
        """Several plans as one."""
        ends = [0]
        for plan in plans:
            ends.append(ends[-1] + len(plan.calls))

        def read(answers: Sequence[Answer]) -> list[U]:
            return [
                plan.read(answers[begin:end])
                for plan, begin, end in zip(plans, ends[:-1], ends[1:], strict=True)
            ]

        return Plan(tuple(call for plan in plans for call in plan.calls), read)


def carry_out(
    backend: Backend | None, plans: Sequence[Plan[T]], *, progress: bool = False, description: str = "asking"
) -> list[T]:
    """The results of the plans, in order; their calls run side by side, and equal calls once.

    Raises BackendError when no further call can be answered; a call that failed alone is Missing in what is read.
    Without a backend, plans that make calls are refused with RequestError.
    """
    whole = Plan.joined(plans)
    if backend is None:
        if whole.calls:
            raise RequestError(
                f"{len(whole.calls)} calls are to be made, and there is no backend to make them of"
            )
        return whole.read([])
    distinct: dict[str, Call] = {}
    keys = [_key(call) for call in whole.calls]
    for key, call in zip(keys, whole.calls, strict=True):
        distinct.setdefault(key, call)
    plain = {key: call for key, call in distinct.items() if isinstance(call, Request)}
    formed = {key: call for key, call in distinct.items() if isinstance(call, StructuredRequest)}
    answers: dict[str, Response | Missing | Any] = {}
    if plain:
        replies = run_all(backend, list(plain.values()), progress=progress, description=description)
        answers |= dict(zip(plain, replies, strict=True))
    if formed:
        values = run_all_structured(
            backend, list(formed.values()), progress=progress, description=description
        )
        answers |= dict(zip(formed, values, strict=True))
    return whole.read([answers[key] for key in keys])


def requests_of(plans: Iterable[Plan[Any]], backend: Backend) -> list[Request]:
    """The requests the plans begin with, as they would be sent: for `llm.estimate`. Repairs come on top."""
    return [
        call if isinstance(call, Request) else call.sent_to(backend) for plan in plans for call in plan.calls
    ]


def missing_kinds(answers: Iterable[Answer]) -> dict[str, int]:
    """How many answers are missing, by kind."""
    kinds = Counter(answer.kind for answer in answers if isinstance(answer, Missing))
    return dict(sorted(kinds.items()))


def _key(call: Call) -> str:
    if isinstance(call, Request):
        return call.canonical
    # What a check demands follows from the request, except for the type itself.
    return f"{call.name} {call.shape!r} {call.repairs} {call.request.canonical}"
