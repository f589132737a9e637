"""Many requests, in order, with a bar: what scripts call. Interrupt it and run it again: a cache carries it on."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from neuron_lens.errors import BackendError
from neuron_lens.llm.backend import Backend
from neuron_lens.llm.request import Missing, Request, Response
from neuron_lens.llm.retry import AttemptsExhausted, CallFailed
from neuron_lens.llm.structured import StructuredRequest, answer_of, complete_structured

__all__ = ["complete_all", "complete_all_structured", "run_all", "run_all_structured"]

T = TypeVar("T")

# So many calls in a row whose every attempt failed, with no answer between, are an endpoint that is gone: the
# run stops and says so.
MAX_FAILURES_IN_A_ROW = 50


def run_all(
    backend: Backend, requests: Sequence[Request], *, progress: bool = True, description: str = "requests"
) -> list[Response | Missing]:
    """The answers to `requests`, in their order; Missing where one failed, was refused, or is empty.

    At most `backend.concurrency` are in flight. May be called in a notebook. Interrupting it (or killing the
    process) loses the calls in flight only, when the backend is a `CachedBackend`.

    Raises BackendError when no further request can be answered (no access, budget used up, endpoint gone); calls in
    flight are finished first, so that the cache keeps what was paid for.
    """
    return _run(complete_all(backend, requests, progress=progress, description=description))


def run_all_structured(
    backend: Backend,
    asked: Sequence[StructuredRequest[T]],
    *,
    progress: bool = True,
    description: str = "requests",
) -> list[T | Missing]:
    """The values asked for, in order; Missing where there is none. Otherwise as `run_all`."""
    return _run(complete_all_structured(backend, asked, progress=progress, description=description))


async def complete_all(
    backend: Backend, requests: Sequence[Request], *, progress: bool = True, description: str = "requests"
) -> list[Response | Missing]:
    """`run_all` for callers that have an event loop."""

    async def answer(request: Request) -> Response | Missing:
        return answer_of(await backend.complete(request), request)

    return await _gather(backend, requests, answer, progress, description)


async def complete_all_structured(
    backend: Backend,
    asked: Sequence[StructuredRequest[T]],
    *,
    progress: bool = True,
    description: str = "requests",
) -> list[T | Missing]:
    """`run_all_structured` for callers that have an event loop."""

    async def answer(one: StructuredRequest[T]) -> T | Missing:
        return await complete_structured(backend, one)

    return await _gather(backend, asked, answer, progress, description)


A = TypeVar("A")


async def _gather(
    backend: Backend,
    asked: Sequence[A],
    answer: Callable[[A], Awaitable[T | Missing]],
    progress: bool,
    description: str,
) -> list[T | Missing]:
    results: dict[int, T | Missing] = {}
    todo = iter(enumerate(asked))
    fatal: list[BackendError] = []
    missing = failures_in_a_row = 0

    async def work(bar: tqdm[Any]) -> None:
        nonlocal missing, failures_in_a_row
        for index, one in todo:
            try:
                results[index] = await answer(one)
                failures_in_a_row = 0
            except CallFailed as error:
                results[index] = Missing(kind="failed", reason=str(error))
                # a call that is turned away for what it asks shows that the endpoint is there
                failures_in_a_row = failures_in_a_row + 1 if isinstance(error, AttemptsExhausted) else 0
                if failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                    fatal.append(
                        BackendError(f"{failures_in_a_row} calls in a row failed, the last one: {error}")
                    )
            except BackendError as error:
                fatal.append(error)
            if index in results:
                missing += isinstance(results[index], Missing)
                bar.set_postfix({"missing": missing}, refresh=False)
                bar.update()
            if fatal:
                return

    bar = tqdm(total=len(asked), desc=description, disable=not progress)
    workers = [asyncio.ensure_future(work(bar)) for _ in range(min(backend.concurrency, len(asked)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await backend.aclose()
        bar.close()
    if fatal:
        answered = sum(not isinstance(result, Missing) for result in results.values())
        raise type(fatal[0])(
            f"{fatal[0]} (stopped with {answered} of {len(asked)} requests answered)"
        ) from fatal[0]
    return [results[index] for index in range(len(asked))]


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in a thread of its own where an event loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def tracked() -> T:
        task = asyncio.current_task()
        assert task is not None, "asyncio.run runs a task"
        loops.append((asyncio.get_running_loop(), task))
        return await work

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: asyncio.run(tracked()))
        try:
            return future.result()
        except KeyboardInterrupt:
            for loop, task in loops:
                loop.call_soon_threadsafe(task.cancel)
            raise
