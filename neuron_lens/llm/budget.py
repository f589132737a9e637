"""What calls cost: an estimate before, and a limit that holds while they run.

No table of prices is kept here, since it would be wrong within months: a `Price` is given. Tokens are not
counted with the endpoint's tokenizer, which may be unknown: an estimate takes `BYTES_PER_TOKEN`, and the
limit takes an upper bound (no token is shorter than one byte), which is replaced by what the endpoint reports
as soon as it answers.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from neuron_lens.errors import BackendError
from neuron_lens.llm.request import Request, Usage

__all__ = ["BYTES_PER_TOKEN", "Budget", "BudgetExceeded", "Charge", "Estimate", "Price", "estimate"]

BYTES_PER_TOKEN = 3.0  # of UTF-8; English prose has about 4.5, tables of tokens and numbers about 2.5
_TOKENS_PER_MESSAGE = 16  # what a chat template may add around each message, generously


class BudgetExceeded(BackendError):
    """The next call could exceed the budget, and was not made."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """US dollars (or any one currency) per million tokens read (`prompt`) and written (`completion`)."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(p) and p >= 0 for p in (self.prompt, self.completion)):
            raise BackendError(f"{self}: prices are finite and not negative")

    def of(self, usage: Usage) -> float:
        """What `usage` costs."""
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a list of requests would take.

    calls: to be made. cached: answered already, or repeated in the list. prompt_tokens: about. completion_tokens: at
    most. cost: at the given price, None without one; answers are counted at their longest. Retries and
    repairs come on top.
    """

    calls: int
    cached: int
    prompt_tokens: int
    completion_tokens: int
    cost: float | None

    def __str__(self) -> str:
        cost = "" if self.cost is None else f", at most about {self.cost:.4f} (in the price's currency)"
        return (
            f"{self.calls} calls ({self.cached} more are repeated or answered already), about {self.prompt_tokens} tokens read, "
            f"at most {self.completion_tokens} written{cost}"
        )


def estimate(
    requests: Iterable[Request],
    *,
    price: Price | None = None,
    is_cached: Callable[[Request], bool] | None = None,
    count_tokens: Callable[[str], int] | None = None,
) -> Estimate:
    """Calls, tokens and cost of `requests`, without making any.

    Of structured requests give what is sent first: `asked.sent_to(backend)`. `is_cached` tells requests already
    answered (`CachedBackend.has`); with it, repeated requests count once.
    `count_tokens` counts a text's tokens where the model's tokenizer is at hand.
    """
    calls = cached = 0
    usage = Usage()
    seen: set[str] = set()
    for request in requests:
        key = request.canonical
        if is_cached is not None and (key in seen or is_cached(request)):
            cached += 1
            continue
        seen.add(key)
        calls += 1
        usage += Usage(prompt_tokens=_about(request, count_tokens), completion_tokens=request.max_tokens)
    return Estimate(
        calls=calls,
        cached=cached,
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cost=None if price is None else price.of(usage),
    )


def _about(request: Request, count_tokens: Callable[[str], int] | None) -> int:
    count = count_tokens or (lambda text: math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN))
    return sum(count(text) + 4 for text in request.texts)


def _at_most(request: Request) -> Usage:
    """An upper bound of what one call can use."""
    read = sum(len(text.encode("utf-8", "replace")) + _TOKENS_PER_MESSAGE for text in request.texts)
    schema = len(str(request.json_schema.body)) if request.json_schema is not None else 0
    return Usage(prompt_tokens=read + schema + _TOKENS_PER_MESSAGE, completion_tokens=request.max_tokens)


class Charge:
    """Room set aside for one call. Exactly one of its methods is called once, when the call is over."""

    def __init__(self, budget: Budget, reserved: Usage) -> None:
        self._budget = budget
        self._reserved = reserved

    def settle(self, usage: Usage | None) -> None:
        """The call was answered and used this much; None (not reported) counts as all that was set aside."""
        self._budget._settle(self._reserved, usage or self._reserved, calls=1)

    def settle_in_full(self) -> None:
        """It is unknown what the call used: count all that was set aside."""
        self.settle(self._reserved)

    def release(self) -> None:
        """The call was turned away and used nothing."""
        self._budget._settle(self._reserved, Usage(), calls=0)


class Budget:
    """A limit on calls, tokens or cost that is not exceeded, also with many calls in flight.

    Room for the most a call can use is set aside before it is sent; what it used is counted when it is over. When
    there is no room beside the calls in flight, a call waits for them; when there is none at all, it is refused
    with BudgetExceeded. Answers already in the cache stay, so a run with a new budget goes on from there.
    """

    def __init__(
        self,
        *,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_cost: float | None = None,
        price: Price | None = None,
    ) -> None:
        given = {"max_calls": max_calls, "max_tokens": max_tokens, "max_cost": max_cost}
        if all(limit is None for limit in given.values()):
            raise BackendError("a budget needs a limit: max_calls, max_tokens, or max_cost with a price")
        for name, limit in given.items():
            if limit is not None and not limit >= 0:
                raise BackendError(f"{name} is {limit}; a limit is not negative")
        if max_cost is not None and price is None:
            raise BackendError(
                "max_cost needs the price of tokens: Budget(max_cost=..., price=Price(prompt=..., completion=...))"
            )
        self.max_calls, self.max_tokens, self.max_cost, self.price = max_calls, max_tokens, max_cost, price
        self.calls = 0
        self.usage = Usage()
        self._in_flight: list[Usage] = []
        self._waiting: list[asyncio.Future[None]] = []
        self._lock = threading.Lock()  # one budget may serve event loops of several threads

    @property
    def cost(self) -> float | None:
        """What was spent so far, None without a price."""
        return None if self.price is None else self.price.of(self.usage)

    async def reserve(self, request: Request) -> Charge:
        """Set room aside for one call, waiting for calls in flight when there is too little beside them.

        Raises BudgetExceeded when there would be too little room even without them.
        """
        needed = _at_most(request)
        while True:
            with self._lock:
                if self._over([*self._in_flight, needed]) is None:
                    self._in_flight.append(needed)
                    return Charge(self, needed)
                if not self._in_flight:
                    raise BudgetExceeded(self._refusal(needed))
                change = asyncio.get_running_loop().create_future()
                self._waiting.append(change)
            try:
                await change
            finally:  # a wait that was cancelled must not be woken in a loop that is gone
                with self._lock:
                    self._waiting = [other for other in self._waiting if other is not change]

    def _over(self, reserved: list[Usage]) -> str | None:
        """The limit that would be exceeded if all of `reserved` were used, or None."""
        total = sum(reserved, self.usage)
        if self.max_calls is not None and self.calls + len(reserved) > self.max_calls:
            return f"{self.max_calls} calls"
        if self.max_tokens is not None and total.total_tokens > self.max_tokens:
            return f"{self.max_tokens} tokens"
        if self.max_cost is not None and self.price is not None and self.price.of(total) > self.max_cost:
            return f"a cost of {self.max_cost}"
        return None

    def _refusal(self, needed: Usage) -> str:
        cost = "" if self.cost is None else f", {self.cost:.4f} in cost"
        return (
            f"the budget of {self._over([needed])} leaves no room for the next call, which may take "
            f"{needed.total_tokens} tokens: spent so far are {self.calls} calls, {self.usage.total_tokens} tokens{cost}; "
            "raise the budget and run again: cached answers are not asked for twice"
        )

    def _settle(self, reserved: Usage, used: Usage, *, calls: int) -> None:
        with self._lock:
            self._in_flight.remove(reserved)
            self.calls += calls
            self.usage += used
            waiting, self._waiting = self._waiting, []
        for change in waiting:
            change.get_loop().call_soon_threadsafe(_wake, change)


def _wake(change: asyncio.Future[None]) -> None:
    if not change.done():
        change.set_result(None)
