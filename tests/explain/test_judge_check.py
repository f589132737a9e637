"""A judge that knows the rules passes every puzzle; one that answers at random passes as many as chance gives."""

from __future__ import annotations

import pytest

from neuron_lens.errors import RequestError
from neuron_lens.explain.judge_check import check_judge, estimate_check
from neuron_lens.explain.puzzles import puzzles
from neuron_lens.explain.scorers import Causal, Detection, Fuzzing

from .judge import rule_judge

SOME = puzzles()[:9]


def test_a_judge_that_knows_is_told_from_one_that_guesses() -> None:
    scorers = (Detection(), Fuzzing(n_firing=15, n_silent=15))
    for check in check_judge(rule_judge(), scorers, chosen=SOME, progress=False):
        assert check.n_first == len(SOME) and check.coverage == 1.0
        assert check.mean_true == 1.0 and check.mean_false is not None and check.mean_false < 0.9
        assert check.gain.low is not None and check.gain.low > 0.2 and check.gain.n == len(SOME)
    guessing = rule_judge(salt=4, error=0.5)
    (check,) = check_judge(guessing, [Detection()], chosen=SOME, progress=False)
    assert check.gain.low is not None and check.gain.high is not None
    assert check.gain.low < 0 < check.gain.high
    assert check.n_first < len(SOME)


def test_the_estimate_is_what_is_asked() -> None:
    judge = rule_judge()
    said = estimate_check(judge, [Detection(batch=10)], chosen=SOME[:2])
    assert judge.calls == 0
    check_judge(judge, [Detection(batch=10)], chosen=SOME[:2], progress=False)
    assert said.calls == judge.calls == 2 * 4 * 5


def test_nothing_to_try_is_refused() -> None:
    for scorers, chosen in (([], SOME), ([Detection()], [])):
        with pytest.raises(RequestError, match="at least one of each"):
            check_judge(rule_judge(), scorers, chosen=chosen, progress=False)
    with pytest.raises(RequestError):
        check_judge(rule_judge(), [Causal()], chosen=SOME[:1], progress=False)
