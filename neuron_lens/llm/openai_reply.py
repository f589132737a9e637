"""Reading what an OpenAI-compatible endpoint sends: answers, log-probabilities, and which errors mean what.

status                              means
429, 408, 409, 5xx                  may pass: try again (429 with code insufficient_quota: no credit, stop)
401, 402, 403, 404                  no request will succeed: stop (403 with a moderation report: a refusal)
400 with code content_filter        a refusal
400, 413, 422 and others            this request fails, others may succeed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import ValidationError

from neuron_lens.errors import BackendError
from neuron_lens.llm.request import (
    FinishReason,
    Request,
    Response,
    TokenLogprob,
    TokenLogprobs,
    Usage,
    problems_of,
)
from neuron_lens.llm.retry import CallFailed, TransientFailure, parse_retry_after

__all__ = ["read_chat", "read_completion", "read_error"]

_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "refused"}
_NO_CREDIT = {"insufficient_quota", "billing_hard_limit_reached", "insufficient_credits"}
_STOP = {
    401: "the key was not accepted",
    402: "there is no credit left",
    403: "access was denied",
    404: "there is no such model or address",
}


def read_error(status: int, body: object, headers: Mapping[str, str], model: str) -> Response:
    """The refusal an error status stands for; every other error is raised as what it means (see the module)."""
    detail = body.get("error", body) if isinstance(body, dict) else body
    fields: dict[str, Any] = detail if isinstance(detail, dict) else {}
    words = str(fields.get("message") or detail or "no words")[:300]
    code = str(fields.get("code") or fields.get("type") or "")
    metadata = fields.get("metadata")
    moderated = isinstance(metadata, dict) and "flagged_input" in metadata
    if (status == 400 and code == "content_filter") or (status == 403 and moderated):
        return Response(text="", finish_reason="refused", refusal=words, usage=Usage())
    if code in _NO_CREDIT:
        raise BackendError(f"{model}: there is no credit left ({words}); add credit and run again")
    if status in _STOP:
        raise BackendError(
            f"{model}: {_STOP[status]} (status {status}: {words}); check the key, base_url and model"
        )
    if status in (408, 409, 429) or status >= 500:
        raise TransientFailure(f"{model}: status {status}: {words}", retry_after=parse_retry_after(headers))
    raise CallFailed(f"{model}: status {status}: {words}")


def read_chat(reply: Any, request: Request) -> Response:
    """The response in the JSON of /chat/completions. Raises CallFailed when it is none."""
    try:
        choice = reply["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        finish, refusal = _finish(choice.get("finish_reason"), message.get("refusal"))
        listed = (choice.get("logprobs") or {}).get("content")
        tokens = None
        if request.top_logprobs is not None:
            if listed is None and finish != "refused" and text:
                _no_logprobs("logprobs")
            tokens = tuple(_chat_token(entry) for entry in listed or ())
        return Response(
            text=text,
            finish_reason=finish,
            refusal=refusal,
            tokens=tokens,
            usage=_usage(reply),
            model=str(reply.get("model") or ""),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CallFailed(
            f"the endpoint's answer is no chat completion ({error!r}): {str(reply)[:200]}"
        ) from error
    except ValidationError as error:
        raise CallFailed(f"the endpoint's answer cannot be read: {problems_of(error)}") from error


def read_completion(reply: Any, request: Request) -> Response:
    """The response in the JSON of /completions, the echoed prompt taken off. Raises CallFailed when it is none."""
    prompt = request.prompt or ""
    echoed = request.prompt_logprobs is not None
    try:
        choice = reply["choices"][0]
        text = choice.get("text") or ""
        finish, refusal = _finish(choice.get("finish_reason"), None)
        tokens = prompt_tokens = None
        if echoed or request.top_logprobs is not None:
            if not choice.get("logprobs"):
                _no_logprobs("prompt_logprobs" if echoed else "logprobs")
            entries = _completion_tokens(choice["logprobs"])
            # A token belongs to the prompt when it begins inside it.
            cut = sum(start < len(prompt) for start, _ in entries) if echoed else 0
            if echoed:
                if not text.startswith(prompt):
                    raise CallFailed(
                        "the endpoint did not echo the prompt it was given; its log-probabilities do not fit"
                    )
                text = text[len(prompt) :]
                prompt_tokens = tuple(_trimmed(entry, request.prompt_logprobs) for _, entry in entries[:cut])
            if request.top_logprobs is not None:
                tokens = tuple(_trimmed(entry, request.top_logprobs) for _, entry in entries[cut:])
        return Response(
            text=text,
            finish_reason=finish,
            refusal=refusal,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            usage=_usage(reply),
            model=str(reply.get("model") or ""),
        )
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise CallFailed(f"the endpoint's answer is no completion ({error!r}): {str(reply)[:200]}") from error
    except ValidationError as error:
        raise CallFailed(f"the endpoint's answer cannot be read: {problems_of(error)}") from error


def _no_logprobs(capability: str) -> NoReturn:
    raise BackendError(
        f"the endpoint sent no log-probabilities though the request asked for them; declare {capability}=False in the "
        "backend's capabilities, and choose a method that does not need them"
    )


def _finish(reason: Any, refusal: Any) -> tuple[FinishReason, str | None]:
    finish: FinishReason = "refused" if refusal else _FINISH_REASONS.get(str(reason), "other")
    if finish != "refused":
        return finish, None
    return finish, str(refusal or "stopped by the endpoint's content filter")


def _usage(reply: Any) -> Usage | None:
    usage = reply.get("usage")
    if not usage:
        return None
    return Usage(
        prompt_tokens=usage.get("prompt_tokens") or 0, completion_tokens=usage.get("completion_tokens") or 0
    )


def _chat_token(entry: Any) -> TokenLogprobs:
    top = tuple(
        TokenLogprob(token=one["token"], logprob=one["logprob"]) for one in entry.get("top_logprobs") or ()
    )
    return TokenLogprobs(token=entry["token"], logprob=entry["logprob"], top=top)


def _completion_tokens(logprobs: Any) -> list[tuple[int, TokenLogprobs]]:
    """The tokens of the older form, which lists each quantity apart, with the character each begins at."""
    tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
    columns = zip(logprobs["text_offset"], logprobs["tokens"], logprobs["token_logprobs"], tops, strict=False)
    return [
        (start, TokenLogprobs(token=token, logprob=logprob, top=_best_first(top)))
        for start, token, logprob, top in columns
    ]


def _best_first(top: dict[str, float] | None) -> tuple[TokenLogprob, ...]:
    found = [TokenLogprob(token=token, logprob=logprob) for token, logprob in (top or {}).items()]
    return tuple(sorted(found, key=lambda one: -one.logprob))


def _trimmed(entry: TokenLogprobs, count: int | None) -> TokenLogprobs:
    """Only as many alternatives as were asked for: one number rules prompt and answer in this protocol."""
    return entry.model_copy(update={"top": entry.top[: count or 0]})
