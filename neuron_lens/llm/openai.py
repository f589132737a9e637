"""Any endpoint that speaks OpenAI's protocol, through the official client (extra `explain`).

    chat        POST /chat/completions   messages, response_format, logprobs, top_logprobs
    completion  POST /completions        prompt, logprobs; echo gives the prompt's log-probabilities

One attempt here is one HTTP request: the client's own retries are off, since ours know the budget. What comes
back is read field by field and nothing is assumed to be there: many servers speak the protocol nearly.
https://platform.openai.com/docs/api-reference
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import BackendError, MissingExtraError
from neuron_lens.llm.backend import AttemptingBackend, Capabilities
from neuron_lens.llm.budget import Budget
from neuron_lens.llm.openai_reply import read_chat, read_completion, read_error
from neuron_lens.llm.request import Request, Response
from neuron_lens.llm.retry import CallFailed, Retry, TransientFailure

if TYPE_CHECKING:
    import openai

__all__ = ["OpenAIBackend"]

# What most chat endpoints do. vLLM's also does completion and prompt_logprobs.
_CHAT = Capabilities(chat=True, logprobs=True, json_schema=True, max_top_logprobs=20)
_OFFICIAL = "https://api.openai.com/v1"


class OpenAIBackend(AttemptingBackend):
    """A model behind an OpenAI-compatible endpoint.

    Args:
        model: the model's name at the endpoint.
        base_url: "http://localhost:8000/v1", for example; None for `OPENAI_BASE_URL`, else OpenAI itself.
        api_key: None for `OPENAI_API_KEY`; endpoints other than OpenAI's need none. Never stored or shown.
        capabilities: what this endpoint and model can do; None is a chat with log-probabilities and JSON
            schemas. Take care to declare no more than is true.
        concurrency, retry, budget: see `AttemptingBackend`.
        timeout: seconds one attempt may take.
        token_limit_field: what the endpoint calls the limit of a chat's answer; OpenAI's reasoning models want
            "max_completion_tokens".
        omit: fields never sent, for models that refuse them ("temperature", "seed").
        extra_body: further fields, sent with every request as they are.

    Raises MissingExtraError without the `openai` package and BackendError without a key that OpenAI needs.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        capabilities: Capabilities | None = None,
        concurrency: int = 8,
        retry: Retry | None = None,
        budget: Budget | None = None,
        timeout: float = 120.0,
        token_limit_field: str = "max_tokens",
        omit: Iterable[str] = (),
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            kind="openai",
            model=model,
            capabilities=capabilities or _CHAT,
            concurrency=concurrency,
            retry=retry,
            budget=budget,
        )
        try:
            import openai  # noqa: F401
        except ImportError:
            raise MissingExtraError("openai", "explain", "an OpenAI-compatible endpoint") from None
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or _OFFICIAL).rstrip("/")
        if urllib.parse.urlsplit(self.base_url).scheme not in ("http", "https"):
            raise BackendError(
                f"base_url is {self.base_url!r}; expected an address such as http://localhost:8000/v1"
            )
        self._api_key = api_key or os.environ.get("OPENAI_API_KEY") or ""
        if not self._api_key and self.base_url == _OFFICIAL:
            raise BackendError(
                "OpenAI's endpoint needs a key: set OPENAI_API_KEY, or give api_key, or give the base_url of another "
                "endpoint"
            )
        self.timeout = timeout
        self.token_limit_field = token_limit_field
        self.omit = frozenset(omit)
        self.extra_body = dict(extra_body or {})
        # The client's connections belong to the event loop they were opened in.
        self._client: openai.AsyncOpenAI | None = None
        self._slots = asyncio.Semaphore(concurrency)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def identity(self) -> str:
        """The model, the endpoint's address (without credentials) and what changes every request."""
        url = urllib.parse.urlsplit(self.base_url)
        address = f"{url.scheme}://{url.hostname}:{url.port}{url.path}"
        return json.dumps([self.model, address, sorted(self.omit), self.extra_body], sort_keys=True)

    async def aclose(self) -> None:
        """Close the connections; new ones are opened when needed."""
        client, self._client = self._client, None
        if client is not None and self._loop is asyncio.get_running_loop():
            await client.close()

    async def _attempt(self, request: Request) -> Response:
        import openai

        client = self._connected()
        chat = bool(request.messages)
        try:
            async with self._slots:
                if chat:
                    raw = await client.chat.completions.with_raw_response.create(**self._chat_body(request))
                else:
                    raw = await client.completions.with_raw_response.create(**self._completion_body(request))
        except openai.APITimeoutError as error:
            raise TransientFailure(
                f"{self.model} did not answer within {self.timeout:g} s", answered=False
            ) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise TransientFailure(
                f"the connection to {self.base_url} failed ({type(cause).__name__}: {cause})", answered=False
            ) from error
        except openai.APIStatusError as error:
            return read_error(error.status_code, error.body, error.response.headers, self.model)
        except openai.OpenAIError as error:
            raise CallFailed(f"the client could not make this call: {error}") from error
        return self._read(request, raw.http_response.content, raw.http_response.headers)

    def _read(self, request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
        try:
            reply = json.loads(content)
        except ValueError as error:
            raise TransientFailure(
                f"{self.model} answered with something that is no JSON ({error}): {content[:80]!r}",
                answered=False,
            ) from error
        if isinstance(reply, dict) and reply.get("error") and not reply.get("choices"):
            # Routers in front of several providers report a provider's error inside an answer with status 200.
            code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
            return read_error(code if isinstance(code, int) else 502, reply, headers, self.model)
        return read_chat(reply, request) if request.messages else read_completion(reply, request)

    def _connected(self) -> openai.AsyncOpenAI:
        import openai

        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._loop = loop
            self._slots = asyncio.Semaphore(self.concurrency)
            self._client = openai.AsyncOpenAI(
                api_key=self._api_key or "none",
                base_url=self.base_url,
                max_retries=0,
                http_client=openai.DefaultAsyncHttpxClient(timeout=self.timeout, verify=self._certificates()),
            )
        return self._client

    def _certificates(self) -> ssl.SSLContext | bool:
        """How servers are verified: as the client does by itself, and not at all where there is no TLS.

        Reading the system's certificates takes a good part of a second, in each run. A plain address redirected to
        one with TLS is refused, not trusted: this context knows no authority.
        """
        plain = self.base_url.startswith("http://")
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if plain else True

    def _chat_body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "messages": [message.model_dump() for message in request.messages],
            self.token_limit_field: request.max_tokens,
        }
        if request.top_logprobs is not None:
            body["logprobs"] = True
            body["top_logprobs"] = request.top_logprobs
        if request.prompt_logprobs is not None:
            raise BackendError(
                "this protocol gives a prompt's log-probabilities for a text to continue (prompt), not for a chat (messages)"
            )
        if request.json_schema is not None:
            schema = request.json_schema.body
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": request.json_schema.name,
                    "schema": schema,
                    "strict": _is_closed(schema),
                },
            }
        return self._with_common(body, request)

    def _completion_body(self, request: Request) -> dict[str, Any]:
        if request.json_schema is not None:
            raise BackendError(
                "a JSON schema needs a chat (messages); this request is a text to continue (prompt)"
            )
        body: dict[str, Any] = {"prompt": request.prompt, "max_tokens": request.max_tokens}
        wanted = [n for n in (request.top_logprobs, request.prompt_logprobs) if n is not None]
        if wanted:
            body["logprobs"] = max(wanted)
        if request.prompt_logprobs is not None:
            body["echo"] = True
        return self._with_common(body, request)

    def _with_common(self, body: dict[str, Any], request: Request) -> dict[str, Any]:
        body |= {"model": self.model, "temperature": request.temperature}
        if request.seed is not None:
            body["seed"] = request.seed
        if request.stop:
            body["stop"] = list(request.stop)
        sent = {name: value for name, value in body.items() if name not in self.omit}
        return sent | ({"extra_body": self.extra_body} if self.extra_body else {})


def _is_closed(schema: Any) -> bool:
    """Whether a schema has the form OpenAI enforces strictly: every object names, and requires, all its fields."""
    if isinstance(schema, list):
        return all(_is_closed(part) for part in schema)
    if not isinstance(schema, dict):
        return True
    if schema.get("type") == "object" and (
        schema.get("additionalProperties") is not False
        or set(schema.get("required", ())) != set(schema.get("properties", {}))
    ):
        return False
    return all(_is_closed(part) for part in schema.values())
