"""One of our own transformers as judge: no network, no key, exact log-probabilities of answers and prompts.

torch is imported when a model is asked, not when this module is. Log-probabilities are those of the model itself,
at temperature 1, whatever the temperature answers are drawn at.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
from collections import OrderedDict
from functools import cached_property
from typing import TYPE_CHECKING

from neuron_lens.errors import BackendError, NeuronLensError
from neuron_lens.llm.backend import AttemptingBackend, Capabilities
from neuron_lens.llm.budget import Budget
from neuron_lens.llm.chat_template import PLAIN, JinjaTemplate, Template
from neuron_lens.llm.json_grammar import JsonGrammar, can_hold_to_schemas
from neuron_lens.llm.request import Request, Response, TokenLogprob, TokenLogprobs, Usage
from neuron_lens.llm.retry import CallFailed

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.tokenizers import Tokenizer
    from neuron_lens.transformer import Transformer
    from neuron_lens.transformer.generation import GeneratedToken
    from neuron_lens.transformer.kv_cache import KVCache

__all__ = ["LocalBackend"]

_BEGINNINGS_KEPT = 4  # as many prompts as a run asks in turn


class LocalBackend(AttemptingBackend):
    """A `Transformer` of ours as judge. It answers one request at a time, the same way every time.

    With llguidance installed (extra `local`), answers are held to JSON schemas while they are written; without it, the
    schema is told in words. What chats begin with (instructions and examples) is read once for all that share it.

    Args:
        model: the model; with its tokenizer; it is not changed.
        template: how chats are written for it; None takes the checkpoint's own, and `PLAIN` where it has none.
        name: None takes the name in the model's configuration.
        budget: what may be spent, in calls or tokens.

    Raises BackendError without a tokenizer.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        template: Template | None = None,
        name: str | None = None,
        budget: Budget | None = None,
    ) -> None:
        capabilities = Capabilities(
            chat=True,
            completion=True,
            logprobs=True,
            prompt_logprobs=True,
            json_schema=can_hold_to_schemas(),
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
        self.template = template or _own_template(model.tokenizer)
        self._one_at_a_time = threading.Lock()
        self._beginnings: OrderedDict[tuple[int, ...], KVCache] = OrderedDict()

    @cached_property
    def _grammar(self) -> JsonGrammar:
        return JsonGrammar(self.tokenizer, self.transformer.config.d_vocab)

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
        beginning, rest = self._encoded(request)
        ids = beginning + rest
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
                made, finish = self._write(request, beginning, rest, min(request.max_tokens, room))
            except CallFailed:
                raise
            except NeuronLensError as error:
                raise CallFailed(f"{self.model} cannot answer this request: {error}") from error
        text = "".join(token.text for token in made)
        return Response(
            # the space behind the template's "Assistant:" is not the answer's
            text=text.lstrip() if request.messages else text,
            finish_reason="length" if finish == "length" else "stop",
            tokens=self._written(made, request.top_logprobs),
            prompt_tokens=prompt_tokens,
            usage=Usage(prompt_tokens=len(ids), completion_tokens=len(made)),
            model=self.model,
        )

    def _encoded(self, request: Request) -> tuple[list[int], list[int]]:
        """The ids the model reads: what other chats begin with, too, and the rest.

        A template without special tokens is encoded together with what it holds, which leaves nothing to share.
        """
        beginning: list[int] = []
        if request.prompt is not None:
            rest = self.tokenizer.encode(request.prompt)
        elif not self.template.special:
            pieces = [piece for part in self.template.pieces(request.messages) for piece in part]
            rest = self.tokenizer.encode("".join(text for text, _ in pieces))
        else:
            earlier, last = self.template.pieces(request.messages)
            beginning = [] if self.template.begins else self.tokenizer.encode("")
            beginning += self._pieces_encoded(earlier)
            rest = self._pieces_encoded(last)
        if not rest:
            raise CallFailed("the prompt is empty, and the tokenizer begins texts with no token of its own")
        return beginning, rest

    def _pieces_encoded(self, pieces: list[tuple[str, bool]]) -> list[int]:
        encode = self.tokenizer.encode
        return [
            token
            for text, of_template in pieces
            if text
            for token in encode(text, bos=False, allowed_special=of_template)
        ]

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
        self, request: Request, beginning: list[int], rest: list[int], room: int
    ) -> tuple[list[GeneratedToken], str]:
        """The model's continuation, `room` tokens at most, and why it ended."""
        from neuron_lens.hooks import TransformerHooks

        hooks, writer, stops = None, None, request.stop
        if request.json_schema is not None:
            writer = self._grammar.writer(request.json_schema.body)
            hooks = TransformerHooks()
            hooks.append_to_path("logits.fwd", writer.mask)
        elif request.messages:
            stops += self.template.stop
        made: list[GeneratedToken] = []
        for token in self.transformer.stream(
            [rest],
            max_new_tokens=room,
            temperature=request.temperature,
            stop_strings=stops,
            seed=request.seed or 0,
            prefix=self._read_beginning(beginning) if beginning else None,
            hooks=hooks,
            return_logits=request.top_logprobs is not None,
        ):
            made.append(token)
            if writer is not None and writer.accept(token.id):
                return made, "stop"
        return made, made[-1].finish or "length"

    def _read_beginning(self, ids: list[int]) -> KVCache:
        """Keys and values of what chats begin with, from before or read now; always by itself, so that an answer is
        the same whatever was asked before."""
        import torch

        from neuron_lens.transformer.kv_cache import KVCache

        key = tuple(ids)
        kept = self._beginnings.pop(key, None)
        if kept is None:
            weight = self.transformer.embed.weight
            kept = KVCache(self.transformer.config, 1, len(ids), dtype=weight.dtype, device=weight.device)
            with torch.no_grad():
                self.transformer(torch.tensor([ids], device=weight.device), kv_cache=kept, logits_at=-1)
            kept.freeze()
        self._beginnings[key] = kept
        if len(self._beginnings) > _BEGINNINGS_KEPT:
            self._beginnings.popitem(last=False)
        return kept

    def _written(self, made: list[GeneratedToken], top: int | None) -> tuple[TokenLogprobs, ...] | None:
        """The answer's tokens with their log-probabilities, or None when they were not asked for."""
        if top is None:
            return None
        import torch

        shown = made[:-1] if made[-1].finish == "eos" else made
        if not shown:
            return ()
        logits = torch.stack([token.logits for token in shown if token.logits is not None])
        return self._described(logits, [token.id for token in shown], top)

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
                    if value > -math.inf  # what a schema rules out is no alternative
                ),
            )
            for token, row, others, values in zip(ids, logprobs, best.indices, best.values, strict=True)
        )


def _own_template(tokenizer: Tokenizer) -> Template:
    """The template the tokenizer's checkpoint ships with, or PLAIN."""
    if tokenizer.chat_template is None:
        return PLAIN
    roles = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    named = {
        f"{role}_token": tokenizer.token_str(token) for role, token in roles.items() if token is not None
    }
    return JinjaTemplate(source=tokenizer.chat_template, special_tokens=named)
