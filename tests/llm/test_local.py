"""A transformer of ours as judge: its log-probabilities are those of its forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neuron_lens.errors import BackendError
from neuron_lens.llm import (
    CHATML,
    CachedBackend,
    ChatTemplate,
    LocalBackend,
    Message,
    Missing,
    Request,
    Response,
    run_all,
)
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def judge_model() -> Transformer:
    config = TransformerConfig(
        n_layers=2, d_model=16, n_heads=2, d_mlp=32, d_vocab=257, n_ctx=64, name="judge"
    )
    model = Transformer(config, seed=0, tokenizer=bytes_tokenizer()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


def only(backend: LocalBackend | CachedBackend, request: Request) -> Response:
    (result,) = run_all(backend, [request], progress=False)
    assert isinstance(result, Response), result
    return result


def expected_logprobs(model: Transformer, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0].log_softmax(-1)


def test_prompt_logprobs_are_exact(judge_model: Transformer) -> None:
    text = "the cat"
    ids = judge_model.tokenizer.encode(text)
    response = only(LocalBackend(judge_model), Request(prompt=text, max_tokens=0, prompt_logprobs=3))
    logprobs = expected_logprobs(judge_model, ids)
    assert response.text == "" and response.prompt_tokens is not None and response.tokens is None
    assert [t.token for t in response.prompt_tokens] == judge_model.tokenizer.token_strings(ids)
    assert response.prompt_tokens[0].logprob is None and response.prompt_tokens[0].top == ()
    for place, token in enumerate(response.prompt_tokens[1:]):
        assert token.logprob == pytest.approx(float(logprobs[place, ids[place + 1]]), abs=1e-6)
        best = logprobs[place].topk(3)
        assert [one.logprob for one in token.top] == pytest.approx(best.values.tolist(), abs=1e-6)
        assert [one.token for one in token.top] == judge_model.tokenizer.token_strings(best.indices.tolist())
    assert response.usage is not None and response.usage.total_tokens == len(ids)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answer_logprobs_are_those_of_the_model(judge_model: Transformer, temperature: float) -> None:
    request = Request(
        prompt="ab", max_tokens=6, temperature=temperature, top_logprobs=2, prompt_logprobs=0, seed=5
    )
    response = only(LocalBackend(judge_model), request)
    made = judge_model.sample([[97, 98]], max_new_tokens=6, temperature=temperature, seed=5)[0]
    written = made.ids[:-1] if made.finish == "eos" else made.ids
    assert response.tokens is not None and len(response.tokens) == len(written) > 0
    logprobs = expected_logprobs(judge_model, [97, 98, *written])
    for place, (token, chosen) in enumerate(zip(response.tokens, written, strict=True)):
        assert token.logprob == pytest.approx(float(logprobs[1 + place, chosen]), abs=1e-4)
        assert token.top[0].logprob == pytest.approx(float(logprobs[1 + place].max()), abs=1e-4)
    assert only(LocalBackend(judge_model), request) == response


def test_a_chat_is_its_template(judge_model: Transformer) -> None:
    messages = (Message(role="system", content="S"), Message(role="user", content="U"))
    response = only(LocalBackend(judge_model), Request(messages=messages, max_tokens=1, prompt_logprobs=0))
    assert response.prompt_tokens is not None
    assert "".join(token.token for token in response.prompt_tokens) == "S\n\nUser: U\n\nAssistant:"


def test_special_tokens_in_contents_stay_text(judge_model: Transformer) -> None:
    (special,) = judge_model.tokenizer.special_tokens
    marked = ChatTemplate(user=(special, ""), answer="A", stop=(), special=True)
    backend = LocalBackend(judge_model, template=marked)
    asked = Request(messages=(Message(role="user", content=special),), max_tokens=1)
    beginning, ids = backend._encoded(asked)
    assert beginning + ids == [judge_model.tokenizer.special_tokens[special], *special.encode(), ord("A")]
    assert CHATML.pieces(asked.messages)[-1][-1] == (CHATML.answer, True)


def test_stops_end_an_answer(judge_model: Transformer) -> None:
    whole = only(LocalBackend(judge_model), Request(prompt="ab", max_tokens=8, temperature=1.0, seed=1))
    assert whole.finish_reason == "length"
    piece = whole.text[2:3]
    cut = only(
        LocalBackend(judge_model), Request(prompt="ab", max_tokens=8, temperature=1.0, seed=1, stop=(piece,))
    )
    assert cut.finish_reason == "stop" and cut.text == whole.text[: whole.text.index(piece)]


def test_a_prompt_beyond_the_context_is_missing(judge_model: Transformer) -> None:
    backend = LocalBackend(judge_model)
    (long,) = run_all(backend, [Request(prompt="x" * 64, max_tokens=1)], progress=False)
    assert isinstance(long, Missing) and "context of 64" in long.reason
    full = only(backend, Request(prompt="x" * 60, max_tokens=50))
    assert full.usage is not None and full.usage.completion_tokens <= 4
    (empty,) = run_all(backend, [Request(prompt="", max_tokens=1)], progress=False)
    assert isinstance(empty, Missing) and "empty" in empty.reason


def test_answers_are_kept_by_the_weights(judge_model: Transformer, tmp_path: Path) -> None:
    other = Transformer(judge_model.config, seed=1, tokenizer=judge_model.tokenizer).eval()
    same = Transformer(judge_model.config, seed=None, tokenizer=judge_model.tokenizer).eval()
    same.load_state_dict(judge_model.state_dict())
    first, second, third = (LocalBackend(model) for model in (judge_model, same, other))
    assert first.identity == second.identity != third.identity
    assert first.identity != LocalBackend(judge_model, template=CHATML).identity
    request = Request(prompt="ab", max_tokens=3)
    answer = only(CachedBackend(first, tmp_path / "c"), request)
    again = CachedBackend(second, tmp_path / "c")
    assert only(again, request) == answer and again.hits == 1


def test_a_model_without_tokenizer_is_refused(judge_model: Transformer) -> None:
    with pytest.raises(BackendError, match=r"set model\.tokenizer"):
        LocalBackend(Transformer(judge_model.config))
