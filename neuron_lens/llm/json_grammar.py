"""Answers that cannot but fit their JSON schema: at each token, those that would leave it are ruled out.

The grammar is llguidance's (extra `local`); here it meets our tokenizers and the hook on the logits.
"""

from __future__ import annotations

import importlib.util
import json
from typing import TYPE_CHECKING, Any

from neuron_lens.errors import BackendError

if TYPE_CHECKING:
    from torch import Tensor

    from neuron_lens.hooks import Run
    from neuron_lens.tokenizers import Tokenizer

__all__ = ["JsonGrammar", "JsonWriter", "can_hold_to_schemas"]

# Written as the examples of our prompts are: one space behind a comma and a colon, none elsewhere.
_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def can_hold_to_schemas() -> bool:
    """Whether llguidance is installed."""
    return importlib.util.find_spec("llguidance") is not None


class JsonGrammar:
    """JSON in the tokens of one tokenizer; made once for a model, for all schemas.

    Args:
        tokenizer: whose tokens are written.
        d_vocab: entries of the logits, of which the tokenizer may use fewer.
    """

    def __init__(self, tokenizer: Tokenizer, d_vocab: int) -> None:
        from llguidance import LLTokenizer, TokenizerWrapper

        self._tokens = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, d_vocab)))

    def writer(self, schema: dict[str, Any]) -> JsonWriter:
        """An answer to a schema, from its beginning. Raises BackendError for a schema that cannot be held to."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokens, LLMatcher.grammar_from_json_schema(schema, defaults=_FORM))
        if matcher.is_error():
            raise BackendError(
                f"answers cannot be held to the JSON schema {json.dumps(schema)[:200]}: {matcher.get_error()}"
            )
        return JsonWriter(matcher, self._tokens.vocab_size)


class JsonWriter:
    """One answer while it is written: `mask` goes on the logits, `accept` is told each token."""

    def __init__(self, matcher: Any, n_tokens: int) -> None:
        self._matcher = matcher
        self._n_tokens = n_tokens

    def mask(self, logits: Tensor, *, run: Run) -> Tensor:
        """logits [batch, pos, d_vocab] of one row: tokens that cannot come next get minus infinity."""
        import numpy as np
        import torch
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        words = allocate_token_bitmask(1, self._n_tokens)
        fill_next_token_bitmask(self._matcher, words, 0)
        bits = np.unpackbits(words[0].view(np.uint8), bitorder="little")[: logits.shape[-1]]
        allowed = torch.from_numpy(bits).bool().to(logits.device)
        return logits.masked_fill(~allowed, float("-inf"))

    def accept(self, token: int) -> bool:
        """Count a token that was written; True when the value is whole and nothing can follow it.

        Raises BackendError for a token the mask rules out.
        """
        if not self._matcher.consume_token(token):
            raise BackendError(f"token {token} leaves the schema: {self._matcher.get_error()}")
        return bool(self._matcher.is_stopped())


class _Vocabulary:
    """A tokenizer as llguidance wants it: the bytes of every token; one more behind them where there is no EOS."""

    def __init__(self, tokenizer: Tokenizer, d_vocab: int) -> None:
        known = [tokenizer.token_bytes(token) for token in range(min(tokenizer.vocab_size, d_vocab))]
        self.tokens = known + [b""] * (d_vocab - len(known))
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self.bos_token_id = tokenizer.bos_id
        self.eos_token_id = tokenizer.eos_id
        if self.eos_token_id is None:
            self.eos_token_id = d_vocab
            self.tokens.append(b"<end>")
            self.special_token_ids.append(d_vocab)
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("texts are asked for, not bytes")
        return self._tokenizer.encode(text, bos=False)
