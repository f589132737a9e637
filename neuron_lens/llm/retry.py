"""Calling again after failures that deserve it: exponential back-off with full jitter, within bounds.

A server's own Retry-After is honoured when it asks for longer than the back-off would wait. The jitter is
uniform over the whole interval, which spreads clients that failed together ("Exponential Backoff and Jitter",
AWS Architecture Blog, 2015).
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from neuron_lens.errors import BackendError

__all__ = ["AttemptsExhausted", "CallFailed", "Retry", "TransientFailure", "parse_retry_after", "retrying"]

T = TypeVar("T")
_log = logging.getLogger(__name__)


class CallFailed(BackendError):
    """This one call failed for good; others may succeed. A plain `BackendError` means that none will."""


class TransientFailure(CallFailed):
    """This call failed in a way that may pass: worth another attempt.

    Attributes:
        retry_after: seconds the server asks to wait, or None.
        answered: whether the server answered at all; a call that was cut off may still have been paid for.
    """

    def __init__(self, message: str, *, retry_after: float | None = None, answered: bool = True) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.answered = answered


class AttemptsExhausted(CallFailed):
    """Every attempt at this call failed in a way that might have passed."""


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and how patiently to call again. Times in seconds.

    `attempts` counts the first one. The wait before attempt n + 1 is drawn from [0, min(longest, base · 2ⁿ⁻¹)].
    A Retry-After beyond `longest_retry_after` ends the attempts: the call has failed.
    """

    attempts: int = 6
    base: float = 1.0
    longest: float = 60.0
    longest_retry_after: float = 300.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.base, self.longest, self.longest_retry_after) < 0:
            raise BackendError(f"{self}: attempts must be at least 1 and no time negative")

    def delay(self, failures: int, retry_after: float | None, draw: float) -> float:
        """Seconds to wait after so many failures in a row; `draw` is uniform in [0, 1)."""
        backoff = draw * min(self.longest, self.base * 2.0 ** (failures - 1))
        return max(backoff, retry_after or 0.0)


async def retrying(attempt: Callable[[], Awaitable[T]], retry: Retry) -> T:
    """The result of `attempt`, called again after each TransientFailure as `retry` says.

    Raises AttemptsExhausted, naming the last failure, when the attempts are used up; other errors pass at once.
    """
    for failures in range(1, retry.attempts + 1):
        try:
            return await attempt()
        except TransientFailure as error:
            if failures == retry.attempts:
                raise AttemptsExhausted(f"{error} (given up after {failures} attempts)") from error
            if error.retry_after is not None and error.retry_after > retry.longest_retry_after:
                raise AttemptsExhausted(
                    f"{error} (it asks to wait {error.retry_after:.0f} s, longer than the "
                    f"{retry.longest_retry_after:.0f} s allowed by Retry.longest_retry_after)"
                ) from error
            wait = retry.delay(failures, error.retry_after, random.random())
            _log.info("attempt %d failed (%s); trying again in %.1f s", failures, error, wait)
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def parse_retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds asked for by `retry-after-ms` or `Retry-After` (seconds or an HTTP date; RFC 9110, 10.2.3), else None.

    `headers` must look names up without regard to case. Unreadable values and times gone by count as not given.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            try:
                date = email.utils.parsedate_to_datetime(value)
            except ValueError:
                continue
            seconds = date.timestamp() - (time.time() if now is None else now)
        if 0 < seconds < float("inf"):
            return seconds
    return None
