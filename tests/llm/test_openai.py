"""The OpenAI-compatible backend against a real local server that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    Budget,
    Capabilities,
    JsonSchema,
    Missing,
    OpenAIBackend,
    Request,
    Response,
    Retry,
    run_all,
    run_all_structured,
)
from tests.llm.asking import Marks, ask, ask_marks, asks, marks
from tests.llm.server import JudgeServer, Reply, Script, chat_reply, error_reply

Serve = Callable[[Script], JudgeServer]
QUICK = Retry(attempts=3, base=0.01)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    running: list[JudgeServer] = []

    def start(script: Script) -> JudgeServer:
        running.append(JudgeServer(script).__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__()


def judge(server: JudgeServer, **options: Any) -> OpenAIBackend:
    return OpenAIBackend("tiny", base_url=server.url, **{"retry": QUICK, **options})


def only(backend: OpenAIBackend, request: Request) -> Response | Missing:
    (result,) = run_all(backend, [request], progress=False)
    return result


def echo(body: dict[str, Any], attempt: int) -> str:
    return str(body["messages"][-1]["content"]).upper()


def test_answers_come_in_order_within_the_concurrency(serve: Serve) -> None:
    def slow_first(body: dict[str, Any], attempt: int) -> Reply:
        number = int(body["messages"][0]["content"].split()[-1])
        return Reply(chat_reply(f"answer {number}"), seconds=0.02 * (12 - number) / 3)

    server = serve(slow_first)
    results = run_all(judge(server, concurrency=3), asks(12), progress=False)
    assert [r.text for r in results if isinstance(r, Response)] == [f"answer {i}" for i in range(12)]
    assert 2 <= server.most_in_flight <= 3


def test_a_response_is_read_whole(serve: Serve) -> None:
    server = serve(echo)
    response = only(judge(server, api_key="sk-secret"), ask("hello", temperature=0.5, seed=3, stop=("END",)))
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason, response.model) == ("HELLO", "stop", "served")
    assert response.usage is not None and response.usage.total_tokens == 10
    (sent,) = server.bodies
    assert sent == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 64,
        "temperature": 0.5,
        "seed": 3,
        "stop": ["END"],
    }
    assert server.authorization == {"Bearer sk-secret"}


def test_fields_can_be_renamed_left_out_and_added(serve: Serve) -> None:
    server = serve(echo)
    backend = judge(
        server, token_limit_field="max_completion_tokens", omit=["temperature"], extra_body={"top_k": 1}
    )
    only(backend, ask("x"))
    assert server.bodies[0].keys() == {"model", "messages", "max_completion_tokens", "top_k"}


@pytest.mark.parametrize(
    "fault",
    [
        error_reply(429, retry_after="0.01"),
        error_reply(408),
        error_reply(500),
        error_reply(503),
        None,
        Reply(chat_reply("half"), cut=True),
        Reply(b'{"choices": [{"mess'),
        Reply({"error": {"message": "the provider is down", "code": 502}}),
    ],
    ids=["429", "408", "500", "503", "dropped", "cut body", "truncated body", "error in an answer"],
)
def test_failures_that_may_pass_are_tried_again(serve: Serve, fault: Reply | None) -> None:
    server = serve(lambda body, attempt: fault if attempt <= 2 else "at last")
    response = only(judge(server), ask("x"))
    assert isinstance(response, Response) and response.text == "at last"
    assert server.calls == 3


def test_attempts_run_out_and_leave_a_missing(serve: Serve) -> None:
    server = serve(lambda body, attempt: error_reply(500, "out of order"))
    result = only(judge(server), ask("x"))
    assert isinstance(result, Missing) and result.kind == "failed"
    assert "out of order" in result.reason and "3 attempts" in result.reason
    assert server.calls == 3


def test_a_slow_answer_is_cut_off_and_asked_again(serve: Serve) -> None:
    server = serve(lambda body, attempt: Reply(chat_reply("late"), seconds=0.8 if attempt == 1 else 0))
    response = only(judge(server, timeout=0.25), ask("x"))
    assert isinstance(response, Response) and response.text == "late" and server.calls == 2


def test_retry_after_is_waited_for(serve: Serve) -> None:
    server = serve(lambda body, attempt: error_reply(429, retry_after="0.4") if attempt == 1 else "now")
    only(judge(server, retry=Retry(attempts=2, base=0.0)), ask("x"))
    first, second = server.times
    assert second - first >= 0.4


def test_a_retry_after_beyond_patience_is_not_waited_for(serve: Serve) -> None:
    server = serve(lambda body, attempt: error_reply(429, retry_after="3600"))
    result = only(judge(server), ask("x"))
    assert isinstance(result, Missing) and "3600 s" in result.reason
    assert server.calls == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_bad_request_is_missing_and_not_repeated(serve: Serve, status: int) -> None:
    server = serve(
        lambda body, attempt: error_reply(status, "too long") if "1" in str(body["messages"]) else "ok"
    )
    bad, good = run_all(judge(server), [ask("1"), ask("2")], progress=False)
    assert isinstance(bad, Missing) and "too long" in bad.reason
    assert isinstance(good, Response) and server.calls == 2


@pytest.mark.parametrize(
    "reply",
    [
        error_reply(401),
        error_reply(402),
        error_reply(403),
        error_reply(404),
        error_reply(429, code="insufficient_quota"),
    ],
    ids=["401", "402", "403", "404", "no credit"],
)
def test_what_no_request_survives_stops_the_run(serve: Serve, reply: Reply) -> None:
    server = serve(lambda body, attempt: reply)
    with pytest.raises(BackendError, match="stopped with 0 of 20"):
        run_all(judge(server, concurrency=2), asks(20), progress=False)
    assert server.calls <= 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply(chat_reply(None, refusal="I will not.")),
        Reply(chat_reply("", finish="content_filter")),
        error_reply(400, "filtered", code="content_filter"),
        Reply({"error": {"message": "flagged", "code": 403, "metadata": {"flagged_input": "x"}}}, 403),
    ],
    ids=["refusal", "filter", "filtered prompt", "moderation"],
)
def test_refusals_are_recorded_as_refusals(serve: Serve, reply: Reply) -> None:
    server = serve(lambda body, attempt: reply)
    response = asyncio.run(_complete(judge(server), ask("x")))
    assert response.finish_reason == "refused" and response.refusal
    result = only(judge(server), ask("x"))
    assert isinstance(result, Missing) and result.kind == "refused"
    assert server.calls == 2


async def _complete(backend: OpenAIBackend, request: Request) -> Response:
    try:
        return await backend.complete(request)
    finally:
        await backend.aclose()


def test_log_probabilities_of_a_chat(serve: Serve) -> None:
    entry = {
        "token": "1",
        "logprob": -0.1,
        "bytes": [49],
        "top_logprobs": [
            {"token": "1", "logprob": -0.1, "bytes": [49]},
            {"token": "0", "logprob": -2.3, "bytes": [48]},
        ],
    }

    def with_logprobs(body: dict[str, Any], attempt: int) -> Reply:
        assert body["logprobs"] is True and body["top_logprobs"] == 2
        reply = chat_reply("1")
        reply["choices"][0]["logprobs"] = {"content": [entry]}
        return Reply(reply)

    response = only(judge(serve(with_logprobs)), ask("x", top_logprobs=2))
    assert isinstance(response, Response) and response.tokens is not None
    (token,) = response.tokens
    assert (token.token, token.logprob) == ("1", -0.1)
    assert [(one.token, one.logprob) for one in token.top] == [("1", -0.1), ("0", -2.3)]
    with pytest.raises(BackendError, match="logprobs=False"):
        only(judge(serve(echo)), ask("x", top_logprobs=2))


def test_log_probabilities_of_a_prompt_by_echo(serve: Serve) -> None:
    def completion(body: dict[str, Any], attempt: int) -> Reply:
        assert body["prompt"] == "a b" and body["echo"] is True and body["logprobs"] == 2
        logprobs = {
            "tokens": ["a", " b", " c"],
            "token_logprobs": [None, -1.0, -0.5],
            "top_logprobs": [None, {" x": -2.0, " b": -1.0}, {" c": -0.5}],
            "text_offset": [0, 1, 3],
        }
        choice = {"text": "a b c", "finish_reason": "length", "logprobs": logprobs}
        return Reply({"model": "base", "choices": [choice]})

    base = Capabilities(chat=False, completion=True, logprobs=True, prompt_logprobs=True)
    backend = judge(serve(completion), capabilities=base)
    response = only(backend, Request(prompt="a b", max_tokens=1, prompt_logprobs=2, top_logprobs=0))
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason, response.usage) == (" c", "length", None)
    assert response.prompt_tokens is not None and response.tokens is not None
    assert [(t.token, t.logprob) for t in response.prompt_tokens] == [("a", None), (" b", -1.0)]
    assert [one.token for one in response.prompt_tokens[1].top] == [" b", " x"]
    assert [(t.token, t.logprob, t.top) for t in response.tokens] == [(" c", -0.5, ())]


def test_what_is_not_declared_is_refused_before_it_is_sent(serve: Serve) -> None:
    server = serve(echo)
    backend = judge(server, capabilities=Capabilities(chat=True))
    for request, lacking in [
        (ask("x", top_logprobs=1), "logprobs"),
        (Request(prompt="x", max_tokens=1), "completion"),
        (ask("x", json_schema=JsonSchema(name="x", body={})), "json_schema"),
    ]:
        with pytest.raises(BackendError, match=f"needs {lacking}"):
            only(backend, request)
    with pytest.raises(BackendError, match="at most 20"):
        only(judge(server), ask("x", top_logprobs=21))
    assert server.calls == 0


@pytest.mark.parametrize(
    "text",
    [
        marks([0, 1, 1, 0]),
        f"```json\n{marks([0, 1, 1, 0])}\n```",
        f"Sure [as asked]!\n{marks([0, 1, 1, 0])}\nAnything else?",
    ],
    ids=["plain", "fenced", "prose"],
)
def test_structured_answers_are_found(serve: Serve, text: str) -> None:
    server = serve(lambda body, attempt: text)
    assert run_all_structured(judge(server), [ask_marks()], progress=False) == [Marks(marks=[0, 1, 1, 0])]
    schema = server.bodies[0]["response_format"]["json_schema"]
    assert schema["strict"] is True and schema["schema"]["required"] == ["marks"]
    assert server.calls == 1


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (Reply(chat_reply('{"marks": [0, 1, 1', finish="length")), "cut off after 64 tokens"),
        (Reply(chat_reply(marks([0, 1, 1]))), "expected 4 marks, got 3"),
        (Reply(chat_reply("I think the second one.")), "no complete JSON value"),
    ],
    ids=["truncated", "wrong length", "no JSON"],
)
def test_structured_answers_are_repaired_once_or_missing(serve: Serve, bad: Reply, problem: str) -> None:
    def mended(body: dict[str, Any], attempt: int) -> str | Reply:
        return bad if len(body["messages"]) == 1 else marks([1, 1, 0, 0])

    server = serve(mended)
    assert run_all_structured(judge(server), [ask_marks()], progress=False) == [Marks(marks=[1, 1, 0, 0])]
    asked_again = server.bodies[1]
    assert problem in asked_again["messages"][-1]["content"]
    assert asked_again["max_tokens"] == (128 if "cut off" in problem else 64)
    never = serve(lambda body, attempt: bad)
    (result,) = run_all_structured(judge(never), [ask_marks()], progress=False)
    assert isinstance(result, Missing) and result.kind == "malformed"
    assert never.calls == 2


def test_a_budget_holds_with_calls_in_flight(serve: Serve) -> None:
    server = serve(echo)
    budget = Budget(max_calls=5)
    with pytest.raises(BackendError, match="budget of 5 calls"):
        run_all(judge(server, budget=budget, concurrency=4), asks(20), progress=False)
    assert server.calls == 5 == budget.calls


def test_one_backend_serves_several_runs_and_running_loops(serve: Serve) -> None:
    backend = judge(serve(echo))

    async def notebook() -> list[Response | Missing]:
        return run_all(backend, asks(2), progress=False)

    first = run_all(backend, asks(2), progress=False)
    assert asyncio.run(notebook()) == first == run_all(backend, asks(2), progress=False)


def test_keys_are_asked_for_and_never_shown(serve: Serve) -> None:
    serve(echo)  # for the environment it clears
    with pytest.raises(BackendError, match="OPENAI_API_KEY"):
        OpenAIBackend("gpt-x")
    backend = OpenAIBackend("m", base_url="http://user:pass@host:1/v1", api_key="sk-secret")
    assert "sk-secret" not in repr(backend) + backend.identity and "pass" not in backend.identity
    with pytest.raises(BackendError, match="base_url"):
        OpenAIBackend("m", base_url="localhost:8000")
