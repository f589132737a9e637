"""The position grammar means the same in a row of a padded batch and in the row alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.positions import resolve_positions, resolve_query_position
from neuron_lens.interventions import TokenText
from neuron_lens.tokenizers import bytes_tokenizer

SEVEN = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def padded(rows: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
    """Rows of ids as tokens and pad [batch, pos]."""
    longest = max(map(len, rows))
    tokens, pad = [], []
    for row in rows:
        missing = longest - len(row)
        left = missing if side == "left" else 0
        tokens.append([0] * left + row + [0] * (missing - left))
        pad.append([True] * left + [False] * len(row) + [True] * (missing - left))
    return torch.tensor(tokens), torch.tensor(pad)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("last", [6]),
        ("last-1", [6]),
        ("last-3", [4]),
        ("last-7", [0]),
        ("first", [0]),
        ("position-2", [2]),
        ("@last", [6]),
        ("all", [0, 1, 2, 3, 4, 5, 6]),
        ("all-text", [0, 1, 2, 3, 4, 5, 6]),
        (3, [3]),
        (-7, [0]),
        ((0, 7), [0, 1, 2, 3, 4, 5, 6]),
        ((2, -1), [2, 3, 4, 5]),
        ((0, -1), [0, 1, 2, 3, 4, 5]),
        ((-3, -1), [4, 5]),
        ((-3, None), [4, 5, 6]),
        (slice(4, None), [4, 5, 6]),
        ([5, 1], [5, 1]),
        ("inputs-partition-0", [0, 1]),
        ("inputs-partition-1", [2, 3, 4]),
        ("position-group-2", [5, 6]),
    ],
)
def test_a_name_means_these_positions(name: Any, expected: list[int]) -> None:
    resolved = resolve_positions([name], SEVEN, pivot_positions=[5, 2])
    assert resolved.positions == ((tuple(expected),),)
    assert resolved.columns.tolist() == [expected]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lst", "did you mean"),
        ("last-8", "row 0"),
        ("last-0", "row 0"),
        (7, "row 0: the row has 7 tokens"),
        (-8, "row 0"),
        ((3, 3), "row 0"),
        ((5, 2), "row 0"),
        ((0, 8), "row 0"),
        ((1, 2, 3), "a span is"),
        (True, "no position"),
        (None, "no position"),
        ([1.5], "not a whole number"),
        ("inputs-partition-1", "give pivot_positions"),
        ("random-text-8", "cannot draw 8 of 7"),
        ("special", "needs a tokenizer"),
    ],
)
def test_what_means_nothing_is_refused(name: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        resolve_positions([name], SEVEN)


@pytest.mark.parametrize("request_", ["last", [], None, ["last", "last"]])
def test_a_request_is_a_list_without_repeats(request_: Any) -> None:
    with pytest.raises(RequestError, match=r"must be a list|twice"):
        resolve_positions(request_, SEVEN)


def test_the_error_names_the_row_that_has_no_such_position() -> None:
    tokens, pad = padded([[1, 2, 3, 4], [1, 2]], "left")
    with pytest.raises(RequestError, match="row 1: the row has 2 tokens"):
        resolve_positions([3], tokens, pad)


@given(
    rows=st.lists(st.lists(st.integers(1, 20), min_size=4, max_size=9), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 5),
)
def test_a_row_of_a_batch_is_resolved_as_the_row_alone(rows: list[list[int]], side: str, seed: int) -> None:
    request = [
        "last",
        "first",
        (1, -1),
        "all",
        "inputs-partition-1",
        "random-text-2",
        "random-inputs-partition-0",
        -2,
    ]
    tokens, pad = padded(rows, side)
    batch = resolve_positions(request, tokens, pad, pivot_positions=[2], seed=seed)
    for index, row in enumerate(rows):
        alone = resolve_positions(request, torch.tensor([row]), pivot_positions=[2], seed=seed)
        assert [group[index] for group in batch.positions] == [group[0] for group in alone.positions]
        chosen = tokens[index, batch.columns[index][batch.mask[index]]].tolist()
        assert chosen == [row[p] for group in alone.positions for p in group[0]]


def test_groups_lie_one_after_another_and_ragged_rows_are_told() -> None:
    tokens, pad = padded([[1, 2, 3], [4]], "right")
    resolved = resolve_positions(["all", "last"], tokens, pad)
    assert resolved.mapping_index() == {"all": [0, 1, 2], "last": [3]}
    assert resolved.mapping_index(averaged=True) == {"all": [0], "last": [1], "info": "avg"}
    assert resolved.row_mapping(1) == {"all": [0], "last": [1]}
    assert resolved.token_dict() == {"all": [[0, 1, 2], [0]], "last": [[2], [0]]}
    with pytest.raises(RequestError, match="3 positions in row 0 and 1 in row 1"):
        resolved.require_rectangular()


def test_pivots_may_differ_by_row() -> None:
    tokens = torch.arange(12).reshape(2, 6)
    resolved = resolve_positions(["inputs-partition-0"], tokens, pivot_positions=[[2], [4]])
    assert resolved.positions == (((0, 1), (0, 1, 2, 3)),)
    with pytest.raises(RequestError, match="3 rows"):
        resolve_positions(["inputs-partition-0"], tokens, pivot_positions=[[2], [4], [1]])


def test_pivots_may_be_names_and_texts() -> None:
    tokenizer = bytes_tokenizer()
    ids = [tokenizer.encode(text, bos=False) for text in ("a cat sat", "the cat sat on")]
    tokens, pad = padded(ids, "left")
    options: dict[str, Any] = {"tokenizer": tokenizer}
    resolved = resolve_positions(
        ["inputs-partition-0", "inputs-partition-1"], tokens, pad, pivot_positions=["cat", "@last"], **options
    )
    assert resolved.positions == (((0, 1), (0, 1, 2, 3)), (tuple(range(2, 8)), tuple(range(4, 13))))
    for pivots, message in (
        (["cow"], "row 0: the text 'cow'"),
        ([9], "row 0: the row has 9 tokens"),
        ([None], "row 0: None is neither"),
        ([1.5], "row 0: 1.5 is neither"),
        ("cat", "must be a list"),
        ([[1], [2], [3]], "for 3 rows"),
    ):
        with pytest.raises(RequestError, match=message):
            resolve_positions(["inputs-partition-0"], tokens, pad, pivot_positions=pivots, **options)


def test_texts_and_special_tokens() -> None:
    tokenizer = bytes_tokenizer()
    tokens = torch.tensor([tokenizer.encode("the cat, the dog", bos=False)])
    where = resolve_positions([TokenText(text="cat")], tokens, tokenizer=tokenizer)
    assert where.positions == (((4, 5, 6),),)
    first = resolve_query_position("the", tokens, None, tokenizer=tokenizer)
    assert first.positions == (((0, 1, 2),),)
    with pytest.raises(RequestError, match="row 0"):
        resolve_query_position("cow", tokens, None, tokenizer=tokenizer)


def test_image_names_follow_the_markers_of_the_tokenizer() -> None:
    marks = {"<start_of_image>": 90, "<image_soft_token>": 91, "<end_of_image>": 92, "<bos>": 93}
    tokenizer: Any = SimpleNamespace(name="toy", special_tokens=marks)
    tokens = torch.tensor([[93, 1, 90, 91, 91, 92, 2, 90, 91, 92]])
    request = ["all-text", "all-image", "start-image", "end-image", "last-image", "special"]
    found = resolve_positions(request, tokens, tokenizer=tokenizer)
    assert [group[0] for group in found.positions] == [
        (0, 1, 6),
        (2, 3, 4, 5, 7, 8, 9),
        (2, 7),
        (5, 9),
        (4, 8),
        (0, 2, 3, 4, 5, 7, 8, 9),
    ]
    with pytest.raises(RequestError, match="row 0: selects nothing"):
        resolve_positions(["all-image"], torch.tensor([[1, 2]]), tokenizer=tokenizer)
    plain: Any = SimpleNamespace(name="plain", special_tokens={})
    with pytest.raises(RequestError, match="defines no image markers"):
        resolve_positions(["all-image"], tokens, tokenizer=plain)
