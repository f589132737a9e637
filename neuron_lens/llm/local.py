"""One of our own transformers as judge: no network, no key, exact log-probabilities of answers and prompts.

torch is imported when a model is asked, not when this module is. Log-probabilities are those of the model itself,
at temperature 1, whatever the temperature answers are drawn at.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from neuron_lens.errors import BackendError, NeuronLensError
from neuron_lens.llm.backend import AttemptingBackend, Capabilities
from neuron_lens.llm.budget import Budget
from neuron_lens.llm.request import Message, Request, Response, TokenLogprob, TokenLogprobs, Usage
from neuron_lens.llm.retry import CallFailed

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.tokenizers import Tokenizer
    from neuron_lens.transformer import Transformer

__all__ = ["CHATML", "PLAIN", "ChatTemplate", "LocalBackend"]


class ChatTemplate(BaseModel):
    """How a chat becomes a text: each turn is its role's opening, the content and its role's closing.

    `answer` opens the model's turn, and `stop` are texts that end it. With `special`, special tokens in the openings
    and closings become their ids; in contents they are always text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: tuple[str, str] = ("", "\n\n")
    user: tuple[str, str] = ("User: ", "\n\n")
    assistant: tuple[str, str] = ("Assistant: ", "\n\n")
    answer: str = "Assistant:"
    stop: tuple[str, ...] = ("\n\nUser:",)
    special: bool = False

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool]]:
        """The text in pieces, each with whether it is part of the template."""
        found: list[tuple[str, bool]] = []
        for message in messages:
            opening, closing = getattr(self, message.role)
            found += [(opening, True), (message.content, False), (closing, True)]
        return [*found, (self.answer, True)]


PLAIN = ChatTemplate()
CHATML = ChatTemplate(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    stop=("<|im_end|>",),
    special=True,
)


class LocalBackend(AttemptingBackend):
    """A `Transformer` of ours as judge. It answers one request at a time, the same way every time.

    Args:
        model: the model; with its tokenizer; it is not changed.
        template: how chats are written for it; `PLAIN` suits models trained on plain text, `CHATML` many others.
        name: None takes the name in the model's configuration.
        budget: what may be spent, in calls or tokens.

    Raises BackendError without a tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        template: ChatTemplate = PLAIN,
        name: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        capabilities = Capabilities(
            chat=True,
            completion=True,
            logprobs=True,
            prompt_logprobs=True,
            max_top_logprobs=model.config.d_vocab,
        )
        super().__init__(
            kind="local",
            model=name or model.config.name or "transformer",
            capabilities=capabilities,
            budget=budget,
        )
        if model.tokenizer is None:
            raise BackendError(
                f"the model {self.model!r} has no tokenizer to read requests with: set model.tokenizer"
            )
        self.transformer = model
        self.tokenizer: Tokenizer = model.tokenizer
        self.template = template
        self._one_at_a_time = threading.Lock()

    @cached_property
    def identity(self) -> str:
        """The model's name, and the hash of its configuration, weights, tokenizer and template.

        Read once: a model whose weights are changed afterwards needs a backend of its own.
        """
        import torch

        digest = hashlib.sha256(self.transformer.config.model_dump_json().encode())
        digest.update(f"{self.tokenizer!r}{self.template.model_dump_json()}".encode())
        for name, tensor in sorted(self.transformer.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(raw.numpy()))
        return json.dumps([self.model, digest.hexdigest()])

    async def _attempt(self, request: Request) -> Response:
        return await asyncio.to_thread(self._answer, request)

    def _answer(self, request: Request) -> Response:
        ids = self._encoded(request)
        n_ctx = self.transformer.config.n_ctx
        room = n_ctx - len(ids)
        if room < (request.max_tokens > 0):
            raise CallFailed(
                f"the prompt has {len(ids)} tokens and leaves no room in {self.model}'s context of {n_ctx}"
            )
        with self._one_at_a_time:
            try:
                prompt_tokens = self._read(ids, request.prompt_logprobs)
                if request.max_tokens == 0:
                    return Response(
                        text="",
                        prompt_tokens=prompt_tokens,
                        usage=Usage(prompt_tokens=len(ids)),
                        model=self.model,
                    )
                return self._write(request, ids, prompt_tokens, min(request.max_tokens, room))
            except CallFailed:
                raise
            except NeuronLensError as error:
                raise CallFailed(f"{self.model} cannot answer this request: {error}") from error

    def _encoded(self, request: Request) -> list[int]:
        """The ids the model reads. A template without special tokens is encoded together with what it holds."""
        if request.prompt is not None:
            ids = self.tokenizer.encode(request.prompt)
        elif not self.template.special:
            ids = self.tokenizer.encode("".join(text for text, _ in self.template.pieces(request.messages)))
        else:
            ids = self.tokenizer.encode("")
            for text, of_template in self.template.pieces(request.messages):
                ids += self.tokenizer.encode(text, bos=False, allowed_special=of_template) if text else []
        if not ids:
            raise CallFailed("the prompt is empty, and the tokenizer begins texts with no token of its own")
        return ids

    def _read(self, ids: list[int], top: int | None) -> tuple[TokenLogprobs, ...] | None:
        """The prompt's tokens with their log-probabilities, or None when they were not asked for."""
        if top is None:
            return None
        import torch

        with torch.no_grad():
            device = self.transformer.embed.weight.device
            logits = self.transformer(torch.tensor([ids], device=device))[0, :-1]
        first = TokenLogprobs(token=self.tokenizer.token_str(ids[0]), logprob=None)
        return (first, *self._described(logits, ids[1:], top))

    def _write(
        self, request: Request, ids: list[int], prompt_tokens: tuple[TokenLogprobs, ...] | None, room: int
    ) -> Response:
        """The model's continuation of `ids`, `room` tokens at most."""
        chat = bool(request.messages)
        made = self.transformer.sample(
            [ids],
            max_new_tokens=room,
            temperature=request.temperature,
            stop_strings=request.stop + (self.template.stop if chat else ()),
            seed=request.seed or 0,
            return_logits=request.top_logprobs is not None,
        )
        assert isinstance(made, list), "a list of prompts gives a list of generations"
        (one,) = made
        tokens = None
        if request.top_logprobs is not None:
            assert one.logits is not None, "logits were asked for"
            written = one.ids[:-1] if one.finish == "eos" else one.ids
            tokens = self._described(one.logits[: len(written)], written, request.top_logprobs)
        text = one.text or ""
        return Response(
            text=text.lstrip()
            if chat
            else text,  # the space behind the template's "Assistant:" is not the answer's
            finish_reason="length" if one.finish == "length" else "stop",
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            usage=Usage(prompt_tokens=len(ids), completion_tokens=len(one.ids)),
            model=self.model,
        )

    def _described(self, logits: Tensor, ids: list[int], top: int) -> tuple[TokenLogprobs, ...]:
        """Each of `ids` with its log-probability in its row of `logits` [pos, d_vocab] and the `top` likeliest."""
        text_of = self.tokenizer.token_str
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.topk(top, -1)
        return tuple(
            TokenLogprobs(
                token=text_of(token),
                logprob=float(row[token]),
                top=tuple(
                    TokenLogprob(token=text_of(other), logprob=value)
                    for other, value in zip(others.tolist(), values.tolist(), strict=True)
                ),
            )
            for token, row, others, values in zip(ids, logprobs, best.indices, best.values, strict=True)
        )
