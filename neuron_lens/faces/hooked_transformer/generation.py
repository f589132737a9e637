"""Generation in the classic form, over the engine's sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.forward import ForwardPass
from neuron_lens.faces.hooked_transformer.tokenisation import PaddingSide
from neuron_lens.hooks import TransformerHooks
from neuron_lens.transformer import Transformer
from neuron_lens.transformer.sampling import Generation, sample, stream

__all__ = ["GenerateOutput", "Generating"]

ReturnType = Literal["input", "str", "tokens"]


class GenerateOutput(NamedTuple):
    """What `generate` gives with `output_logits` or `return_cache`.

    sequences: ids [batch, pos], or text. logits: for each step [batch, d_vocab]; None when not asked for.
    cache: of one forward over prompt and output; None when not asked for.
    """

    sequences: Any
    logits: tuple[Tensor, ...] | None = None
    cache: Any = None


class Generating(ForwardPass):
    """`generate` and `generate_stream`.

    Hooks act in every pass: with the key-value cache the first sees the whole prompt and each later one a single
    position; `hook.run.step` and `hook.run.positions()` tell which.
    """

    def generate(
        self,
        input: str | Sequence[str] | Tensor = "",
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        return_type: ReturnType = "input",
        verbose: bool = True,
        output_logits: bool = False,
        return_cache: bool = False,
        names_filter: Any = None,
        stop_strings: str | Sequence[str] = (),
        attention_mask: Tensor | None = None,
        seed: int | None = None,
    ) -> Any:
        """Continue prompts.

        Args:
            input: a text, texts, or ids [batch, pos].
            stop_at_eos: a row ends with an eos token: `eos_token_id`, or the tokenizer's.
            do_sample: False takes the likeliest token each time.
            return_type: "input" gives what was given; "str" text (prompt and continuation, without BOS); "tokens" ids
                [batch, prompt + new]: rows that end early are filled up with their eos (or the pad) token.
            verbose: accepted; nothing is printed.
            output_logits, return_cache: return a `GenerateOutput`; `names_filter` is for the cache.
            seed: makes draws repeatable; None draws one from torch's generator, so that torch.manual_seed does.
        """
        prompts, ids = self._prompts(input, prepend_bos, padding_side, attention_mask)
        options = self._sampling_options(
            do_sample,
            temperature,
            top_k,
            top_p,
            freq_penalty,
            repetition_penalty,
            stop_at_eos,
            eos_token_id,
            seed,
        )
        results = sample(
            _StepByStep.of(self),
            prompts,
            max_new_tokens=max_new_tokens,
            use_kv_cache=use_past_kv_cache,
            stop_strings=stop_strings,
            return_logits=output_logits,
            **options,
        )
        assert isinstance(results, list), "prompts were given as a list"
        tokens = self._joined(ids, results, options["eos_ids"])
        sequences = self._returned(input, tokens, results, prompts, return_type)
        if not output_logits and not return_cache:
            return sequences
        logits = _by_step(results) if output_logits else None
        cache = self.run_with_cache(tokens, names_filter=names_filter)[1] if return_cache else None
        return GenerateOutput(sequences, logits, cache)

    def generate_stream(
        self,
        input: str | Sequence[str] | Tensor = "",
        max_new_tokens: int = 10,
        max_tokens_per_yield: int = 25,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        return_type: ReturnType = "input",
        verbose: bool = True,
        seed: int | None = None,
    ) -> Iterator[Any]:
        """Continue one prompt, yielding pieces: the prompt with the first tokens, then at most this many each.

        Pieces are ids [1, pos], or text for text (`return_type` as in `generate`).
        """
        prompts, _ = self._prompts(input, prepend_bos, padding_side, None)
        if len(prompts) != 1:
            raise RequestError(
                f"generate_stream continues one prompt; got {len(prompts)}; use generate for a batch"
            )
        options = self._sampling_options(
            do_sample,
            temperature,
            top_k,
            top_p,
            freq_penalty,
            repetition_penalty,
            stop_at_eos,
            eos_token_id,
            seed,
        )
        as_text = return_type == "str" or (return_type == "input" and not isinstance(input, Tensor))
        waiting = list(prompts[0])
        bos = None if self._tokenizer is None else self._tokenizer.bos_id
        if as_text and waiting[0] == bos:
            waiting = waiting[1:]
        fresh = 0
        for token in stream(
            _StepByStep.of(self),
            prompts,
            max_new_tokens=max_new_tokens,
            use_kv_cache=use_past_kv_cache,
            **options,
        ):
            waiting.append(token.id)
            fresh += 1
            if fresh == max_tokens_per_yield or token.finish is not None:
                piece = torch.tensor([waiting], device=self.device)
                yield self._need_tokenizer().decode(waiting) if as_text else piece
                waiting, fresh = [], 0

    def _prompts(
        self, input: Any, prepend_bos: bool | None, padding_side: PaddingSide, mask: Tensor | None
    ) -> tuple[list[list[int]], Tensor]:
        """Prompts without padding, and the ids as given."""
        if isinstance(input, Tensor) and input.is_floating_point():
            raise RequestError(
                "generate takes texts or ids; to start from embeddings, hook hook_embed and give ids"
            )
        ids, pad = self._ids_and_padding(input, prepend_bos, padding_side, mask, None)
        rows = ids.tolist()
        if pad is None:
            return rows, ids
        real = (~pad).tolist()
        return [
            [i for i, keep in zip(row, keeps, strict=True) if keep]
            for row, keeps in zip(rows, real, strict=True)
        ], ids

    def _sampling_options(
        self,
        do_sample: bool,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        freq_penalty: float,
        repetition_penalty: float,
        stop_at_eos: bool,
        eos_token_id: int | Sequence[int] | None,
        seed: int | None,
    ) -> dict[str, Any]:
        eos = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        if eos is None:
            known = None if self._tokenizer is None else self._tokenizer.eos_id
            eos = [] if known is None else [known]
        return {
            "temperature": temperature if do_sample else 0.0,
            "top_k": top_k,
            "top_p": top_p,
            "frequency_penalty": freq_penalty,
            "repetition_penalty": repetition_penalty,
            "stop_at_eos": stop_at_eos,
            "eos_ids": list(eos),
            "seed": int(torch.randint(2**62, ())) if seed is None else seed,
        }

    def _joined(self, ids: Tensor, results: list[Generation], eos: list[int]) -> Tensor:
        """Prompts as given and what was generated, in one tensor [batch, pos]."""
        longest = max(len(result.ids) for result in results)
        filler = eos[0] if eos else (self._pad_id() or 0)
        new = [result.ids + [filler] * (longest - len(result.ids)) for result in results]
        return torch.cat((ids, torch.tensor(new, dtype=torch.long, device=ids.device)), 1)

    def _returned(
        self,
        input: Any,
        tokens: Tensor,
        results: list[Generation],
        prompts: list[list[int]],
        return_type: str,
    ) -> Any:
        if return_type not in ("input", "str", "tokens"):
            raise RequestError(f"return_type must be 'input', 'str' or 'tokens'; got {return_type!r}")
        if return_type == "tokens" or (return_type == "input" and isinstance(input, Tensor)):
            return tokens
        tokenizer = self._need_tokenizer()
        texts = []
        for prompt, result in zip(prompts, results, strict=True):
            shown = prompt[1:] if prompt[:1] == [tokenizer.bos_id] else prompt
            texts.append(tokenizer.decode(shown + result.ids))
        return texts if len(texts) > 1 or isinstance(input, list) else texts[0]


class _StepByStep(Transformer):
    """The model as the sampling loop calls it: hooks and replaced parts are looked up anew in each pass, so that a hook
    may add and remove hooks for the next one."""

    _face: tuple[Generating]

    @classmethod
    def of(cls, face: Generating) -> _StepByStep:
        """Around a model; it shares everything."""
        step = object.__new__(cls)
        step.__dict__.update(face._running_engine().__dict__, _face=(face,))
        return step

    def forward(self, tokens: Tensor, *, hooks: TransformerHooks | None = None, **options: Any) -> Tensor:
        """As the engine's."""
        face = self._face[0]
        return face._running_engine()(tokens, hooks=face._hook_tree(forward_only=True), **options)


def _by_step(results: list[Generation]) -> tuple[Tensor, ...]:
    """Logits of each step [batch, d_vocab]; rows that ended before are NaN."""
    steps = max(len(result.ids) for result in results)
    rows = []
    for result in results:
        assert result.logits is not None, "logits were asked for"
        rest = result.logits.new_full((steps - len(result.ids), result.logits.shape[1]), torch.nan)
        rows.append(torch.cat((result.logits, rest)))
    return tuple(torch.stack(rows, 1))
