"""JSON in answers: found where it is whole, never made up."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    Capabilities,
    JsonSchema,
    Missing,
    Request,
    ScriptedBackend,
    StructuredRequest,
    run_all_structured,
)
from neuron_lens.llm.structured import json_values
from tests.llm.asking import Marks, ask, ask_marks, marks

json_objects = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
).filter(lambda value: isinstance(value, list | dict))
prose = st.text(alphabet="abc .,:;!?\n'\"", max_size=20)


# without double quotes: a value between them is a JSON string, and read as one
@given(json_objects, prose.map(lambda text: text.replace('"', "")), prose)
def test_a_whole_value_is_found_in_prose(value: Any, before: str, after: str) -> None:
    assert json_values(f"{before}{json.dumps(value)}{after}") == [value]


@given(json_objects, prose, prose, st.sampled_from(["json", ""]))
def test_a_fenced_value_is_found(value: Any, before: str, after: str, language: str) -> None:
    text = f"{before}\n```{language}\n{json.dumps(value, indent=1)}\n```\n{after}"
    assert json_values(text) == [value]


@given(json_objects, prose, st.integers(1, 100))
def test_nothing_is_read_from_a_truncated_value(value: Any, before: str, cut: int) -> None:
    written = json.dumps(value)
    kept = written[: max(1, len(written) * cut // 101)]
    assert json_values(before + kept) == []


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('[see below] {"a": 1}', [{"a": 1}]),
        ("{'a': [1, 2]}", []),  # python, not JSON: the list inside is a fragment
        ('{"a": [1, 2] and "b": [3]}', []),
        ('{"a": NaN}', []),
        ('{"a": 1, "a": 2}', []),
        ("[1] or [2]", [[1], [2]]),
        ("7", [7]),
        ("the answer is 7", []),
        ("", []),
        ("[" * 100_000, []),
    ],
)
def test_what_counts_as_a_value(text: str, values: list[Any]) -> None:
    assert json_values(text) == values


def test_contradicting_values_are_no_answer() -> None:
    asked = ask_marks()
    assert asked.read(f"{marks([1, 1, 1, 1])} that is, {marks([1, 1, 1, 1])}") == Marks(marks=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="2 different"):
        asked.read(f"{marks([1, 1, 1, 1])} or {marks([0, 0, 0, 0])}")
    # an example of another form does not stand in the way
    assert asked.read(f"{marks([1])}, no: {marks([0, 0, 0, 0])}") == Marks(marks=[0, 0, 0, 0])


def test_a_bare_value_that_was_cut_off_is_no_answer() -> None:
    asked = StructuredRequest(request=ask("x"), shape=int)
    assert asked.read("12") == 12
    with pytest.raises(ValueError, match="no complete"):
        asked.read("1", cut_off=True)
    assert ask_marks().read(f"{marks([1, 1, 1, 1])} because", cut_off=True) == Marks(marks=[1, 1, 1, 1])


def test_an_answer_that_never_fits_is_missing_after_one_repair() -> None:
    backend = ScriptedBackend(lambda request: marks([1, 2, 3]))
    (result,) = run_all_structured(backend, [ask_marks()], progress=False)
    assert isinstance(result, Missing) and result.kind == "malformed"
    assert "expected 4 marks, got 3" in result.reason
    assert backend.calls == 2


def test_the_repair_shows_the_answer_and_its_fault() -> None:
    def mends(request: Request) -> str:
        return "" if len(request.messages) == 1 else marks([1, 2, 3, 4])

    backend = ScriptedBackend(mends)
    assert run_all_structured(backend, [ask_marks()], progress=False) == [Marks(marks=[1, 2, 3, 4])]
    first, second = backend.requests
    assert second.messages[:1] == first.messages
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    assert all(message.content for message in second.messages)
    assert "json_repair@" in second.prompt_version


def test_the_schema_is_enforced_or_told() -> None:
    for enforced in (True, False):
        backend = ScriptedBackend(
            lambda request: marks([1, 2, 3, 4]), capabilities=Capabilities(json_schema=enforced)
        )
        run_all_structured(backend, [ask_marks()], progress=False)
        (request,) = backend.requests
        assert request == ask_marks().sent_to(backend)
        assert (request.json_schema is not None) == enforced
        assert ('"marks"' in request.messages[-1].content) != enforced
        assert ("json_answer@" in request.prompt_version) != enforced


def test_other_shapes_and_wrong_requests() -> None:
    asked = StructuredRequest(request=ask("x"), shape=list[bool])
    assert asked.read("[true, false]") == [True, False]
    for request in (Request(prompt="x", max_tokens=1), ask("x", json_schema=JsonSchema(name="x", body={}))):
        with pytest.raises(BackendError, match="structured request"):
            StructuredRequest(request=request, shape=Marks)
