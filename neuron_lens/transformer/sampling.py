"""Generation: prompts in, tokens out, one at a time, with hooks running all the while.

`stream` is the loop, `sample` its collected results. A batch row gives what the row alone gives: prompts of
unequal length are padded on the left, and each row draws from a random stream of its own. Hooks mean the
same with and without a key-value cache: positions are absolute, negative ones count from the prompt's end,
and step k reads the k-th generated token. How a token is chosen from logits is `token_choice`.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import Run, TransformerHooks
from neuron_lens.transformer.generation import Finish, GeneratedToken, Generation
from neuron_lens.transformer.kv_cache import KVCache
from neuron_lens.transformer.prompts import Prompts, as_ids
from neuron_lens.transformer.token_choice import TokenChoice

if TYPE_CHECKING:
    from neuron_lens.transformer.model import Transformer

__all__ = ["GeneratedToken", "Generation", "sample", "stream"]


@overload
def sample(model: Transformer, prompts: str, **options: Any) -> Generation: ...


@overload
def sample(
    model: Transformer, prompts: Sequence[str] | Sequence[Sequence[int]], **options: Any
) -> list[Generation]: ...


@overload
def sample(model: Transformer, prompts: Prompts, **options: Any) -> Generation | list[Generation]: ...


def sample(model: Transformer, prompts: Prompts, **options: Any) -> Generation | list[Generation]:
    """Continue prompts.

    Args:
        prompts: a text or a list of texts; ids as one list or 1-D tensor, or as a list of these or a 2-D
            tensor.
        options: those of `stream`.

    Returns:
        A `Generation` for one prompt (a text, one list of ids, a 1-D tensor); else a list with one for each.
    """
    request = _Request(model, prompts, **options)
    logits: list[list[Tensor]] = [[] for _ in request.rows]
    for token in _generate(request):
        if token.logits is not None:
            logits[token.row].append(token.logits)
    results = [
        Generation(
            prompt_ids=row.prompt_ids,
            ids=row.ids,
            text=None if model.tokenizer is None else row.text,
            finish=row.finish or "length",
            seed=request.seed,
            logits=torch.stack(logits[row.index]) if request.return_logits else None,
        )
        for row in request.rows
    ]
    return results[0] if request.single else results


def stream(
    model: Transformer,
    prompts: Prompts,
    *,
    max_new_tokens: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    frequency_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: str | Sequence[str] = (),
    stop_at_eos: bool = True,
    eos_ids: Collection[int] | None = None,
    seed: int | None = None,
    hooks: TransformerHooks | None = None,
    use_kv_cache: bool = True,
    prefix: KVCache | None = None,
    return_logits: bool = False,
) -> Iterator[GeneratedToken]:
    """Continue prompts, yielding each new token as it comes: of a batch, row after row at each step.

    A row that finishes yields nothing more; in the passes of the others its columns are padding.

    Args:
        prompts: as `sample` takes them. Texts are encoded with the tokenizer's own BOS policy (without BOS
            behind a prefix).
        max_new_tokens: tokens to generate for each row, at most.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_k: draw among this many likeliest tokens; None for all.
        top_p: draw among the smallest set of likeliest tokens with this probability; None for all.
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        repetition_penalty: divides positive logits of tokens of the prompt or generated, multiplies negative
            ones.
        stop_strings: a row ends when its new text contains one of these.
        stop_at_eos: a row ends with an eos token. eos_ids: which those are; None means the tokenizer's.
        seed: makes the draws repeatable; None takes a new one. A row's draws depend on the seed, on its
            prompt and on how many equal prompts stand above it, and on no other row.
        hooks: run in every pass; they see `run.step`, `run.prompt_lengths` and absolute positions.
        use_kv_cache: False reads the whole sequence again at every step: slow, and the same result.
        prefix: a frozen cache that all prompts continue: of one row, or of as many as there are prompts. It
            is copied, not changed; its tokens count as part of the prompt's length.
        return_logits: give the model's logits for each token.

    Raises:
        RequestError: before anything runs, for an empty prompt, a prompt or a generation that does not fit
        the context,
            texts without a tokenizer, values out of range.
        HookError: `hooks` holds gradient hooks, which never run here.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "prompts")}
    return _generate(_Request(model, prompts, **options))


class _Request:
    """A checked request: rows, how tokens are chosen, when rows end."""

    def __init__(
        self,
        model: Transformer,
        prompts: Prompts,
        *,
        max_new_tokens: int = 32,
        stop_strings: str | Sequence[str] = (),
        stop_at_eos: bool = True,
        eos_ids: Collection[int] | None = None,
        seed: int | None = None,
        hooks: TransformerHooks | None = None,
        use_kv_cache: bool = True,
        prefix: KVCache | None = None,
        return_logits: bool = False,
        **choice: Any,
    ) -> None:
        self.model, self.hooks, self.return_logits = model, hooks, return_logits
        self.choice = TokenChoice(**choice)
        self.max_new_tokens = _checked_count(max_new_tokens)
        if hooks is not None and any(site.bwd for site in hooks.hooked_sites()):
            raise HookError(
                "gradient hooks (bwd) never run while generating, which computes no gradients; remove them"
            )
        ids, self.single = as_ids(prompts, model.tokenizer, bos=None if prefix is None else False)
        self.stops = _checked_stops(stop_strings, model.tokenizer)
        tokenizer_eos = getattr(model.tokenizer, "eos_id", None)
        known = ([] if tokenizer_eos is None else [tokenizer_eos]) if eos_ids is None else eos_ids
        self.eos_ids = frozenset(known if stop_at_eos else ())
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise RequestError(f"seed must be a whole number or None; got {seed!r}")
        self.seed = secrets.randbits(63) if seed is None else seed
        self.rows = [
            _Row(index, prompt, self, repeat=sum(prompt == earlier for earlier in ids[:index]))
            for index, prompt in enumerate(ids)
        ]
        self._check_context(prefix)
        self.use_kv_cache = use_kv_cache
        self.prefix = self._checked_prefix(prefix)

    def _check_context(self, prefix: KVCache | None) -> None:
        config = self.model.config
        if config.d_vocab_out != config.d_vocab:
            raise RequestError(
                f"the model reads {config.d_vocab} tokens and has {config.d_vocab_out} logits: what it gives cannot be read on"
            )
        longest = max(len(row.prompt_ids) for row in self.rows)
        before = 0 if prefix is None else int(torch.as_tensor(prefix.starts).max())
        behind = f" behind a prefix of {before}" if before else ""
        if before + longest > config.n_ctx:
            raise RequestError(
                f"a prompt of {longest} tokens{behind} exceeds the model's context of {config.n_ctx}; shorten it"
            )
        if before + longest + self.max_new_tokens > config.n_ctx:
            raise RequestError(
                f"a prompt of {longest} tokens{behind} leaves room for {config.n_ctx - before - longest} new ones in the model's "
                f"context of {config.n_ctx}, and max_new_tokens is {self.max_new_tokens}; lower it or shorten the prompt"
            )

    def _checked_prefix(self, prefix: KVCache | None) -> KVCache | None:
        if prefix is None:
            return None
        if not self.use_kv_cache:
            raise RequestError("a prefix is a key-value cache: it cannot be used with use_kv_cache=False")
        if not prefix.frozen:
            raise RequestError(
                "a prefix must be frozen, so that it is clear that it stays as it is: pass prefix.freeze()"
            )
        if prefix.batch not in (1, len(self.rows)):
            raise RequestError(
                f"the prefix has {prefix.batch} rows for {len(self.rows)} prompts; give it one, or as many"
            )
        return prefix


class _Row:
    """One prompt and what was generated for it so far."""

    def __init__(self, index: int, prompt_ids: list[int], request: _Request, repeat: int) -> None:
        self.index, self.prompt_ids, self.request = index, prompt_ids, request
        self.ids: list[int] = []
        self.finish: Finish | None = None
        self.text = ""
        self._emitted = 0
        # seeded by text, which python hashes alike everywhere: the stream depends on nothing but these three
        self.random = random.Random(f"{request.seed}/{repeat}/{prompt_ids}")
        # tokenizers that mark word starts drop the first space of what they decode: give them a token of
        # context
        self._context = prompt_ids[-1:]
        self._before = ""
        if request.model.tokenizer is not None:
            self._before = request.model.tokenizer.decode(self._context)
            if self._before.endswith("\ufffd"):  # half a character, which the next token may complete
                self._context, self._before = [], ""

    def accept(self, token: int, logits: Tensor | None) -> GeneratedToken:
        """Add a token, and see whether the row ends with it."""
        request = self.request
        self.ids.append(token)
        ended = token in request.eos_ids
        stopped = False
        if request.model.tokenizer is not None:
            shown = self.ids[:-1] if ended else self.ids
            self.text = request.model.tokenizer.decode(self._context + shown)[len(self._before) :]
            found = [at for at in map(self.text.find, request.stops) if at >= 0]
            stopped = bool(found)
            self.text = self.text[: min(found)] if found else self.text
        full = len(self.ids) == request.max_new_tokens
        self.finish = "eos" if ended else "stop" if stopped else "length" if full else None
        until = len(self.text) if self.finish else self._settled()
        piece, self._emitted = self.text[self._emitted : until], max(until, self._emitted)
        return GeneratedToken(self.index, len(self.ids) - 1, token, piece, self.finish, logits)

    def _settled(self) -> int:
        """How much of the text no later token can change: no half characters, no beginnings of stop strings."""
        settled = len(self.text.rstrip("\ufffd"))
        for stop in self.request.stops:
            lengths = range(min(len(stop) - 1, settled), 0, -1)
            begun = next((n for n in lengths if self.text[:settled].endswith(stop[:n])), 0)
            settled -= begun
        return settled


def _generate(request: _Request) -> Iterator[GeneratedToken]:
    passes = _Passes(request)
    for step in range(request.max_new_tokens):
        logits, chosen = passes.next_tokens(step)
        for row, token in zip(request.rows, chosen, strict=True):
            if row.finish is None:
                yield row.accept(token, logits[row.index] if request.return_logits else None)
        if all(row.finish for row in request.rows):
            return


class _Passes:
    """The forward passes of one generation: what is fed, what was seen."""

    def __init__(self, request: _Request) -> None:
        self.request = request
        prompts = [row.prompt_ids for row in request.rows]
        longest = max(map(len, prompts))
        device = request.model.embed.weight.device
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.tokens = torch.tensor(padded, device=device)
        self.pad: Tensor | None = None
        self.prompt_lengths: int | Tensor = longest
        if any(len(prompt) < longest for prompt in prompts):
            self.pad = torch.arange(longest, device=device) < longest - lengths[:, None]
            self.prompt_lengths = lengths
        self.cache = self._cache(longest)
        if request.prefix is not None:
            assert self.cache is not None, "a prefix was refused without a cache"
            self.prompt_lengths = self.prompt_lengths + self.cache.starts
        self.counts: Tensor | None = None
        self.seen: Tensor | None = None
        if request.choice.counts_tokens:
            self._count_prompts(prompts)

    def _cache(self, longest: int) -> KVCache | None:
        request, room = self.request, longest + self.request.max_new_tokens
        if not request.use_kv_cache:
            return None
        if request.prefix is not None:
            return request.prefix.repeat(len(request.rows) // request.prefix.batch, room=room)
        weight = request.model.embed.weight
        return KVCache(
            request.model.config, len(request.rows), room, dtype=weight.dtype, device=weight.device
        )

    def _count_prompts(self, prompts: list[list[int]]) -> None:
        shape = (len(prompts), self.request.model.config.d_vocab)
        self.counts = torch.zeros(shape, device=self.tokens.device)
        self.seen = torch.zeros(shape, dtype=torch.bool, device=self.tokens.device)
        for row, prompt in enumerate(prompts):
            known = [
                token for token in prompt if 0 <= token < shape[1]
            ]  # the model itself refuses the others
            self.seen[row, torch.tensor(known, dtype=torch.long, device=self.tokens.device)] = True

    # no_grad stands here and not around the loop: a generator would leave its caller without gradients
    # between tokens
    @torch.no_grad()
    def next_tokens(self, step: int) -> tuple[Tensor, list[int]]:
        """Logits of the next token [batch, d_vocab] and the token chosen for each row."""
        request = self.request
        if step > 0:
            self._feed_chosen()
        run = Run(
            batch=self.tokens.shape[0],
            length=self.tokens.shape[1],
            tokens=self.tokens,
            pad=self.pad,
            starts=0 if self.cache is None else self.cache.starts,
            prompt_lengths=self.prompt_lengths,
            step=step,
            config=request.model.config,
        )
        last = None if run.length == 1 else -1
        logits = request.model(
            self.tokens, hooks=request.hooks, pad=self.pad, kv_cache=self.cache, logits_at=last, run=run
        )[:, -1]
        uniform = torch.tensor([row.random.random() for row in request.rows], dtype=torch.float64)
        self.chosen = request.choice.choose(logits, uniform.to(logits.device), self.counts, self.seen)
        ids: list[int] = self.chosen.tolist()
        return logits, ids

    def _feed_chosen(self) -> None:
        """Make the chosen tokens what the next pass reads; those of finished rows as padding."""
        column = self.chosen[:, None]
        if self.counts is not None and self.seen is not None:
            self.counts.scatter_add_(1, column, torch.ones_like(column, dtype=self.counts.dtype))
            self.seen.scatter_(1, column, True)
        finished = [row.finish is not None for row in self.request.rows]
        pad = torch.tensor(finished, device=column.device)[:, None] if any(finished) else None
        if self.cache is not None:
            self.tokens, self.pad = column, pad
            return
        if pad is not None or self.pad is not None:
            before = torch.zeros_like(self.tokens, dtype=torch.bool) if self.pad is None else self.pad
            pad = torch.zeros_like(column, dtype=torch.bool) if pad is None else pad
            self.pad = torch.cat((before, pad), 1)
        self.tokens = torch.cat((self.tokens, column), 1)


def _checked_count(max_new_tokens: int) -> int:
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 1:
        raise RequestError(f"max_new_tokens must be a whole number from 1 upwards; got {max_new_tokens!r}")
    return max_new_tokens


def _checked_stops(stops: str | Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    listed = (stops,) if isinstance(stops, str) else tuple(stops)
    if any(not isinstance(stop, str) or not stop for stop in listed):
        raise RequestError(f"stop_strings must be texts of at least one character; got {listed!r}")
    if listed and tokenizer is None:
        raise RequestError(
            "stop_strings need a tokenizer, and the model has none; set model.tokenizer, or use eos_ids"
        )
    return listed
