"""Quick evaluations that need no download: a sanity check, loss on texts, induction on repeated random tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.model import HookedTransformer

__all__ = ["evaluate_on_dataset", "induction_loss", "make_text_loader", "sanity_check"]

_TEXT = "The quick brown fox jumps over the lazy dog. A language model reads from left to right, one token at a time."


def sanity_check(model: HookedTransformer, text: str = _TEXT) -> float:
    """Mean next-token loss on a text, in nats: about ln(d_vocab) means the weights are wrong."""
    with torch.no_grad():
        return float(model(text, return_type="loss"))


def make_text_loader(
    model: HookedTransformer, texts: Iterable[str], batch_size: int = 8, context: int | None = None
) -> Iterator[dict[str, Tensor]]:
    """Texts joined, cut into rows of the model's context (or `context`) that each begin with BOS, in batches.

    Yields {"tokens": [batch, pos]}; the last row may be cut short and is left out.
    """
    bos = model._need_tokenizer().bos_id if model.cfg.default_prepend_bos else None
    width = (model.cfg.n_ctx if context is None else context) - (bos is not None)
    waiting: list[int] = []
    rows: list[list[int]] = []
    for text in texts:
        waiting += model._encode(text, prepend_bos=False)
        while len(waiting) >= width:
            rows.append(([bos] if bos is not None else []) + waiting[:width])
            waiting = waiting[width:]
            if len(rows) == batch_size:
                yield {"tokens": torch.tensor(rows)}
                rows = []
    if rows:
        yield {"tokens": torch.tensor(rows)}


def evaluate_on_dataset(
    model: HookedTransformer, batches: Iterable[dict[str, Tensor]], truncate: int = 100
) -> float:
    """Mean loss over the first `truncate` batches, each {"tokens": [batch, pos]}. Raises RequestError for none."""
    total, count = 0.0, 0
    with torch.no_grad():
        for number, batch in enumerate(batches):
            if number == truncate:
                break
            losses = model(batch["tokens"].to(model.device), return_type="loss", loss_per_token=True)
            total, count = total + float(losses.sum()), count + losses.numel()
    if not count:
        raise RequestError("there is nothing to evaluate on: no batches")
    return total / count


def induction_loss(
    model: HookedTransformer,
    batch_size: int = 4,
    subseq_len: int = 384,
    tokens: Sequence[int] | None = None,
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> float:
    """Mean loss on the second copy of random tokens said twice: low when the model has induction heads.

    tokens: ids to draw from; None for all of the vocabulary but special tokens. Drawn on the CPU from `seed`.
    """
    known = model._tokenizer
    if tokens is None:
        special = set() if known is None else set(known.special_tokens.values())
        tokens = [i for i in range(model.cfg.d_vocab) if i not in special]
    bos = None if known is None else known.bos_id
    with_bos = bos is not None and (model.cfg.default_prepend_bos if prepend_bos is None else prepend_bos)
    if 2 * subseq_len + with_bos > model.cfg.n_ctx:
        raise RequestError(
            f"two copies of {subseq_len} tokens do not fit a context of {model.cfg.n_ctx}; lower subseq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(tokens), (batch_size, subseq_len), generator=generator)
    once = torch.tensor(list(tokens))[drawn]
    rows = torch.cat((once, once), 1)
    if with_bos:
        rows = torch.cat((torch.full((batch_size, 1), int(bos or 0)), rows), 1)
    with torch.no_grad():
        losses = model(rows.to(model.device), return_type="loss", loss_per_token=True)
    # the first token of the second copy cannot be known
    return float(losses[:, -(subseq_len - 1) :].mean())
