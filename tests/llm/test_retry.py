"""When calls are made again, and after how long."""

from __future__ import annotations

import asyncio
import email.utils

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.llm import CallFailed, Retry, TransientFailure
from neuron_lens.llm.retry import parse_retry_after, retrying


@given(st.integers(1, 40), st.floats(0, 1, exclude_max=True), st.none() | st.floats(0, 1000))
def test_waits_grow_within_bounds_and_honour_the_server(
    failures: int, draw: float, asked: float | None
) -> None:
    retry = Retry(base=0.5, longest=20.0)
    delay = retry.delay(failures, asked, draw)
    assert delay >= (asked or 0.0)
    assert delay <= max(asked or 0.0, min(20.0, 0.5 * 2 ** (failures - 1)))
    assert retry.delay(failures + 1, asked, draw) >= delay


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": email.utils.formatdate(1_000_060, usegmt=True)}, 60.0),
        ({"retry-after": email.utils.formatdate(999_000, usegmt=True)}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert parse_retry_after(headers, now=1_000_000.0) == seconds


@pytest.mark.parametrize("error", [CallFailed("400"), BackendError("401"), KeyError("bug")])
def test_only_passing_failures_are_tried_again(error: Exception) -> None:
    calls = 0

    async def attempt() -> None:
        nonlocal calls
        calls += 1
        raise error

    with pytest.raises(type(error)):
        asyncio.run(retrying(attempt, Retry(base=0)))
    assert calls == 1


def test_attempts_are_counted() -> None:
    calls = 0

    async def attempt() -> int:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise TransientFailure("not yet")
        return calls

    assert asyncio.run(retrying(attempt, Retry(attempts=4, base=0))) == 4
    calls = 0
    with pytest.raises(CallFailed, match="3 attempts"):
        asyncio.run(retrying(attempt, Retry(attempts=3, base=0)))
    with pytest.raises(BackendError, match="at least 1"):
        Retry(attempts=0)
