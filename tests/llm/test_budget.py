"""Estimates and limits."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    Budget,
    BudgetExceeded,
    CachedBackend,
    Price,
    RandomFaults,
    Request,
    Response,
    ScriptedBackend,
    Usage,
    complete_all,
    estimate,
    run_all,
)
from tests.llm.asking import ask, asks

PRICE = Price(prompt=1.0, completion=4.0)


def test_an_estimate_counts_calls_tokens_and_cost(tmp_path: Path) -> None:
    requests = [*asks(10), *asks(5)]
    all_calls = estimate(requests, price=PRICE, count_tokens=len)
    assert (all_calls.calls, all_calls.cached, all_calls.completion_tokens) == (15, 0, 15 * 64)
    assert all_calls.prompt_tokens == 15 * (len("question 0") + 4)
    assert all_calls.cost == pytest.approx((all_calls.prompt_tokens + 4 * all_calls.completion_tokens) / 1e6)
    inner = ScriptedBackend(lambda request: "ok")
    backend = CachedBackend(inner, tmp_path / "c")
    assert estimate(requests, is_cached=backend.has).calls == 10
    run_all(backend, asks(4), progress=False)
    left = estimate(requests, is_cached=backend.has)
    assert (left.calls, left.cached, left.cost, inner.calls) == (6, 9, None, 4)
    assert "6 calls" in str(left)


@settings(max_examples=40, deadline=None)
@given(
    limit=st.integers(0, 3000),
    sizes=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 60)), min_size=1, max_size=25),
    concurrency=st.integers(1, 6),
    rate=st.sampled_from([0.0, 0.4]),
)
def test_tokens_are_never_exceeded_and_room_is_used(
    limit: int, sizes: list[tuple[int, int]], concurrency: int, rate: float
) -> None:
    """Each call uses what the sizes say: prompt bytes as tokens, and all of max_tokens."""

    def answer(request: Request) -> Response:
        used = Usage(prompt_tokens=len(request.texts[0]), completion_tokens=request.max_tokens)
        return Response(text="ok", usage=used)

    budget = Budget(max_tokens=limit)
    faults = RandomFaults(rate, ["rate_limited", "bad_request"], attempts=1)
    backend = ScriptedBackend(answer, budget=budget, concurrency=concurrency, faults=faults)
    requests = [ask("x" * length + str(i), max_tokens=most) for i, (length, most) in enumerate(sizes)]
    stopped = False
    try:
        run_all(backend, requests, progress=False)
    except BudgetExceeded:
        stopped = True
    assert budget.usage.total_tokens <= limit
    largest = max(len(request.texts[0].encode()) + request.max_tokens + 32 for request in requests)
    if stopped:
        assert limit - budget.usage.total_tokens < largest  # it was not refused while there was room
    assert not budget._in_flight


def test_cost_is_counted_and_limited() -> None:
    usage = Usage(prompt_tokens=10, completion_tokens=20)
    budget = Budget(max_cost=0.001, price=PRICE)
    backend = ScriptedBackend(lambda request: Response(text="ok", usage=usage), budget=budget)
    with pytest.raises(BudgetExceeded, match=r"a cost of 0\.001 leaves no room"):
        run_all(backend, asks(50), progress=False)
    assert budget.cost == pytest.approx(budget.calls * 90e-6) and budget.cost <= 0.001
    assert budget.calls >= 7


@pytest.mark.parametrize(
    ("fault", "counted"), [("dropped", True), ("server_error", False), ("bad_request", False)]
)
def test_calls_cut_off_count_in_full_and_those_turned_away_do_not(fault: str, counted: bool) -> None:
    budget = Budget(max_calls=100)
    faults = RandomFaults(1.0, [fault])  # type: ignore[list-item]
    run_all(ScriptedBackend(lambda request: "x", faults=faults, budget=budget), [ask("x")], progress=False)
    assert (budget.calls > 0) == counted == (budget.usage.completion_tokens >= 64)


def test_a_budget_outlives_a_run_that_was_cancelled_while_waiting() -> None:
    budget = Budget(max_calls=2)
    backend = ScriptedBackend(lambda request: "x", budget=budget, seconds=0.2, concurrency=4)

    async def cancelled() -> None:
        await asyncio.wait_for(complete_all(backend, asks(4), progress=False), timeout=0.05)

    with pytest.raises(TimeoutError):
        asyncio.run(cancelled())
    assert budget.calls == 2  # cut off, and counted as if they had been answered
    budget.max_calls = 3
    assert len(run_all(backend, [ask("y")], progress=False)) == 1 and budget.calls == 3


def test_an_unreported_usage_counts_as_the_most() -> None:
    budget = Budget(max_calls=5)
    run_all(ScriptedBackend(lambda request: Response(text="x"), budget=budget), [ask("x")], progress=False)
    assert budget.usage.completion_tokens == 64


def test_budgets_and_prices_that_make_no_sense() -> None:
    with pytest.raises(BackendError, match="needs a limit"):
        Budget()
    with pytest.raises(BackendError, match="needs the price"):
        Budget(max_cost=1.0)
    with pytest.raises(BackendError, match="not negative"):
        Budget(max_calls=-1)
    with pytest.raises(BackendError, match="finite"):
        Price(prompt=float("nan"), completion=1.0)
