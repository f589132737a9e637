"""What every judge is: something that turns a request into a response, and says what it can do.

`Backend` is the interface callers see. `AttemptingBackend` is the base of those that really call a model: it
refuses what the model cannot do before anything is sent, tries again after failures that may pass, and keeps
to a budget, counting every attempt. A cache goes around the outside (`CachedBackend`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from neuron_lens.errors import BackendError, did_you_mean
from neuron_lens.llm.answer_file import key_of
from neuron_lens.llm.budget import Budget
from neuron_lens.llm.request import Request, Response
from neuron_lens.llm.retry import Retry, TransientFailure, retrying

__all__ = ["AttemptingBackend", "Backend", "Capabilities", "request_key", "require"]

# Raise it when the same request would be sent or read differently, so that older cached answers do not count.
_KEY_VERSION = 1


class Capabilities(BaseModel):
    """What a backend can do.

    Attributes:
        chat: takes `messages`.
        completion: takes a `prompt` to continue.
        logprobs: reports log-probabilities of generated tokens.
        prompt_logprobs: reports log-probabilities of the tokens of a `prompt`.
        json_schema: holds an answer to a JSON schema while it is written.
        max_top_logprobs: how many alternatives a token it reports at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chat: bool = True
    completion: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    json_schema: bool = False
    max_top_logprobs: int = Field(default=20, ge=0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The capabilities that are there or not."""
        return tuple(name for name, field in cls.model_fields.items() if field.annotation is bool)

    @classmethod
    def of(cls, names: Iterable[str]) -> Capabilities:
        """Exactly those named. Raises BackendError for a name that is no capability."""
        none = cls(chat=False)
        return none.model_copy(update=dict.fromkeys(none.lacking(names), True))

    def needed_by(self, request: Request) -> tuple[str, ...]:
        """What `request` needs, by name."""
        needs = {
            "chat": bool(request.messages),
            "completion": request.prompt is not None,
            "logprobs": request.top_logprobs is not None,
            "prompt_logprobs": request.prompt_logprobs is not None,
            "json_schema": request.json_schema is not None,
        }
        return tuple(name for name, needed in needs.items() if needed)

    def lacking(self, names: Iterable[str]) -> tuple[str, ...]:
        """Those of `names` that are not there. Raises BackendError for a name that is no capability."""
        wanted = tuple(names)
        for name in wanted:
            if name not in self.names():
                raise BackendError(f"there is no capability {name!r}; {did_you_mean(name, self.names())}")
        return tuple(name for name in wanted if not getattr(self, name))


@runtime_checkable
class Backend(Protocol):
    """A judge.

    `kind` is the sort of backend ("openai", "local", "scripted"), `model` the model's name, and `identity` a text
    that differs whenever the same request might be answered by something else. `concurrency` is how many
    requests it takes at once.
    """

    @property
    def kind(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def identity(self) -> str: ...
    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def concurrency(self) -> int: ...

    async def complete(self, request: Request) -> Response:
        """The answer to one request.

        Raises CallFailed when this request cannot be answered, and BackendError when no request will be (no
        access, no credit, budget used up, a capability that is not there).
        """
        ...

    async def aclose(self) -> None:
        """Let go of connections; the backend can be used again afterwards."""
        ...


class AttemptingBackend(ABC):
    """Base of backends that call a model: checks, retries and budget around one `_attempt`.

    Args:
        kind, model: see `Backend`.
        capabilities: what the model can do.
        concurrency: requests in flight at once, at most.
        retry: how to try again after failures that may pass.
        budget: what may be spent; None for no limit.
    """

    def __init__(
        self,
        *,
        kind: str,
        model: str,
        capabilities: Capabilities,
        concurrency: int = 1,
        retry: Retry | None = None,
        budget: Budget | None = None,
    ) -> None:
        if concurrency < 1:
            raise BackendError(
                f"concurrency is {concurrency}; at least one request must be in flight at a time"
            )
        self.kind = kind
        self.model = model
        self.capabilities = capabilities
        self.concurrency = concurrency
        self.retry = retry or Retry()
        self.budget = budget

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"

    @property
    def identity(self) -> str:
        """See `Backend`; the model's name here, and more where more decides the answer."""
        return self.model

    async def complete(self, request: Request) -> Response:
        """See `Backend.complete`."""
        require(self, self.capabilities.needed_by(request), "this request")
        most = max(request.top_logprobs or 0, request.prompt_logprobs or 0)
        if most > self.capabilities.max_top_logprobs:
            raise BackendError(
                f"{self.model} reports at most {self.capabilities.max_top_logprobs} alternatives a token; "
                f"the request asks for {most}"
            )
        return await retrying(lambda: self._charged(request), self.retry)

    async def aclose(self) -> None:  # noqa: B027 - most backends hold nothing open
        """See `Backend.aclose`."""

    async def _charged(self, request: Request) -> Response:
        """One attempt, on the budget."""
        if self.budget is None:
            return await self._attempt(request)
        charge = await self.budget.reserve(request)
        try:
            response = await self._attempt(request)
        except TransientFailure as error:
            # What was cut off before an answer came may have been paid for: it stays charged in full.
            charge.settle_in_full() if not error.answered else charge.release()
            raise
        except BaseException as error:
            # A cancelled call may have been paid for as well.
            charge.release() if isinstance(error, Exception) else charge.settle_in_full()
            raise
        charge.settle(response.usage)
        return response

    @abstractmethod
    async def _attempt(self, request: Request) -> Response:
        """Call the model once. Raises TransientFailure, CallFailed or BackendError."""


def require(backend: Backend, capabilities: Iterable[str], what_for: str) -> None:
    """Refuse by name: raise BackendError unless the backend has all of `capabilities`.

    `what_for` begins the message: "all-at-once simulation needs prompt_logprobs, ...".
    """
    lacking = backend.capabilities.lacking(capabilities)
    if lacking:
        has = [name for name in Capabilities.names() if getattr(backend.capabilities, name)]
        raise BackendError(
            f"{what_for} needs {', '.join(lacking)}, which the {backend.kind} backend {backend.model!r} does not declare "
            f"(it declares {', '.join(has) or 'nothing'}); choose another method or another backend, or, if the model "
            f"can do it, say so in the backend's capabilities (by command: --capabilities)"
        )


def request_key(backend: Backend, request: Request) -> str:
    """What an answer is stored under: over the whole request, its prompt's version, and who answers. See `key_of`."""
    return key_of(_KEY_VERSION, backend.kind, backend.identity, request.canonical)
