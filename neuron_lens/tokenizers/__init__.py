"""Text to token ids and back: one small interface over tiktoken and the `tokenizers` library."""

from __future__ import annotations

from neuron_lens.tokenizers.base import Tokenizer
from neuron_lens.tokenizers.huggingface import HuggingFaceTokenizer
from neuron_lens.tokenizers.load import as_tokenizer, load_tokenizer
from neuron_lens.tokenizers.tiktoken import TiktokenTokenizer, bytes_tokenizer

__all__ = [
    "HuggingFaceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "as_tokenizer",
    "bytes_tokenizer",
    "load_tokenizer",
]
