"""Many requests at once: failures become missing and nothing else, and what cannot go on stops."""

from __future__ import annotations

import asyncio
import signal
import statistics
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    Capabilities,
    Missing,
    RandomFaults,
    Request,
    RequestCache,
    Response,
    ScriptedBackend,
    require,
    run_all,
    run_all_structured,
)
from neuron_lens.llm.run import MAX_FAILURES_IN_A_ROW
from neuron_lens.llm.scripted import Fault
from tests.llm.asking import Marks, ask, ask_marks, asks, marks

ROOT = Path(__file__).parents[2]


def scripted_marks(request: Request) -> str:
    """Four marks that follow from the text asked about."""
    number = int(request.messages[0].content.split()[1])
    return marks([number % 7, 1, 0, number % 3])


def test_injected_failures_change_coverage_only() -> None:
    asked = [ask_marks(f"text {i}") for i in range(400)]
    faults: list[Fault] = ["server_error", "dropped", "bad_request", "truncated", "refusal", "empty"]
    clean = run_all_structured(ScriptedBackend(scripted_marks), asked, progress=False)
    # a repair is another request, so a fault drawn for it too is what makes an answer of the form-only kind missing
    failing = ScriptedBackend(scripted_marks, faults=RandomFaults(0.3, faults, seed=1))
    injected = run_all_structured(failing, asked, progress=False)
    answered = [
        (one, other) for one, other in zip(clean, injected, strict=True) if not isinstance(other, Missing)
    ]
    coverage = len(answered) / len(asked)
    assert (
        0.68 < coverage < 0.92
    )  # transport and refusals are lost (about 20 %), most of the rest is repaired
    assert all(one == other for one, other in answered)
    kinds = {result.kind for result in injected if isinstance(result, Missing)}
    assert kinds == {"failed", "refused", "malformed"}
    means = [
        statistics.mean(one.marks[0] for one in results if isinstance(one, Marks))
        for results in (clean, injected)
    ]
    assert abs(means[0] - means[1]) < 3 * 2.0 / len(answered) ** 0.5


@given(
    st.lists(
        st.sampled_from(["rate_limited", "server_error", "dropped", "slow", "fenced", "prose"]), min_size=1
    )
)
@settings(max_examples=10, deadline=None)
def test_passing_faults_change_nothing(faults: list[Fault]) -> None:
    asked = [ask_marks(f"text {i}") for i in range(5)]
    backend = ScriptedBackend(scripted_marks, faults=RandomFaults(0.5, faults, attempts=2))
    clean = run_all_structured(ScriptedBackend(scripted_marks), asked, progress=False)
    assert run_all_structured(backend, asked, progress=False) == clean


def test_an_empty_answer_is_missing() -> None:
    (result,) = run_all(ScriptedBackend(lambda request: " \n"), [ask("x")], progress=False)
    assert isinstance(result, Missing) and result.kind == "malformed"


def test_an_endpoint_that_is_gone_ends_the_run() -> None:
    backend = ScriptedBackend(lambda request: "x", faults=RandomFaults(1.0, ["server_error"]))
    with pytest.raises(BackendError, match=f"{MAX_FAILURES_IN_A_ROW} calls in a row failed.*status 500"):
        run_all(backend, asks(1000), progress=False)
    assert len(backend.attempts) < MAX_FAILURES_IN_A_ROW + backend.concurrency


def test_calls_turned_away_one_by_one_do_not_end_the_run() -> None:
    backend = ScriptedBackend(lambda request: "x", faults=RandomFaults(1.0, ["bad_request"]))
    results = run_all(backend, asks(3 * MAX_FAILURES_IN_A_ROW), progress=False)
    assert all(isinstance(result, Missing) and result.kind == "failed" for result in results)


def test_calls_in_flight_are_finished_before_the_run_stops() -> None:
    done: list[str] = []

    def script(request: Request) -> str:
        if request.texts[-1] == "question 0":
            raise BackendError("no access")
        done.append(request.texts[-1])
        return "ok"

    class LateOthers(ScriptedBackend):
        async def _attempt(self, request: Request) -> Response:
            await asyncio.sleep(0 if request.texts[-1] == "question 0" else 0.05)
            return await super()._attempt(request)

    with pytest.raises(BackendError, match=r"no access \(stopped with 3 of 50"):
        run_all(LateOthers(script, concurrency=4), asks(50), progress=False)
    assert len(done) == 3


def test_a_mistake_in_a_script_is_not_swallowed() -> None:
    def wrong(request: Request) -> str:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(ScriptedBackend(wrong), asks(5), progress=False)


def test_a_table_answers_or_says_what_it_lacks() -> None:
    backend = ScriptedBackend({"question 0": "a"})
    assert [r.text for r in run_all(backend, asks(1), progress=False) if isinstance(r, Response)] == ["a"]
    with pytest.raises(BackendError, match=r"no answer to 'question 1'"):
        run_all(backend, asks(2), progress=False)


def test_nothing_asked_gives_nothing() -> None:
    assert run_all(ScriptedBackend({}), []) == []


def test_the_bar_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run_all(ScriptedBackend(lambda request: "x"), asks(3), description="judging")
    shown = capsys.readouterr().err
    assert "judging" in shown and "3/3" in shown
    run_all(ScriptedBackend(lambda request: "x"), asks(3), progress=False)
    assert capsys.readouterr().err == ""


def test_capabilities_are_refused_by_name() -> None:
    backend = ScriptedBackend({}, capabilities=Capabilities(chat=True, logprobs=True))
    require(backend, ["chat", "logprobs"], "detection")
    with pytest.raises(BackendError, match=r"simulation needs prompt_logprobs.*declares chat, logprobs"):
        require(backend, ["chat", "prompt_logprobs"], "simulation")
    with pytest.raises(BackendError, match="did you mean 'logprobs'"):
        require(backend, ["logprob"], "detection")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "both"},
        {"messages": ()},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"temperature": float("nan")},
        {"stop": ("",)},
        {"wrong": 1},
    ],
)
def test_requests_that_make_no_sense_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(BackendError, match="cannot be sent"):
        ask("x", **fields)


_INTERRUPTED = textwrap.dedent("""
    import signal, sys
    from neuron_lens.llm import CachedBackend, ScriptedBackend, run_all
    from tests.llm.asking import asks

    # a shell that runs the tests in the background has children ignore the signal
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def answer(request):
        print("answered", flush=True)
        return "ok"

    try:
        run_all(CachedBackend(ScriptedBackend(answer, seconds=0.05, concurrency=2), sys.argv[1]), asks(1000), progress=False)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
""")


def test_an_interrupted_run_ends_at_once_and_keeps_its_answers(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, str(tmp_path / "c")]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        for _ in range(6):
            assert process.stdout.readline() == "answered\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert out.endswith("interrupted\n") and err == ""
    assert out.count("answered") < 500  # of a thousand, two at a time
    assert len(RequestCache(tmp_path / "c")) >= 6 - 2
