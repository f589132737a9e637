"""Calls that fail, runs that are killed, and an endpoint that misbehaves: nothing of it becomes a score."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_lens.errors import BackendError, RequestError
from neuron_lens.explain.plan import carry_out, requests_of
from neuron_lens.explain.puzzles import puzzle_named, puzzles
from neuron_lens.explain.scorers import (
    BaseScorer,
    Causal,
    Detection,
    Embedding,
    Fuzzing,
    GradedDetection,
    GradedFuzzing,
    Intruder,
    ScorerResult,
    Simulation,
    Surprisal,
)
from neuron_lens.explain.simulators import TextSimulator
from neuron_lens.llm import (
    Budget,
    BudgetExceeded,
    CachedBackend,
    Capabilities,
    Message,
    OpenAIBackend,
    RandomFaults,
    Request,
    RequestCache,
    Retry,
    ScriptedBackend,
    estimate,
)
from tests.llm.server import JudgeServer, Reply, chat_reply, error_reply

from .judge import RuleJudge, guess, planted_continuations, planted_effects, rule_judge

UNITS = tuple(puzzle.evidence().unit for puzzle in puzzles()[:5])
PAIRED = ("surprisal", "causal by likelihood")  # of two calls a text both must succeed
SCORERS: dict[str, BaseScorer] = {
    "detection": Detection(batch=2, controls=False),
    "fuzzing": Fuzzing(batch=2, controls=False),
    "graded detection": GradedDetection(controls=False),
    "graded fuzzing": GradedFuzzing(controls=False),
    "intruder": Intruder(controls=False),
    "simulation": Simulation(simulator=TextSimulator(), controls=False),
    "surprisal": Surprisal(controls=False),
    "causal by answers": Causal(batch=2, controls=False, effects=planted_effects, random_units=UNITS),
    "causal by likelihood": Causal(controls=False, continuations=planted_continuations, random_units=UNITS),
}


def _width(result: ScorerResult) -> float:
    assert result.score.high is not None and result.score.low is not None
    return result.score.high - result.score.low


@pytest.mark.parametrize("name", SCORERS)
def test_failed_calls_lower_the_coverage_widen_the_interval_and_leave_the_mean(name: str) -> None:
    scorer = SCORERS[name]
    faults = RandomFaults(0.3, ["bad_request", "refusal", "server_error"], seed=3)
    results = []
    for backend in (rule_judge(error=0.2), rule_judge(error=0.2, faults=faults)):
        plans = [scorer.plan(p.evidence(), p.explanation, backend, seed=p.index) for p in puzzles()]
        results.append(carry_out(backend, plans))
    clean, failing = results
    assert all(result.score.coverage == 1.0 and not result.missing for result in clean)
    lost = np.mean([1 - result.score.coverage for result in failing])
    assert lost == pytest.approx(1 - 0.7**2 if name in PAIRED else 0.3, abs=0.06)
    shares = [sum(result.missing.values()) / result.calls for result in failing]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.05)
    assert {kind for result in failing for kind in result.missing} == {"failed", "refused"}
    pairs = [(a, b) for a, b in zip(clean, failing, strict=True) if b.score.value is not None]
    assert len(pairs) > 10
    assert np.mean([_width(b) for _, b in pairs]) > 1.05 * np.mean([_width(a) for a, _ in pairs])
    moved = np.array([(b.score.value or 0.0) - (a.score.value or 0.0) for a, b in pairs])
    assert abs(moved.mean()) < 3.5 * moved.std() / np.sqrt(len(moved))


@pytest.mark.parametrize("name", SCORERS)
def test_where_most_calls_fail_there_is_no_score(name: str) -> None:
    puzzle = puzzle_named("animals")
    backend = rule_judge(faults=RandomFaults(0.8, ["refusal"]))
    result = SCORERS[name].score(puzzle.evidence(), puzzle.explanation, backend, seed=0)
    assert result.score.coverage < 0.5 and result.missing["refused"] > 0
    assert all(score.value is None for key, score in result.scores.items() if score.coverage < 0.5)
    assert result.score.value is None and result.score.low is None


def test_a_scorer_refuses_by_name_what_the_backend_or_the_evidence_cannot_give() -> None:
    puzzle = puzzle_named("animals")
    mute = ScriptedBackend({}, capabilities=Capabilities(chat=False))
    for scorer, words in (
        (Detection(), "'detection' needs chat"),
        (Surprisal(), "'surprisal' needs completion, prompt_logprobs"),
        (Simulation(), "simulation by text .* needs chat"),
    ):
        with pytest.raises(BackendError, match=words):
            scorer.plan(puzzle.evidence(), "x", mute, seed=0)
        with pytest.raises(RequestError, match="backend"):
            scorer.plan(puzzle.evidence(), "x", None, seed=0)
    for make, words in (
        (lambda: Embedding(), "none is honest"),
        (lambda: Embedding(embedder="bge"), "no embedder called 'bge'"),
        (lambda: Simulation(calibration="linaer"), "did you mean 'linear'"),
        (lambda: Simulation(calibration="linear", part="validation"), "cannot be scored there"),
        (lambda: Detection(batch=0), "batch=0"),
        (lambda: Intruder(texts=2), "at least 3"),
        (lambda: Detection(part="tset"), "known: train, validation, test"),
    ):
        with pytest.raises(RequestError, match=words):
            make()
    with pytest.raises(RequestError, match="needs effects"):
        Causal().plan(puzzle.evidence(), "x", rule_judge(), seed=0)
    with pytest.raises(RequestError, match="empty explanation"):
        Detection().plan(puzzle.evidence(), "  ", rule_judge(), seed=0)


def _plans(backend: Any) -> list[Any]:
    chosen = puzzles()[:4]
    scorers = [
        Detection(),
        Fuzzing(),
        Simulation(simulator=TextSimulator()),
        Surprisal(n_firing=5, n_silent=5),
    ]
    return [s.plan(p.evidence(), p.explanation, backend, seed=0) for s in scorers for p in chosen]


def test_a_run_stopped_by_its_budget_goes_on_where_it_was(tmp_path: Path) -> None:
    backend = rule_judge()
    whole = carry_out(backend, _plans(backend))
    cache = RequestCache(tmp_path / "answers.sqlite")
    made: Counter[str] = Counter()
    planned = estimate(requests_of(_plans(backend), backend), is_cached=lambda request: False)
    for allowed in (60, 100, 10_000):
        inner = rule_judge(budget=Budget(max_calls=allowed))
        limited = CachedBackend(inner, cache)
        try:
            resumed = carry_out(limited, _plans(limited))
        except BudgetExceeded:
            assert allowed < 10_000
        made += inner.attempts
    assert resumed == whole
    assert planned.calls == len(made) and set(made.values()) == {1}


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
from neuron_lens.explain.plan import carry_out
from neuron_lens.llm import CachedBackend, ScriptedBackend
from tests.explain.judge import RuleJudge
from tests.explain.test_failures import _plans
judge, count = RuleJudge(), 0
def script(request):
    global count
    count += 1
    if count > {calls}:
        os.kill(os.getpid(), signal.SIGKILL)
    answer = judge(request)
    with open({log!r}, "a") as file:
        print(hash(request.canonical), file=file)
    return answer
backend = CachedBackend(ScriptedBackend(script, name="rules 0 0.0"), {cache!r})
carry_out(backend, _plans(backend))
"""


def test_a_run_killed_outright_repeats_no_call(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent.parent
    log, cache = tmp_path / "log", tmp_path / "answers.sqlite"
    code = KILLED.format(root=str(root), tests=str(root / "tests"), calls=70, log=str(log), cache=str(cache))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env={"PYTHONHASHSEED": "0"})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    answered = len(log.read_text().split())
    assert answered == 70
    inner = rule_judge()
    resumed = CachedBackend(inner, cache)
    results = carry_out(resumed, _plans(resumed))
    alone = rule_judge()
    assert results == carry_out(alone, _plans(alone))
    assert len(inner.attempts) + answered == len(alone.attempts)


def test_scoring_through_an_endpoint_that_misbehaves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    judge = RuleJudge()
    seen: Counter[str] = Counter()

    def script(body: dict[str, Any], attempt: int) -> str | Reply | None:
        messages = tuple(Message(role=m["role"], content=m["content"]) for m in body["messages"])
        repaired = sum(message.role == "assistant" for message in messages) > 1
        asked = Request(messages=messages[:4] if repaired else messages, max_tokens=64)
        answer = judge(asked)
        assert isinstance(answer, str)
        ills = ["", "", "429", "500", "drop", "fence", "cut", "short", "refuse"]
        ill = ills[int(guess(asked.texts[-1]) * len(ills))]
        passes = attempt > 1 or repaired
        if ill == "refuse":
            seen[ill] += 1
            return Reply(chat_reply(None, refusal="I would rather not."))
        if passes or not ill:
            return answer
        seen[ill] += 1
        return {
            "429": error_reply(429, Retry_After="0"),
            "500": error_reply(500),
            "drop": None,
            "fence": f"```json\n{answer}\n```",
            "cut": answer[: len(answer) // 2],
            "short": '{"answers": [true]}',
        }[ill]

    puzzle, clean = puzzle_named("weekdays"), rule_judge()
    with JudgeServer(script) as server:
        backend = OpenAIBackend(
            "tiny", base_url=server.url, api_key="x", retry=Retry(attempts=3, base=0.01), concurrency=4,
            capabilities=Capabilities(chat=True),
        )  # fmt: skip
        for scorer in (Detection(), Fuzzing()):
            result = scorer.score(puzzle.evidence(), puzzle.explanation, backend, seed=0)
            wanted = scorer.score(puzzle.evidence(), puzzle.explanation, clean, seed=0)
            refused = result.missing.get("refused", 0)
            assert set(result.missing) <= {"refused"} and result.score.value == wanted.score.value == 1.0
            assert result.score.coverage == pytest.approx(1 - refused / result.calls)
    assert set(seen) == {"429", "500", "drop", "fence", "cut", "short", "refuse"}
