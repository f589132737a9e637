"""What is asked of a language model and what comes back: frozen, closed records, plain Python.

A request is complete: everything that can change the answer is in it (the model and where it runs are the
backend's), so that its hash can stand for it in a cache. An answer that could not be had is a `Missing` with
its reason; it is never a default value.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from neuron_lens.errors import BackendError

__all__ = [
    "FinishReason",
    "JsonSchema",
    "Message",
    "Missing",
    "MissingKind",
    "Request",
    "Response",
    "TokenLogprob",
    "TokenLogprobs",
    "Usage",
]

# "refused": the model declined, or a filter of the endpoint stopped it; "other": a reason this library does not use.
FinishReason = Literal["stop", "length", "refused", "other"]

# "failed": no answer could be had; "refused": the model declined; "malformed": the answer does not read as what was
# asked for, even after a repair.
MissingKind = Literal["failed", "refused", "malformed"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Message(_Frozen):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


class JsonSchema(_Frozen):
    """The JSON schema an answer must match. `name` is letters, digits, `_` and `-` (endpoints ask for one)."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    body: dict[str, Any]


class Request(_Frozen):
    """One call of a language model: a chat (`messages`) or a text to continue (`prompt`), exactly one of the two.

    Two requests that are equal have one answer in a cache. To draw several answers at a temperature above 0, give
    each request its own `seed`.

    Attributes:
        max_tokens: the longest answer, in tokens. 0 (a prompt only read, for its log-probabilities) needs `prompt_logprobs`.
        top_logprobs: how many alternatives to report at each generated token; None reports no log-probabilities, 0
            those of the generated tokens alone.
        prompt_logprobs: the same for each token of the prompt.
        json_schema: what the answer must match, enforced by backends that can (see `structured`).
        prompt_version: the version of the prompt file it was rendered from (`Prompt.version`), "" for none.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    max_tokens: int = Field(ge=0)
    temperature: float = Field(default=0.0, ge=0.0)
    top_logprobs: int | None = Field(default=None, ge=0)
    prompt_logprobs: int | None = Field(default=None, ge=0)
    json_schema: JsonSchema | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    prompt_version: str = ""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise BackendError(f"this request cannot be sent: {problems_of(error)}") from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError(
                "give either messages (a chat) or prompt (a text to continue), not both or neither"
            )
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            raise ValueError("max_tokens=0 asks for nothing unless prompt_logprobs is given")
        if any(not stop for stop in self.stop):
            raise ValueError("an empty stop string would end every answer at once")
        return self

    @property
    def canonical(self) -> str:
        """The request as JSON in which equal requests are equal texts."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, separators=(",", ":")
        )

    @property
    def texts(self) -> tuple[str, ...]:
        """The texts the model will read."""
        return (
            (self.prompt,) if self.prompt is not None else tuple(message.content for message in self.messages)
        )


class TokenLogprob(_Frozen):
    """A token's text and its natural-log probability."""

    token: str
    logprob: float


class TokenLogprobs(_Frozen):
    """What the model thought at one place: the token that is there, and the likeliest ones, best first.

    `logprob` is None at the first token of a prompt, which nothing precedes.
    """

    token: str
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()


class Usage(_Frozen):
    """Tokens read and written."""

    prompt_tokens: int = Field(default=0, ge=0)
    completion_tokens: int = Field(default=0, ge=0)

    @property
    def total_tokens(self) -> int:
        """Both together."""
        return self.prompt_tokens + self.completion_tokens

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


class Response(_Frozen):
    """One answer. `refusal` holds the model's or filter's words when `finish_reason` is "refused".

    `tokens` are the generated tokens and `prompt_tokens` those of the prompt, with log-probabilities, when the
    request asked for them. `usage` is None when the endpoint reports none. `model` is the model's own name for itself.
    """

    text: str
    finish_reason: FinishReason = "stop"
    refusal: str | None = None
    tokens: tuple[TokenLogprobs, ...] | None = None
    prompt_tokens: tuple[TokenLogprobs, ...] | None = None
    usage: Usage | None = None
    model: str = ""

    @model_validator(mode="after")
    def _refusal_says_so(self) -> Self:
        if (self.refusal is not None) != (self.finish_reason == "refused"):
            raise ValueError('refusal is given exactly when finish_reason is "refused"')
        return self


class Missing(_Frozen):
    """An answer that could not be had, and why. It counts against coverage and enters no mean."""

    kind: MissingKind
    reason: str


def problems_of(error: ValidationError, limit: int = 5) -> str:
    """What pydantic found, in one line: where, what is wrong, and what was given."""
    found = error.errors(include_url=False)
    lines = [
        f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg']} (given {str(e['input'])[:60]!r})"
        for e in found[:limit]
    ]
    return "; ".join(lines) + (f"; and {len(found) - limit} more" if len(found) > limit else "")
