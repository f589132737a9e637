"""Answers as data: JSON found in the answer, held to a type, asked for once more when it does not fit, else missing.

Nothing is completed or guessed. A value is taken only when it is whole in the text, fits the type, and is the only
one in the text that does; a fragment inside broken JSON is never read as an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from neuron_lens.errors import BackendError
from neuron_lens.llm.backend import Backend
from neuron_lens.llm.prompts import load_prompt
from neuron_lens.llm.request import JsonSchema, Message, Missing, Request, Response, problems_of

__all__ = ["StructuredRequest", "answer_of", "complete_structured", "json_values"]

T = TypeVar("T")

_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)```", re.DOTALL)
_OPENER = re.compile(r"[{\[]")
_CLOSER = {"{": "}", "[": "]"}


@dataclass(frozen=True, kw_only=True)
class StructuredRequest(Generic[T]):
    """A chat request whose answer must be of type `shape` (anything pydantic can validate).

    `check` raises ValueError, with words for the model, for what a type cannot say: "expected 5 values, got 4".
    `lengths`: of fields that are lists, how many entries each must have, which the schema then says, too.
    `name` is the schema's name. `repairs`: how often to ask again for a better form.
    """

    request: Request
    shape: type[T]
    check: Callable[[T], None] | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)
    name: str = "answer"
    repairs: int = 1
    _adapter: TypeAdapter[T] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_adapter", _adapter_of(self.shape))
        if not self.request.messages or self.request.json_schema is not None:
            raise BackendError(
                "a structured request is made of a chat request (messages) without a json_schema of its own: the schema "
                "is that of `shape`"
            )

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The JSON schema of `shape`."""
        known: Any = self.shape
        schema = _schema_of_class(known) if isinstance(known, type) else self._adapter.json_schema()
        if not self.lengths:
            return schema
        limits = {name: {"minItems": count, "maxItems": count} for name, count in self.lengths.items()}
        fields = {name: {**field, **limits.get(name, {})} for name, field in schema["properties"].items()}
        return {**schema, "properties": fields}

    def sent_to(self, backend: Backend) -> Request:
        """The request as it is sent first: with the schema to enforce, or told in words where it cannot be enforced."""
        request = self.request
        if backend.capabilities.json_schema:
            return request.model_copy(update={"json_schema": JsonSchema(name=self.name, body=self.schema)})
        prompt = load_prompt("json_answer")
        *before, last = request.messages
        words = f"{last.content}\n\n{prompt.render(schema=json.dumps(self.schema))}"
        return request.model_copy(
            update={
                "messages": (*before, last.model_copy(update={"content": words})),
                "prompt_version": _joined(request.prompt_version, prompt.version),
            }
        )

    def read(self, text: str, *, cut_off: bool = False) -> T:
        """The one value of type `shape` in a model's text, which may be `cut_off` at its longest.

        Raises ValueError, in words for the model, when there is none.
        """
        values = json_values(text)
        if cut_off and not isinstance(values[0] if values else None, dict | list):
            values = []  # a bare number or word may be the beginning of a longer one
        if not values:
            raise ValueError("it holds no complete JSON value")
        fitting: list[T] = []
        problem = ""
        for value in values:
            try:
                read = self._adapter.validate_python(value)
                self._check_lengths(read)
                if self.check is not None:
                    self.check(read)
            except ValidationError as error:
                problem = problem or problems_of(error)
            except ValueError as error:
                problem = problem or str(error)
            else:
                if read not in fitting:
                    fitting.append(read)
        if len(fitting) > 1:
            raise ValueError(f"it holds {len(fitting)} different JSON values that would fit")
        if not fitting:
            raise ValueError(problem)
        return fitting[0]

    def _check_lengths(self, value: T) -> None:
        for name, count in self.lengths.items():
            given = len(getattr(value, name))
            if given != count:
                raise ValueError(f"expected {count} {name}, got {given}")


def _adapter_of(shape: type[T]) -> TypeAdapter[T]:
    known: Any = shape
    return _adapter_of_class(known) if isinstance(known, type) else TypeAdapter(shape)


# Made once a class: a run makes many thousand requests of a few shapes. (Other types may not be hashable.)
@lru_cache(maxsize=64)
def _adapter_of_class(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


@lru_cache(maxsize=64)
def _schema_of_class(shape: Any) -> dict[str, Any]:
    schema: dict[str, Any] = _adapter_of_class(shape).json_schema()
    return schema


async def complete_structured(backend: Backend, asked: StructuredRequest[T]) -> T | Missing:
    """The value asked for, or Missing. Raises what `backend.complete` raises.

    A backend with `json_schema` is given the schema to enforce; to others it is told in words.
    """
    request = asked.sent_to(backend)
    for repair in range(asked.repairs + 1):
        response = await backend.complete(request)
        answer = answer_of(response, request)
        if isinstance(answer, Missing) and answer.kind == "refused":
            return answer
        try:
            return asked.read(response.text, cut_off=response.finish_reason == "length")
        except ValueError as error:
            problem = str(error)
        if response.finish_reason == "length":
            problem += f" (it was cut off after {request.max_tokens} tokens)"
        if repair < asked.repairs:
            request = _repair(request, asked, response, problem)
    return Missing(kind="malformed", reason=f"{problem}; the answer was {response.text[:200]!r}")


def answer_of(response: Response, request: Request) -> Response | Missing:
    """The response itself, or Missing when it is a refusal, or empty though words were asked for."""
    if response.finish_reason == "refused":
        return Missing(kind="refused", reason=response.refusal or "refused without words")
    if request.max_tokens > 0 and not response.text.strip() and not response.tokens:
        return Missing(
            kind="malformed", reason=f"the answer is empty (finish reason: {response.finish_reason})"
        )
    return response


def json_values(text: str) -> list[Any]:
    """The JSON values in a model's answer: the whole text, else those in code fences, else objects and arrays in prose.

    Values inside something broken are left out: from an opening bracket that does not parse, reading goes on after its
    closing one, and ends where there is none (truncated).
    """
    whole = _decoded(text.strip())
    if whole is not _BROKEN:
        return [whole]
    fenced = [value for block in _FENCE.findall(text) if (value := _decoded(block.strip())) is not _BROKEN]
    return fenced or list(_in_prose(text))


_BROKEN = object()


def _decoded(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return _BROKEN


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a field twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_without_repeats)


def _in_prose(text: str) -> list[Any]:
    values: list[Any] = []
    at = 0
    while match := _OPENER.search(text, at):
        start = match.start()
        try:
            value, at = _DECODER.raw_decode(text, start)
            values.append(value)
        except (ValueError, RecursionError):
            end = _closing(text, start)
            if end is None:
                break
            at = end + 1
    return values


def _closing(text: str, start: int) -> int | None:
    """Where the bracket at `start` closes, counting brackets; None when it does not."""
    open_brackets: list[str] = []
    for at in range(start, len(text)):
        if text[at] in _CLOSER:
            open_brackets.append(_CLOSER[text[at]])
        elif open_brackets and text[at] == open_brackets[-1]:
            open_brackets.pop()
            if not open_brackets:
                return at
    return None


def _repair(request: Request, asked: StructuredRequest[Any], response: Response, problem: str) -> Request:
    """Ask again, with the answer and what is wrong with it; with twice the room when it was cut off."""
    prompt = load_prompt("json_repair")
    wish = prompt.render(problem=problem, schema=json.dumps(asked.schema))
    # Endpoints refuse empty messages; an answer without words is shown as such.
    answer = Message(role="assistant", content=response.text if response.text.strip() else "(empty)")
    return request.model_copy(
        update={
            "messages": (*request.messages, answer, Message(role="user", content=wish)),
            "max_tokens": request.max_tokens * (2 if response.finish_reason == "length" else 1),
            "prompt_version": _joined(request.prompt_version, prompt.version),
        }
    )


def _joined(*versions: str) -> str:
    return "+".join(version for version in versions if version)
