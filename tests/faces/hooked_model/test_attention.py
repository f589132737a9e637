"""Requests at patterns and scores write the cells they name, in every row as in the row alone, and never show the future."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faces.hooked_model.cases import ROWS, both_families, face, inputs, near
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model import ActivationCache, ExtractionConfig, HookedModel, Intervention

BOTH = ExtractionConfig(extract_attn_pattern=True, extract_attn_scores=True, extract_head_z=True)
OTHERS = torch.tensor([[4, 8, 15, 16], [22, 3, 1, 2], [7, 7, 2, 9], [1, 9, 8, 6]])
FOUR = [0, 1, 2, 3]
# type -> token positions, and the queries and keys they mean in a row of some length
PLACES: dict[str, tuple[Any, Any]] = {
    "full": (["all"], lambda n: (range(n), range(n))),
    "columns": ([1, "first"], lambda n: (range(n), [1, 0])),
    "rows": (["last", 2], lambda n: ([n - 1, 2], range(n))),
    "grid": ((["last", (1, 3)], [2, 0]), lambda n: ([n - 1, 1, 2], [2, 0])),
}
several_rows = pytest.mark.parametrize("case", ["several", "left", "right"])
every_place = pytest.mark.parametrize("kind", list(PLACES))
either_side = pytest.mark.parametrize("when", ["after", "before"])


def rows_of(case: str) -> list[list[int]]:
    """The prompts of a case, without padding."""
    return [row[:4] for row in ROWS] if case == "several" else ROWS


def run(model: HookedModel, case: Any, *interventions: Intervention) -> ActivationCache:
    """Patterns, scores and logits at all positions, row by row."""
    given = inputs(case) if isinstance(case, str) else case
    return model.forward(given, ["all"], extraction_config=BOTH, ragged=True, interventions=interventions)


def request(kind: str, when: str, **fields: Any) -> Intervention:
    """At head 2 of layer 1."""
    positions = fields.pop("token_positions", PLACES[kind][0])
    before = when == "before" and kind != "full"
    key = "scores_L1H2" if when == "before" and kind == "full" else "pattern_L1H2"
    name = f"{kind}_pre_softmax" if before else kind
    return Intervention(activation=key, type=name, token_positions=positions, **fields)


def edited(cache: ActivationCache, row: int, when: str, change: Any) -> Tensor:
    """The pattern of a row once some of its scores or probabilities have been changed in place."""
    if when == "after":
        pattern = cache["pattern_L1H2"][row].clone()
        change(pattern)
        return pattern
    scores = cache["scores_L1H2"][row].clone()
    change(scores)
    return scores.softmax(-1)


def check(
    model: HookedModel, case: str, one: Intervention, expected: list[Tensor], *, alone: bool = True
) -> None:
    """Head 2's patterns are these, other heads' as they were; and each row is what it is alone."""
    plain, now = run(model, case), run(model, case, one)
    for row, ids in enumerate(rows_of(case)):
        assert near(now["pattern_L1H2"][row], expected[row])
        assert not now["pattern_L1H2"][row].triu(1).any()
        assert near(now["pattern_L1H1"][row], plain["pattern_L1H1"][row])
        if alone:
            assert near(run(model, torch.tensor([ids]), one)["logits"][0], now["logits"][row])


@both_families
@several_rows
@every_place
@either_side
@pytest.mark.parametrize("does", ["set", "add"])
def test_a_number_is_written_or_added_where_it_is_said(
    family: str, case: str, kind: str, when: str, does: str
) -> None:
    model, plain = face(family), run(face(family), case)
    expected = []
    for row, ids in enumerate(rows_of(case)):
        queries, keys = PLACES[kind][1](len(ids))

        def change(x: Tensor, queries: Any = queries, keys: Any = keys) -> None:
            for q in queries:
                for k in keys:
                    if k <= q:
                        x[q, k] = 0.3 if does == "set" else x[q, k] + 0.3

        expected.append(edited(plain, row, when, change))
    check(model, case, request(kind, when, operation=does, patching_values=0.3), expected)


@pytest.mark.parametrize("case", ["left", "right"])
@every_place
@either_side
@pytest.mark.parametrize("does", ["set", "add"])
def test_a_grid_of_all_positions_is_cut_to_the_row(case: str, kind: str, when: str, does: str) -> None:
    model, plain = face(), run(face(), case)
    longest = max(map(len, rows_of(case)))
    values = torch.randn(longest, longest, generator=torch.Generator().manual_seed(2))
    blank = -torch.inf if when == "before" and does == "set" else 0.0
    values = values.masked_fill(torch.ones(longest, longest).triu(1).bool(), blank)
    expected = []
    for row, ids in enumerate(rows_of(case)):
        queries, keys = PLACES[kind][1](len(ids))

        def change(x: Tensor, queries: Any = queries, keys: Any = keys) -> None:
            for q in queries:
                for k in keys:
                    x[q, k] = values[q, k] if does == "set" else x[q, k] + values[q, k]

        expected.append(edited(plain, row, when, change))
    one = request(kind, when, operation=does, patching_values=values)
    # the longest row says how large the grid is, so a shorter one cannot be given it alone
    check(model, case, one, expected, alone=False)


def test_a_grid_keeps_the_order_of_the_request() -> None:
    model, plain = face(), run(face(), "several")
    values = torch.tensor([[0.1, 0.2], [0.0, 0.3], [0.4, 0.5]])
    expected = []
    for row in range(3):
        pattern = plain["pattern_L1H2"][row].clone()
        for q, line in zip((3, 1, 2), values, strict=True):
            for k, value in zip((2, 0), line, strict=True):
                pattern[q, k] = value
        expected.append(pattern)
    check(model, "several", request("grid", "after", patching_values=values), expected)


@both_families
@several_rows
@either_side
@pytest.mark.parametrize("averaged", [True, False])
def test_the_mean_of_other_examples_is_written(family: str, case: str, when: str, averaged: bool) -> None:
    model, plain = face(family), run(face(family), case)
    config = BOTH.model_copy(update={"avg_over_example": averaged})
    source = model.forward(OTHERS, FOUR, extraction_config=config)
    key = "scores_L1H2" if when == "before" else "pattern_L1H2"
    mean = model.forward(OTHERS, FOUR, extraction_config=BOTH)[key].mean(0)

    def change(x: Tensor) -> None:
        x[:4, :4] = mean

    expected = [edited(plain, row, when, change) for row in range(len(rows_of(case)))]
    check(model, case, request("grid", when, token_positions=(FOUR, FOUR), source=source), expected)


@both_families
@several_rows
@either_side
def test_a_resampled_pattern_is_another_examples(family: str, case: str, when: str) -> None:
    model, plain = face(family), run(face(family), case)
    source = model.forward(OTHERS, FOUR, extraction_config=BOTH)
    one = request("grid", when, token_positions=(FOUR, FOUR), source=source, operation="resample", seed=4)
    now, again = run(model, case, one), run(model, case, one)
    key = "scores_L1H2" if when == "before" else "pattern_L1H2"
    for row in range(len(rows_of(case))):
        assert torch.equal(now["pattern_L1H2"][row], again["pattern_L1H2"][row])
        candidates = []
        for other in source[key]:

            def change(x: Tensor, other: Tensor = other) -> None:
                x[:4, :4] = other

            candidates.append(edited(plain, row, when, change))
        assert any(near(now["pattern_L1H2"][row], candidate) for candidate in candidates)


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["columns", "rows", "grid", "columns_pre_softmax", "grid_pre_softmax"])
def test_a_padded_row_is_scaled_as_the_row_alone(family: str, side: str, kind: str) -> None:
    model = face(family)
    positions = PLACES[kind.removesuffix("_pre_softmax")][0]
    one = Intervention(
        activation="pattern_L1H2", type=kind, token_positions=positions, multiplication_value=0.5
    )
    batch = run(model, side, one)
    for row, ids in enumerate(ROWS):
        alone = run(model, torch.tensor([ids]), one)
        assert near(batch["pattern_L1H2"][row], alone["pattern_L1H2"][0])
        assert near(batch["logits"][row], alone["logits"][0])
    assert not near(batch["logits"][0], run(model, side)["logits"][0])


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"type": "columns", "token_positions": ["first"]},
        {"type": "columns_pre_softmax", "token_positions": [1]},
        {"type": "columns", "token_positions": ["last"], "multiplication_value": 0.25},
        {"type": "grid", "token_positions": (["last"], [1]), "patching_values": 0.7},
        {"type": "rows_pre_softmax", "token_positions": ["last"], "patching_values": 0.0},
        {"type": "columns", "token_positions": [1], "patching_values": 0.3, "operation": "add"},
        {"type": "keep_self", "token_positions": ["last"]},
    ],
)
def test_a_padded_prompt_is_continued_as_alone_with_attention_edited(
    family: str, side: str, cached: bool, fields: dict[str, Any]
) -> None:
    model = face(family)
    options = {"max_new_tokens": 3, "temperature": 0.0, "return_logits": True, "use_kv_cache": cached}
    ones = [
        Intervention(activation=f"pattern_L{layer}H{head}", **fields) for layer in range(3) for head in (0, 2)
    ]
    together = model.generate(inputs(side), options, interventions=ones)
    for row, ids in enumerate(ROWS):
        (alone,) = model.generate(torch.tensor([ids]), options, interventions=ones)
        assert alone.ids == together[row].ids and near(alone.logits, together[row].logits)
    plain = model.generate(inputs(side), options)
    assert any(not near(a.logits, b.logits) for a, b in zip(plain, together, strict=True))


@both_families
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prompt_is_continued_as_alone_with_patches_in_it(family: str, side: str) -> None:
    model, options = face(family), {"max_new_tokens": 3, "temperature": 0.0, "return_logits": True}
    config = ExtractionConfig(extract_resid_in=True, extract_head_z=True)
    base = model.forward(OTHERS[:3], ["last", 1], extraction_config=config)
    queries = [
        {"patching_elem": "@last", "layers_to_patch": [1], "activation_type": "resid_in_{}"},
        {"patching_elem": 1, "layers_to_patch": 2, "activation_type": "head_z_L{}H{}"},
    ]
    together = model.generate(
        inputs(side), options, patching_queries=[{**query, "patching_activations": base} for query in queries]
    )
    for row, ids in enumerate(ROWS):
        own = [{**query, "patching_activations": base, "base_activation_index": row} for query in queries]
        (alone,) = model.generate(torch.tensor([ids]), options, patching_queries=own)
        assert alone.ids == together[row].ids and near(alone.logits, together[row].logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"patching_values": torch.ones(7, 7)},
            "row 0: the values to write let a query see later keys; make those 0",
        ),
        (
            {"type": "rows_pre_softmax", "token_positions": ["all"], "patching_values": torch.zeros(7, 7)},
            "make those -inf",
        ),
        ({"operation": "add", "patching_values": torch.ones(7, 7)}, "later keys"),
        ({"patching_values": torch.ones(3, 2)}, "row 0: a grid of 7 queries and 7 keys"),
        ({"patching_values": torch.zeros(2, 7, 7)}, "values for 2 rows"),
        ({"patching_values": torch.ones(7)}, r"\[queries, keys\]"),
        ({"patching_values": torch.full((7, 7), torch.nan)}, "NaN"),
        (
            {"type": "grid_pre_softmax", "token_positions": ([1], [0, 1]), "patching_values": -torch.inf},
            "query 1 is left with nothing",
        ),
        ({"type": "keep_self", "token_positions": ["last"], "patching_values": 1.0}, "keep_self cuts"),
        ({"source": ActivationCache({"pattern_L0H0": torch.ones(1, 7, 7)})}, "has no 'pattern_L1H2'"),
        ({"source": ActivationCache({"pattern_L1H2": [torch.ones(7, 7)]})}, "ragged"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(face(), "left", Intervention(activation="pattern_L1H2", **fields))


@both_families
@several_rows
def test_vectors_are_added_position_by_position(family: str, case: str) -> None:
    model, config = face(family), ExtractionConfig(extract_head_z=True, extract_resid_mid=True)
    plain = model.forward(inputs(case), ["last", 1], extraction_config=config)
    for key in ("head_z_L1H3", "resid_mid_1"):
        values = torch.randn(2, plain[key].shape[-1], generator=torch.Generator().manual_seed(1))
        one = Intervention(
            activation=key, token_positions=["last", 1], operation="add", patching_values=values
        )
        now = model.forward(inputs(case), ["last", 1], extraction_config=config, interventions=[one])
        assert near(now[key], plain[key] + values)
        assert not near(now["logits"], plain["logits"])
