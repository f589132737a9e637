"""Simulators read what was said and nothing else; figures are OpenAI's formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from neuron_lens.errors import BackendError
from neuron_lens.explain.plan import Plan, carry_out
from neuron_lens.explain.puzzles import puzzle_named
from neuron_lens.explain.rendering import discretised, visible
from neuron_lens.explain.scorers import Simulation
from neuron_lens.explain.scorers.examples import draw_examples
from neuron_lens.explain.simulators import AllAtOnceSimulator, Simulated, TextSimulator, simulator_for
from neuron_lens.explain.simulators.all_at_once import expected_level
from neuron_lens.llm import (
    Capabilities,
    LocalBackend,
    Request,
    Response,
    ScriptedBackend,
    TokenLogprob,
    TokenLogprobs,
)
from neuron_lens.records import TokenWindow
from neuron_lens.transformer import Transformer, TransformerConfig

from .judge import rule_judge
from .test_evidence import window

CHAT, BASE = Capabilities(chat=True), Capabilities(chat=False, completion=True, prompt_logprobs=True)


@dataclass(frozen=True)
class Fixed:
    """Predicts what it is told to, window by window."""

    predict: dict[tuple[int, int], Simulated]
    name: str = "fixed"
    needs: tuple[str, ...] = ()
    prompt: str = ""
    asked: list[int] = field(default_factory=list)

    def plan(self, explanation: str, windows: Sequence[TokenWindow]) -> Plan[list[Simulated]]:
        return Plan((), lambda answers: [self.predict[one.identity] for one in windows])


def _noisy(seed: int, missing: float = 0.0) -> tuple[Simulation, dict[tuple[int, int], Simulated]]:
    rng = np.random.default_rng(seed)
    evidence = puzzle_named("animals").evidence()
    predicted = {
        w.identity: tuple(
            None if rng.random() < missing else float(np.clip(round(value + rng.normal()), 0, 10))
            for value in w.activations
        )
        for name, part in evidence.parts()
        for w in part.windows
    }
    return Simulation(simulator=Fixed(predicted), calibration="scale"), predicted


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_figures_are_the_published_formulas_over_pooled_tokens(missing: float) -> None:
    evidence = puzzle_named("animals").evidence()
    scorer, predicted = _noisy(3, missing)
    result = scorer.score(evidence, "animals", None, seed=4)
    drawn = draw_examples(evidence, "test", firing=10, silent=10, seed=4)
    pairs = [
        (value, level)
        for example in drawn
        for value, level in zip(example.window.activations, predicted[example.window.identity], strict=True)
        if level is not None
    ]
    y, p = np.array(pairs).T
    scaled = p * max(w.max_activation for w in evidence.train.windows) / 10
    expected = {
        "ev_correlation_score": np.corrcoef(y, p)[0, 1],
        "rsquared_score": 1 - np.mean((y - scaled) ** 2) / np.mean(y**2),
        "absolute_dev_explained_score": 1 - np.mean(np.abs(y - scaled)) / np.mean(np.abs(y)),
    }
    for name, value in expected.items():
        score = result.scores[name]
        assert score.value == pytest.approx(value, abs=2e-6) and score.n == len(y)
        assert score.coverage == pytest.approx(len(y) / sum(len(one.window.tokens) for one in drawn))
        assert score.low is not None and score.high is not None and score.low < score.value < score.high


def test_a_calibration_that_falls_is_refused_and_the_correlation_keeps_its_sign() -> None:
    evidence = puzzle_named("animals").evidence()
    against = {
        w.identity: tuple(10.0 - min(value, 10.0) for value in w.activations)
        for _, part in evidence.parts()
        for w in part.windows
    }
    result = Simulation(simulator=Fixed(against), calibration="linear").score(evidence, "x", None, seed=0)
    assert result.score.value is not None and result.score.value < -0.9
    assert result.scores["rsquared_score"].value is None and "turn its sign" in result.notes[0]
    uncalibrated = Simulation(simulator=Fixed(against), calibration="none").score(evidence, "x", None, seed=0)
    assert (
        uncalibrated.scores["rsquared_score"].value is not None
        and "only the correlation" in uncalibrated.notes[0]
    )


@pytest.mark.parametrize("calibration", ["linear", "percentile"])
def test_a_fitted_calibration_reads_validation_and_improves_on_scale(calibration: str) -> None:
    evidence = puzzle_named("animals").evidence()
    weak = {
        w.identity: tuple(min(value, 10.0) / 5 for value in w.activations)
        for _, part in evidence.parts()
        for w in part.windows
    }
    plain = Simulation(simulator=Fixed(weak)).score(evidence, "x", None, seed=0)
    fitted = Simulation(simulator=Fixed(weak), calibration=calibration).score(evidence, "x", None, seed=0)  # type: ignore[arg-type]
    assert fitted.score == plain.score
    better, worse = fitted.scores["rsquared_score"].value, plain.scores["rsquared_score"].value
    assert better is not None and worse is not None and better > 0.95 > worse


def test_levels_are_openais() -> None:
    assert discretised([0.0, 0.99, 1.0, 5.0, 9.99, 10.0, -3.0], 10.0) == [0, 0, 1, 5, 9, 10, 0]
    assert discretised([1.0, 2.0], 0.0) == [0, 0] and discretised([20.0], 10.0) == [10]


def test_the_backend_decides_the_simulator() -> None:
    assert isinstance(simulator_for(rule_judge()), AllAtOnceSimulator)
    assert isinstance(simulator_for(rule_judge(capabilities=CHAT)), TextSimulator)
    assert isinstance(simulator_for(rule_judge(capabilities=BASE)), AllAtOnceSimulator)
    few = simulator_for(rule_judge(capabilities=BASE.model_copy(update={"max_top_logprobs": 5})))
    assert isinstance(few, AllAtOnceSimulator) and few.alternatives == 5
    with pytest.raises(BackendError, match="simulation by text"):
        simulator_for(rule_judge(capabilities=Capabilities(chat=False, completion=True)))


def test_text_that_does_not_fit_is_missing_not_zero() -> None:
    windows = [window(0, 10 * i, (0.0, 1.0, 0.0)) for i in range(5)]
    answers = iter(
        [
            '{"activations": [0, 7, 0]}',
            '{"activations": [0, 7]}',
            '{"activations": [0, 11, 0]}',
            "no",
            "[0, 1, 2]",
        ]
    )
    given: dict[str, str] = {}

    def script(request: Request) -> str:
        first = request.texts[3]
        given.setdefault(first, next(answers) if first not in given else "")
        return given[first]

    distinct = [w.model_copy(update={"tokens": (f"a{i}", "b", "c")}) for i, w in enumerate(windows)]
    backend = ScriptedBackend(script, concurrency=1)
    (simulated,) = carry_out(backend, [TextSimulator().plan("x", distinct)])
    none = (None, None, None)
    assert simulated == [(0.0, 7.0, 0.0), none, none, none, none]


def _entry(token: str, **top: float) -> TokenLogprobs:
    alternatives = tuple(TokenLogprob(token=name, logprob=math.log(p)) for name, p in top.items())
    return TokenLogprobs(token=token, logprob=-1.0, top=alternatives)


def test_the_expected_level_is_over_the_numbers_alone() -> None:
    assert expected_level(_entry("unknown", **{"10": 0.2, "0": 0.2, "unknown": 0.6})) == pytest.approx(5.0)
    assert expected_level(_entry("unknown", **{"unknown": 1.0, "11": 0.1, "-1": 0.1})) is None
    assert expected_level(_entry("unknown")) is None and expected_level(None) is None


def test_all_at_once_reads_its_slots_and_a_token_out_of_line_is_missing() -> None:
    odd = window(0, 0, (0.0, 1.0, 0.0)).model_copy(update={"tokens": ("tab\t", " line\nbreak", " unknown")})

    def script(request: Request) -> Response:
        assert request.prompt is not None and request.max_tokens == 0 and request.prompt_logprobs == 15
        lines = request.prompt.split("\n")
        tokens, place = [], 0
        for number, line in enumerate(lines):
            ending = "\n" if number + 1 < len(lines) else ""
            if line.endswith("\tunknown") and number >= len(lines) - 4:
                head, levels = line[: -len("unknown")], ["3", "6", "9"]
                if place == 1:  # this tokenizer joins the tab and the word
                    tokens += [_entry(head[:-1]), _entry("\tunknown", **{levels[place]: 0.9})]
                else:
                    tokens += [_entry(head), _entry("unknown", **{levels[place]: 0.9})]
                tokens.append(_entry(ending))
                place += 1
            else:
                tokens.append(_entry(line + ending, **{"5": 1.0}))
        return Response(text="", prompt_tokens=tuple(token for token in tokens if token.token))

    (simulated,) = carry_out(ScriptedBackend(script), [AllAtOnceSimulator().plan("x", [odd])])
    assert simulated == [(pytest.approx(3.0), None, pytest.approx(9.0))]
    silent = ScriptedBackend(lambda request: Response(text="", prompt_tokens=(_entry("other text"),)))
    (nothing,) = carry_out(silent, [AllAtOnceSimulator().plan("x", [odd])])
    assert nothing == [(None, None, None)]


def test_a_transformer_of_ours_simulates_all_at_once() -> None:
    tokenizer = Transformer.load("pico").tokenizer
    assert tokenizer is not None
    config = TransformerConfig(
        name="blank", n_layers=1, d_model=8, n_heads=1, d_mlp=8, d_vocab=tokenizer.vocab_size, n_ctx=1024
    )
    model = Transformer(config, seed=0, tokenizer=tokenizer).eval()
    with torch.no_grad():  # it expects "3" or "7" everywhere
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.unembed.weight.zero_()
        model.unembed.weight[[tokenizer.encode(level)[-1] for level in ("3", "7")]] = 1.0
    backend = LocalBackend(model)
    simulator = simulator_for(backend)
    assert isinstance(simulator, AllAtOnceSimulator)
    (simulated,) = carry_out(backend, [simulator.plan("x", [window(0, 0, (0.0, 1.0, 0.0))])])
    assert simulated == [pytest.approx((5.0, 5.0, 5.0))]


def test_tokens_are_shown_on_one_line_each() -> None:
    for token in ("a\nb", "\t", "\r", "\\n", "\u2028", "\x85", "plain"):
        assert len(f"{visible(token)}x".splitlines()) == 1 and "\t" not in visible(token)
    assert visible("\\n") != visible("\n")
