"""Text to tokens and back, with the classic rules: BOS first by default (never twice), padding on a chosen side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.engine_module import EngineModule
from neuron_lens.faces.hooked_transformer.tokenizer_view import TokenizerView
from neuron_lens.tokenizers import Tokenizer, as_tokenizer

__all__ = ["PaddingSide", "Tokenisation"]

PaddingSide = Literal["left", "right"] | None


class Tokenisation(EngineModule):
    """The tokenisation methods of HookedTransformer.

    `tokenizer` is what was given; inside, any known kind is used through one interface and never changed.
    """

    _tokenizer: Tokenizer | None
    _given_tokenizer: Any
    padding_side: Literal["left", "right"]
    dataset: Any = None  # rows with a "text", for sample_datapoint

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as it was given; None when there is none."""
        return self._given_tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self.set_tokenizer(tokenizer)

    def set_tokenizer(self, tokenizer: Any, default_padding_side: PaddingSide = None) -> None:
        """Use a tokenizer: ours, one of tiktoken, transformers or tokenizers, or a path. It is not changed."""
        tokenizer = tokenizer.inner if isinstance(tokenizer, TokenizerView) else tokenizer
        given = None if tokenizer is None else as_tokenizer(tokenizer)
        if given is not None and given.vocab_size > self.engine.config.d_vocab:
            raise RequestError(
                f"the tokenizer {given.name} has ids up to {given.vocab_size - 1}, the model a vocabulary of "
                f"{self.engine.config.d_vocab}"
            )
        self._tokenizer, self._given_tokenizer = given, tokenizer
        if given is not None and (tokenizer is given or isinstance(tokenizer, str | os.PathLike)):
            self._given_tokenizer = TokenizerView(given)
        self.engine.tokenizer = given
        if default_padding_side is not None:
            self.padding_side = default_padding_side
        self.cfg.tokenizer_prepends_bos = None if given is None else given.adds_bos

    def sample_datapoint(
        self, tokenize: bool = False, prepend_bos: bool | None = None, padding_side: PaddingSide = None
    ) -> str | Tensor:
        """A text drawn from `model.dataset`, which you set: rows with a "text"; by torch's generator.

        tokenize: its ids [1, pos] instead, cut at the model's context.

        Raises RequestError while there is no data set.
        """
        if not self.dataset:
            raise RequestError(
                "there is no data set to draw from: model.dataset = utils.get_dataset(path) first"
            )
        row = self.dataset[int(torch.randint(len(self.dataset), ()))]
        text = str(row["text"])
        if not tokenize:
            return text
        return self.to_tokens(text, prepend_bos=prepend_bos, padding_side=padding_side, truncate=True)

    def _need_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError(
                "the model has no tokenizer: set model.tokenizer, or give token ids instead of text"
            )
        return self._tokenizer

    def _pad_id(self) -> int | None:
        known = self._tokenizer
        if known is None:
            return None
        return next((i for i in (known.pad_id, known.eos_id, known.bos_id) if i is not None), 0)

    def _encode(self, text: str, prepend_bos: bool | None) -> list[int]:
        tokenizer = self._need_tokenizer()
        bos = prepend_bos
        if bos is None:
            bos = self.cfg.default_prepend_bos and tokenizer.bos_id is not None
        return tokenizer.encode(text, bos=bos, allowed_special=True)

    def _padded(
        self,
        text: str | Sequence[str],
        prepend_bos: bool | None,
        padding_side: PaddingSide,
        truncate: bool | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Ids [batch, pos], and where they are padding (None when nowhere)."""
        texts = [text] if isinstance(text, str) else list(text)
        if not texts or not all(isinstance(t, str) for t in texts):
            raise RequestError(f"expected a text or a list of at least one text; got {text!r:.80}")
        rows = [self._encode(t, prepend_bos) for t in texts]
        longest = max(map(len, rows))
        if any(not row for row in rows):
            raise RequestError(
                "a text has no tokens: give text, or prepend a BOS token with prepend_bos=True"
            )
        if longest > self.cfg.n_ctx and truncate is not False:
            if truncate is None:
                raise RequestError(
                    f"the text has {longest} tokens, the model a context of {self.cfg.n_ctx}: shorten it, or pass truncate=True"
                )
            rows = [row[: self.cfg.n_ctx] for row in rows]
            longest = max(map(len, rows))
        side = padding_side or self.padding_side
        if side not in ("left", "right"):
            raise RequestError(f"padding_side must be 'left' or 'right'; got {side!r}")
        lengths = torch.tensor([len(row) for row in rows])
        columns = torch.arange(longest)
        real = columns < lengths[:, None] if side == "right" else columns >= longest - lengths[:, None]
        ids = torch.full((len(rows), longest), self._pad_id() or 0, dtype=torch.long)
        ids[real] = torch.tensor([i for row in rows for i in row])
        return ids, None if bool(real.all()) else ~real

    def to_tokens(
        self,
        input: str | Sequence[str],
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
        move_to_device: bool = True,
        truncate: bool | None = None,
    ) -> Tensor:
        """Ids of a text or of several, padded to one length. [batch, pos]

        prepend_bos: None follows `cfg.default_prepend_bos`. A text that begins with the BOS token gets no second one.
        truncate: what exceeds the context is cut (True), kept (False: ids for other uses), or a RequestError (None).
        """
        ids, _ = self._padded(input, prepend_bos, padding_side, truncate)
        return ids.to(self.device) if move_to_device else ids

    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of ids [pos], or the texts of ids [batch, pos] or of a list of ids tensors."""
        tokenizer = self._need_tokenizer()
        if isinstance(tokens, list) and tokens and isinstance(tokens[0], Tensor) and tokens[0].dim() > 0:
            return [tokenizer.decode(row.tolist()) for row in tokens]
        ids = torch.as_tensor(tokens)
        if ids.is_floating_point() or ids.dim() > 2:
            raise RequestError(f"expected ids [pos] or [batch, pos]; got {ids.dtype} {list(ids.shape)}")
        if ids.dim() == 2:
            return [tokenizer.decode(row) for row in ids.tolist()]
        return tokenizer.decode(ids.reshape(-1).tolist())

    def to_str_tokens(
        self, input: Any, prepend_bos: bool | None = None, padding_side: PaddingSide = None
    ) -> list[str] | list[list[str]]:
        """Each token's text: of a text or of ids [pos] or [1, pos]; for a list of these, a list of lists."""
        tokenizer = self._need_tokenizer()
        if isinstance(input, list) and not all(isinstance(part, int) for part in input):
            return [cast(list[str], self.to_str_tokens(part, prepend_bos, padding_side)) for part in input]
        if isinstance(input, str):
            ids = self._encode(input, prepend_bos)
        else:
            tensor = torch.as_tensor(input).squeeze()
            if tensor.dim() > 1 or tensor.is_floating_point():
                raise RequestError(
                    f"expected a text or ids [pos]; got {tensor.dtype} {list(tensor.shape)}; give rows as a list"
                )
            ids = tensor.reshape(-1).tolist()
        return [tokenizer.decode([i]) for i in ids]

    def to_single_token(self, string: str) -> int:
        """The id of a text that is one token. Raises RequestError when it is several."""
        ids = self._encode(string, prepend_bos=False)
        if len(ids) != 1:
            parts = [self._need_tokenizer().decode([i]) for i in ids]
            raise RequestError(
                f"{string!r} is {len(ids)} tokens {parts}, not one; is a space before it missing or too many?"
            )
        return ids[0]

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one id."""
        return self._need_tokenizer().decode([int(int_token)])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: Any,
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
        padding_side: PaddingSide = None,
    ) -> int:
        """Where a token stands in a text or in ids [pos] or [1, pos]. Raises RequestError when it does not."""
        ids = (
            self.to_tokens(input, prepend_bos, padding_side)
            if isinstance(input, str)
            else torch.as_tensor(input)
        )
        ids = ids.squeeze(0) if ids.dim() == 2 else ids
        if ids.dim() != 1:
            raise RequestError(f"expected one sequence; got ids {list(ids.shape)}")
        token = self.to_single_token(single_token) if isinstance(single_token, str) else int(single_token)
        found = (ids == token).nonzero().flatten().tolist()
        if not found:
            raise RequestError(
                f"the token {single_token!r} (id {token}) is not in the prompt of {len(ids)} tokens"
            )
        if mode not in ("first", "last"):
            raise RequestError(f"mode must be 'first' or 'last'; got {mode!r}")
        return int(found[0 if mode == "first" else -1])

    def tokens_to_residual_directions(self, tokens: str | int | Tensor) -> Tensor:
        """The unembedding direction of each token: its column of W_U. [..., d_model]"""
        columns = self.engine.unembed.weight
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        ids = torch.as_tensor(tokens, device=columns.device)
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= columns.shape[0]):
            raise RequestError(
                f"token ids must be in 0..{columns.shape[0] - 1}; got {int(ids.min())}..{int(ids.max())}"
            )
        return columns[ids]

    def _padding_of(self, tokens: Tensor) -> Tensor | None:
        """Where given ids are padding: runs of the pad token at either end of a row. None when nowhere.

        Where the pad token is also BOS or EOS, a row may really start or end with it: of a run at the start the
        last one is taken for BOS, and what all rows have is no padding, which leaves the longest row as it is.
        """
        pad_id = self._pad_id()
        known = self._tokenizer
        if pad_id is None or known is None or tokens.shape[1] < 2:
            return None
        is_pad = tokens == pad_id
        if not bool(is_pad[:, 0].any() | is_pad[:, -1].any()):
            return None
        left = is_pad.long().cumprod(-1).bool()
        right = is_pad.flip(-1).long().cumprod(-1).flip(-1).bool()
        if pad_id in (known.bos_id, known.eos_id):
            if known.bos_id == pad_id:
                left = torch.cat((left[:, 1:], torch.zeros_like(left[:, :1])), -1) & left
            left, right = left & ~left.all(0), right & ~right.all(0)
        # a row padded on both sides is not made by padding: take the side chosen by the model
        both = left.any(-1) & right.any(-1)
        dropped, kept = (right, left) if self.padding_side == "left" else (left, right)
        pad = torch.where(both[:, None], kept, dropped | kept)
        return pad if bool(pad.any()) and not bool(pad.all(-1).any()) else None
