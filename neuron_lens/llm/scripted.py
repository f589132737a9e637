"""A judge made of a function: deterministic, offline, for tests, and able to fail in the ways real ones do."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

from neuron_lens.errors import BackendError, did_you_mean
from neuron_lens.llm.backend import AttemptingBackend, Capabilities
from neuron_lens.llm.budget import Budget
from neuron_lens.llm.request import Request, Response, Usage
from neuron_lens.llm.retry import CallFailed, Retry, TransientFailure

__all__ = ["Fault", "RandomFaults", "ScriptedBackend"]

# Failures of transport (rate_limited, server_error, dropped, bad_request), and of the answer itself.
Fault = Literal[
    "rate_limited",
    "server_error",
    "dropped",
    "bad_request",
    "slow",
    "truncated",
    "fenced",
    "prose",
    "refusal",
    "empty",
]
FaultOf = Callable[[Request, int], Fault | None]
_ALL = Capabilities(
    chat=True,
    completion=True,
    logprobs=True,
    prompt_logprobs=True,
    json_schema=True,
    max_top_logprobs=1_000_000,
)


class RandomFaults:
    """One of `faults` for a share `rate` of all requests, drawn from the request and `seed`: order does not matter.

    The first `attempts` attempts at such a request fail; None: all of them, and so the request.
    """

    def __init__(
        self, rate: float, faults: Sequence[Fault], *, seed: int = 0, attempts: int | None = None
    ) -> None:
        unknown = set(faults) - set(get_args(Fault))
        if unknown or not faults or not 0 <= rate <= 1:
            raise BackendError(
                f"expected a rate from 0 to 1 and faults out of {', '.join(get_args(Fault))}; got {rate} and {list(faults)}"
            )
        self.rate, self.faults, self.seed, self.attempts = rate, tuple(faults), seed, attempts

    def __call__(self, request: Request, attempt: int) -> Fault | None:
        """The fault of this attempt (1 is the first), or None."""
        digest = hashlib.sha256(f"{self.seed}\n{request.canonical}".encode()).digest()
        failing = int.from_bytes(digest[:8]) < self.rate * 2**64
        if not failing or (self.attempts is not None and attempt > self.attempts):
            return None
        return self.faults[digest[8] % len(self.faults)]


class ScriptedBackend(AttemptingBackend):
    """Answers from a script.

    Args:
        script: a function of the request that gives a text or a whole Response; or a table from the last message (or
            the prompt) to the text. A function may raise the errors backends raise.
        faults: what goes wrong at which attempt at a request (1 is the first); None for nothing.
        seconds: how long an answer takes. A "slow" one takes ten times as long, and at least 0.05 s.
        name: the model's name; part of what cached answers are stored under, so give scripts that differ their own.
        capabilities, concurrency, retry, budget: see `AttemptingBackend`; by default it can do everything and waits no time
            between attempts.

    Attributes:
        requests: every attempt, in order. calls: how many. attempts: how many at each request (by `Request.canonical`).
        most_in_flight: the largest number of attempts that ran at once.
    """

    def __init__(
        self,
        script: Callable[[Request], str | Response] | Mapping[str, str],
        *,
        faults: FaultOf | None = None,
        seconds: float = 0.0,
        name: str = "scripted",
        capabilities: Capabilities = _ALL,
        concurrency: int = 8,
        retry: Retry | None = None,
        budget: Budget | None = None,
    ) -> None:
        super().__init__(
            kind="scripted",
            model=name,
            capabilities=capabilities,
            concurrency=concurrency,
            retry=retry or Retry(base=0.0),
            budget=budget,
        )
        self._script = script
        self._faults = faults
        self._seconds = seconds
        self.requests: list[Request] = []
        self.attempts: Counter[str] = Counter()
        self.most_in_flight = 0
        self._in_flight = 0

    @property
    def calls(self) -> int:
        """How many attempts were made."""
        return len(self.requests)

    async def _attempt(self, request: Request) -> Response:
        self.requests.append(request)
        self.attempts[request.canonical] += 1
        fault = self._faults(request, self.attempts[request.canonical]) if self._faults else None
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            await asyncio.sleep(max(0.05, 10 * self._seconds) if fault == "slow" else self._seconds)
        finally:
            self._in_flight -= 1
        _fail(fault)
        response = self._answer(request)
        return response if fault is None else _spoiled(response, fault)

    def _answer(self, request: Request) -> Response:
        if isinstance(self._script, Mapping):
            asked = request.texts[-1]
            if asked not in self._script:
                raise BackendError(
                    f"the script has no answer to {asked[:80]!r}; {did_you_mean(asked, self._script)}"
                )
            answer: str | Response = self._script[asked]
        else:
            answer = self._script(request)
        if isinstance(answer, Response):
            return answer
        read = sum(len(text.split()) for text in request.texts)
        return Response(
            text=answer,
            usage=Usage(prompt_tokens=read, completion_tokens=min(len(answer.split()), request.max_tokens)),
            model=self.model,
        )


def _fail(fault: Fault | None) -> None:
    if fault == "rate_limited":
        raise TransientFailure("status 429: slow down", retry_after=0.0)
    if fault == "server_error":
        raise TransientFailure("status 500: out of order")
    if fault == "dropped":
        raise TransientFailure("the connection was dropped", answered=False)
    if fault == "bad_request":
        raise CallFailed("status 400: this request is not understood")


def _spoiled(response: Response, fault: Fault) -> Response:
    """The answer with something wrong about it; a slow one has nothing wrong."""
    text = response.text
    if fault == "refusal":
        return response.model_copy(
            update={
                "text": "",
                "finish_reason": "refused",
                "refusal": "I cannot help with that.",
                "tokens": None,
            }
        )
    changes: dict[Fault, dict[str, object]] = {
        "truncated": {"text": text[: len(text) // 2], "finish_reason": "length"},
        "fenced": {"text": f"```json\n{text}\n```"},
        "prose": {"text": f"Certainly! Here it is:\n\n{text}\n\nLet me know if I can help further."},
        "empty": {"text": "", "tokens": None},
    }
    return response.model_copy(update=changes.get(fault, {}))
