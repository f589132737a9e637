"""What is answered is never asked again: within a run, between processes, and after a kill."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    Budget,
    CachedBackend,
    Missing,
    OpenAIBackend,
    RandomFaults,
    Request,
    RequestCache,
    Response,
    ScriptedBackend,
    TokenLogprob,
    TokenLogprobs,
    Usage,
    request_key,
    run_all,
)
from tests.llm.asking import ask, asks
from tests.llm.server import JudgeServer, Reply, chat_reply

ROOT = Path(__file__).parents[2]


def upper(request: Request) -> str:
    return request.texts[-1].upper()


def test_a_second_run_asks_nothing_and_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "requests.sqlite"
    first, second = ScriptedBackend(upper), ScriptedBackend(upper)
    results = run_all(CachedBackend(first, path), asks(10), progress=False)
    assert run_all(CachedBackend(second, path), asks(10), progress=False) == results
    assert (first.calls, second.calls, len(RequestCache(path))) == (10, 0, 10)


def test_equal_requests_in_flight_are_sent_once(tmp_path: Path) -> None:
    inner = ScriptedBackend(upper, seconds=0.02)
    backend = CachedBackend(inner, tmp_path / "c")
    results = run_all(backend, [ask("same")] * 8 + [ask("other")], progress=False)
    assert inner.calls == 2 == backend.misses and backend.hits == 7
    assert len({result.text for result in results[:8] if isinstance(result, Response)}) == 1


def test_every_part_of_a_response_survives(tmp_path: Path) -> None:
    token = TokenLogprobs(token="\ufffd\n", logprob=None, top=(TokenLogprob(token="0", logprob=-0.1 / 3),))
    response = Response(
        text="naïve \u2028 🙂",
        finish_reason="refused",
        refusal="",
        tokens=(token,),
        prompt_tokens=(),
        usage=Usage(prompt_tokens=3),
        model="m",
    )
    cache = RequestCache(tmp_path / "c")
    assert cache.put("k", response, kind="x", model="y", request=ask("z")) == response == cache.get("k")
    assert cache.has("k") and not cache.has("l") and cache.get("l") is None
    cache.close()
    assert cache.get("k") == response


def test_the_first_answer_stays(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c")
    first, second = Response(text="first"), Response(text="second")
    assert cache.put("k", first, kind="x", model="y", request=ask("z")) == first
    assert cache.put("k", second, kind="x", model="y", request=ask("z")) == first


def test_the_key_covers_all_that_can_change_an_answer() -> None:
    base = {"temperature": 0.0, "max_tokens": 5, "seed": None, "stop": (), "prompt_version": "a@1"}
    changes = [
        {},
        {"temperature": 0.5},
        {"max_tokens": 6},
        {"seed": 0},
        {"stop": ("x",)},
        {"prompt_version": "a@2"},
        {"top_logprobs": 0},
        {"top_logprobs": 1},
    ]
    requests = [ask("x", **{**base, **change}) for change in changes] + [ask("y", **base)]
    backends = [ScriptedBackend(upper, name="one"), ScriptedBackend(upper, name="two")]
    keys = {request_key(backend, request) for backend in backends for request in requests}
    assert len(keys) == 2 * 9
    assert request_key(backends[0], ask("x", **base)) in keys


def test_the_keys_of_answers_paid_for_stay_what_they_are() -> None:
    """Another key for the same request would have every folder's answers paid for again."""
    request = ask("naïve \ud800", temperature=0.5, max_tokens=5, seed=1, stop=("x",), prompt_version="a@1")
    found = request_key(ScriptedBackend(upper, name="one"), request)
    assert found == "1120ef9c60779f4d584efe7bff5c342e7aa5d676bcd78c8a5f4bca8fc41bae3e"


def test_failures_are_not_kept_and_refusals_are(tmp_path: Path) -> None:
    failing = ScriptedBackend(upper, faults=RandomFaults(1.0, ["bad_request"]))
    (result,) = run_all(CachedBackend(failing, tmp_path / "c"), [ask("a")], progress=False)
    assert isinstance(result, Missing) and result.kind == "failed"
    refusing = ScriptedBackend(upper, faults=RandomFaults(1.0, ["refusal"]))
    (result,) = run_all(CachedBackend(refusing, tmp_path / "c"), [ask("a")], progress=False)
    assert isinstance(result, Missing) and result.kind == "refused" and refusing.calls == 1
    answering = ScriptedBackend(upper)
    assert run_all(CachedBackend(answering, tmp_path / "c"), [ask("a")], progress=False) == [result]
    assert answering.calls == 0


def test_a_budget_leaves_a_run_that_can_go_on(tmp_path: Path) -> None:
    calls = 0
    for _ in range(4):
        inner = ScriptedBackend(upper, budget=Budget(max_calls=3))
        try:
            results = run_all(CachedBackend(inner, tmp_path / "c"), asks(10), progress=False)
        except BackendError as error:
            assert "budget" in str(error)
        calls += inner.calls
        assert inner.calls <= 3
    assert calls == 10
    assert [result.text for result in results if isinstance(result, Response)] == [
        f"QUESTION {i}" for i in range(10)
    ]


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are my notes, and no database at all, " * 50)
    with pytest.raises(BackendError, match=r"notes\.txt"):
        RequestCache(text)
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (a)")
    connection.close()
    with pytest.raises(BackendError, match="1 tables"):
        RequestCache(other)
    with sqlite3.connect(other) as connection:  # the same number by chance
        connection.execute(f"PRAGMA user_version = {RequestCache.format}")
    connection.close()
    with pytest.raises(BackendError, match=r"not a request cache .* \(mine\)"):
        RequestCache(other)
    assert text.read_text().startswith("these are my notes")


_RUN = textwrap.dedent("""
    import sys
    from neuron_lens.llm import CachedBackend, OpenAIBackend, run_all
    from tests.llm.asking import asks

    url, path, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    backend = CachedBackend(OpenAIBackend("tiny", base_url=url, concurrency=4), path)
    run_all(backend, asks(count), progress=False)
""")


def _start(server: JudgeServer, path: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _RUN, server.url, str(path), str(count)]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_killed_run_repeats_no_answered_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    path, count, concurrency = tmp_path / "c", 40, 4
    with JudgeServer(
        lambda body, attempt: Reply(chat_reply(body["messages"][0]["content"]), seconds=0.03)
    ) as server:
        command = [sys.executable, "-c", _RUN, server.url, str(path), str(count)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while server.calls < 20 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept, asked = len(RequestCache(path)), server.calls
        assert asked >= 20 and process.returncode == -signal.SIGKILL
        # all but those in flight, or on their way back, when it was killed
        assert asked - 2 * concurrency <= kept < count
        backend = CachedBackend(OpenAIBackend("tiny", base_url=server.url, concurrency=concurrency), path)
        results = run_all(backend, asks(count), progress=False)
        assert backend.misses == count - kept == server.calls - asked
    assert [r.text for r in results if isinstance(r, Response)] == [f"question {i}" for i in range(count)]


_WRITE = textwrap.dedent("""
    import sys
    from neuron_lens.llm import CachedBackend, RequestCache, ScriptedBackend, run_all
    from tests.llm.asking import asks

    for _ in range(3):
        backend = CachedBackend(ScriptedBackend(lambda request: sys.argv[2]), sys.argv[1])
        results = run_all(backend, asks(40), progress=False)
    print("|".join(result.text for result in results))
""")


def test_processes_share_one_file(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", _WRITE, str(tmp_path / "c"), f"writer {i}"] for i in range(3)]
    running = [
        subprocess.Popen(c, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for c in commands
    ]
    said = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1  # whoever was first, all read the same
    assert len(RequestCache(tmp_path / "c")) == 40


def test_a_forked_process_opens_its_own_connection(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c")
    cache.put("before", Response(text="a"), kind="x", model="y", request=ask("z"))
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            cache.put("in the child", Response(text="b"), kind="x", model="y", request=ask("z"))
            code = 0 if cache.has("before") else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert cache.has("in the child") and cache.has("before")


def test_what_was_spent_is_the_sum_of_what_was_told(tmp_path: Path) -> None:
    cache = RequestCache(tmp_path / "c")
    assert cache.spent() == (0, Usage())
    told = [Usage(prompt_tokens=10, completion_tokens=3), None, Usage(prompt_tokens=5)]
    for place, usage in enumerate(told):
        cache.put(str(place), Response(text="x", usage=usage), kind="k", model="m", request=ask("a"))
    assert cache.spent() == (3, Usage(prompt_tokens=15, completion_tokens=3))
