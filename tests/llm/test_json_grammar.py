"""A local judge's answers fit their schema, whatever its weights are."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    CHATML,
    LocalBackend,
    Message,
    Missing,
    Request,
    Response,
    StructuredRequest,
    run_all,
    run_all_structured,
)
from neuron_lens.llm.json_grammar import JsonGrammar
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig


class Marks(BaseModel):
    model_config = ConfigDict(extra="forbid")
    marks: list[int]
    sure: bool


def judge(seed: int) -> LocalBackend:
    config = TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_mlp=32, d_vocab=300, n_ctx=512)
    model = Transformer(config, seed=0, tokenizer=bytes_tokenizer()).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return LocalBackend(model, template=CHATML)


def asked(count: int, text: str = "rate them", **options: object) -> StructuredRequest[Marks]:
    messages = (Message(role="system", content="You rate texts."), Message(role="user", content=text))
    request = Request(messages=messages, max_tokens=300, **options)
    return StructuredRequest(request=request, shape=Marks, lengths={"marks": count}, repairs=0)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 99), count=st.integers(0, 4), temperature=st.sampled_from([0.0, 1.0]))
def test_every_answer_fits_or_is_cut_off(seed: int, count: int, temperature: float) -> None:
    backend = judge(seed)
    (answer,) = run_all_structured(
        backend, [asked(count, temperature=temperature, seed=seed)], progress=False
    )
    if isinstance(answer, Missing):  # a number of a random judge may go on until there is no room
        assert "cut off" in answer.reason
    else:
        assert len(answer.marks) == count


def test_log_probabilities_are_those_among_what_may_come() -> None:
    backend = judge(3)
    request = asked(0, top_logprobs=2).sent_to(backend)
    (response,) = run_all(backend, [request], progress=False)
    assert isinstance(response, Response) and response.tokens is not None
    written = json.loads(response.text)
    assert written in ({"marks": [], "sure": True}, {"marks": [], "sure": False})
    choices = [token for token in response.tokens if len(token.top) > 1]
    assert [one.token for one in choices[0].top] in (["t", "f"], ["f", "t"]) and len(choices) == 1
    for token in response.tokens:
        assert sum(math.exp(one.logprob) for one in token.top) == pytest.approx(1.0, abs=1e-5)


def test_what_was_asked_before_changes_nothing() -> None:
    """The beginning that chats share is read by itself, kept or not."""
    requests = [asked(2, text, top_logprobs=1).request for text in ("one", "two", "three", "one")]
    together = run_all(judge(5), requests, progress=False)
    alone = [run_all(judge(5), [request], progress=False)[0] for request in reversed(requests)]
    assert together == list(reversed(alone))


def test_a_kept_beginning_is_that_of_the_whole_text() -> None:
    backend = judge(5)
    request = asked(2, top_logprobs=3).request.model_copy(update={"max_tokens": 4})
    (response,) = run_all(backend, [request], progress=False)
    assert isinstance(response, Response) and response.tokens is not None
    beginning, rest = backend._encoded(request)
    assert beginning and rest
    made = backend.transformer.sample(
        [beginning + rest], max_new_tokens=4, temperature=0, return_logits=True
    )[0]
    logprobs = made.logits.log_softmax(-1)
    for place, (token, chosen) in enumerate(zip(response.tokens, made.ids, strict=True)):
        assert token.logprob == pytest.approx(float(logprobs[place, chosen]), abs=1e-4)


def test_a_schema_that_cannot_be_held_to_is_refused() -> None:
    with pytest.raises(BackendError, match="cannot be held to the JSON schema"):
        JsonGrammar(bytes_tokenizer(), 257).writer({"type": "string", "pattern": "("})
