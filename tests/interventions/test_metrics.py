"""Metrics are what their formulas say, row by row; padding changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.interventions import (
    CrossEntropy,
    KLDivergence,
    LogitDifference,
    Metric,
    OfLogits,
    TokenLogit,
    TokenProbability,
    TokenRank,
    sweep,
)
from neuron_lens.interventions.kinds import Zero
from tests.interventions.models import prompts, tiny_model

VOCAB, ROWS, LENGTH = 11, 3, 6


def logits_of(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randn(ROWS, length, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def metrics(reference: Tensor) -> dict[str, Metric]:
    several = torch.tensor([[1, 2], [3, 4], [0, 10]])
    return {
        "difference": LogitDifference(3, 5),
        "difference at a position": LogitDifference(torch.tensor([1, 2, 3]), several, position=1),
        "logit": TokenLogit(torch.tensor([7, 0, 2])),
        "logits": TokenLogit(several, position=torch.tensor([0, -2, 2])),
        "probability": TokenProbability(4),
        "log probability": TokenProbability(several, -2, log=True),
        "rank": TokenRank(9),
        "best rank": TokenRank(several, 0),
        "loss": CrossEntropy(),
        "kl": KLDivergence(reference),
        "kl at a position": KLDivergence(reference, position=-1),
    }


def rows_of(metric: Metric, row: int) -> Metric:
    """The metric of one row alone."""
    alone = metric.__class__.__new__(metric.__class__)
    for name, value in vars(metric).items():
        per_row = isinstance(value, Tensor) and value.dim() > 0
        alone.__dict__[name] = value[row : row + 1] if per_row else value
    return alone


@settings(max_examples=12, deadline=None)
@given(
    st.integers(0, 10_000),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=ROWS, max_size=ROWS),
)
def test_a_padded_row_gives_what_it_gives_alone(seed: int, sides: list[tuple[int, int]]) -> None:
    logits, reference, tokens = logits_of(seed), logits_of(seed + 1), prompts(ROWS, LENGTH, vocab=VOCAB)
    pad = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    for row, (left, right) in enumerate(sides):
        pad[row, :left], pad[row, LENGTH - right :] = True, right > 0
        pad[row, left : LENGTH - right] = False
    # what stands at padding must not matter, whatever it is
    logits[pad], reference[pad] = torch.nan, torch.nan
    positions_everywhere = {"logits": 2, "difference at a position": 1, "best rank": 0}
    for name, metric in metrics(reference).items():
        if int((~pad).sum(-1).min()) <= positions_everywhere.get(name, 1):
            continue
        found = metric(logits, tokens, pad)
        assert found.shape == (ROWS,)
        for row in range(ROWS):
            real = ~pad[row]
            one = rows_of(metric, row)
            if isinstance(metric, KLDivergence):
                one = KLDivergence(reference[row : row + 1, real], metric.position)
            alone = one(logits[row : row + 1, real], tokens[row : row + 1, real])
            torch.testing.assert_close(found[row : row + 1], alone, msg=lambda m, n=name: f"{n}: {m}")


def test_metrics_are_their_formulas() -> None:
    logits, tokens, reference = logits_of(1), prompts(ROWS, LENGTH, vocab=VOCAB), logits_of(2)
    found = {name: metric(logits, tokens) for name, metric in metrics(reference).items()}
    last, probabilities = logits[:, -1], logits.softmax(-1)
    torch.testing.assert_close(found["difference"], last[:, 3] - last[:, 5])
    assert float(found["difference at a position"][1]) == pytest.approx(
        float(logits[1, 1, 2] - (logits[1, 1, 3] + logits[1, 1, 4]) / 2)
    )
    assert float(found["logit"][0]) == float(logits[0, -1, 7])
    assert float(found["logits"][1]) == pytest.approx(float(logits[1, -2, [3, 4]].mean()))
    torch.testing.assert_close(found["probability"], probabilities[:, -1, 4])
    assert float(found["log probability"][2]) == pytest.approx(
        math.log(float(probabilities[2, -2, 0] + probabilities[2, -2, 10])), abs=1e-5
    )
    order = last.argsort(-1, descending=True)
    assert found["rank"].tolist() == [order[row].tolist().index(9) for row in range(ROWS)]
    first = logits[:, 0].argsort(-1, descending=True)
    best = [
        min(first[row].tolist().index(t) for t in pair) for row, pair in enumerate([(1, 2), (3, 4), (0, 10)])
    ]
    assert found["best rank"].tolist() == best
    for row in range(ROWS):
        loss = torch.nn.functional.cross_entropy(logits[row, :-1], tokens[row, 1:])
        assert float(found["loss"][row]) == pytest.approx(float(loss), abs=1e-5)
        kl = torch.nn.functional.kl_div(
            logits[row].log_softmax(-1), reference[row].log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1)
        assert float(found["kl"][row]) == pytest.approx(float(kl.mean()), abs=1e-5)
        assert float(found["kl at a position"][row]) == pytest.approx(float(kl[-1]), abs=1e-5)


def test_functions_are_given_the_columns_they_ask_for() -> None:
    logits, tokens = logits_of(3), prompts(ROWS, LENGTH, vocab=VOCAB)
    own = torch.tensor([0, 2, 5])
    for columns, expected in (
        (None, logits),
        (-1, logits[:, -1:]),
        (slice(1, 3), logits[:, 1:3]),
        (own, logits[torch.arange(ROWS), own][:, None]),
    ):
        seen: list[Tensor] = []

        def function(given: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(given)
            return given.sum((1, 2))

        found = OfLogits(function, columns)(logits, tokens)
        assert torch.equal(seen[0], expected)
        torch.testing.assert_close(found, expected.sum((1, 2)))


@pytest.mark.parametrize(
    "metric, said",
    [
        (LogitDifference(3, 23), "23 is outside the vocabulary of 23"),
        (TokenProbability(-1), "token id -1 is outside"),
        (LogitDifference(torch.tensor([1, 2, 3]), 4), "tokens for 3 rows"),
        (TokenLogit(3, position=7), "position 7 is not in row 0"),
        (OfLogits(lambda x: x), "one number for each row"),
        (OfLogits(lambda x: x.mean(), columns=9), "are not in prompts of 7 columns"),
        (KLDivergence(torch.zeros(2, 5, 23)), "the reference logits are for prompts"),
    ],
)
def test_metrics_that_do_not_fit_are_refused(metric: Metric, said: str) -> None:
    model, tokens = tiny_model(n_layers=1), prompts()
    with pytest.raises(RequestError, match=said):
        sweep(model, tokens, [Zero(site="mlp.post_act", layers=0)], metric)
    with pytest.raises(RequestError, match="has no loss"):
        CrossEntropy().bind(tokens, torch.tensor([[False] * 7, [True] * 6 + [False]]))


def test_gradients_do_not_come_from_padding() -> None:
    logits = logits_of(4).requires_grad_()
    tokens, reference = prompts(ROWS, LENGTH, vocab=VOCAB), logits_of(5)
    pad = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    pad[:, :2] = True
    options: dict[str, Any] = metrics(reference)
    for name in ("loss", "kl", "probability", "difference"):
        (gradient,) = torch.autograd.grad(options[name](logits, tokens, pad).sum(), logits)
        assert bool((gradient[:, :2] == 0).all()) and bool((gradient != 0).any()), name
