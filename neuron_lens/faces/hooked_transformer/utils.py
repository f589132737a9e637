"""Small helpers under the names people import: `from transformer_lens import utils`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from neuron_lens.analysis.composition import pairwise_composition as composition_scores
from neuron_lens.cache import Slice, SliceInput
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer import (
    activation_functions,
    estimates,
    init_functions,
    small_helpers,
    text_data,
)
from neuron_lens.faces.hooked_transformer.act_name import get_act_name
from neuron_lens.faces.hooked_transformer.activation_functions import *  # noqa: F403
from neuron_lens.faces.hooked_transformer.estimates import *  # noqa: F403
from neuron_lens.faces.hooked_transformer.init_functions import *  # noqa: F403
from neuron_lens.faces.hooked_transformer.losses import lm_accuracy, lm_cross_entropy_loss
from neuron_lens.faces.hooked_transformer.model import HookedTransformer
from neuron_lens.faces.hooked_transformer.not_offered import OF_UTILS, not_offered
from neuron_lens.faces.hooked_transformer.small_helpers import *  # noqa: F403
from neuron_lens.faces.hooked_transformer.text_data import *  # noqa: F403
from neuron_lens.transformer.token_choice import TokenChoice, draw, keep_top_k, keep_top_p, penalise_frequency

__all__ = [
    "LocallyOverridenDefaults",
    "Slice",
    "SliceInput",
    "TokenChoice",
    "check_structure",
    "composition_scores",
    "get_act_name",
    "get_attention_mask",
    "get_corner",
    "get_cumsum_along_dim",
    "get_offset_position_ids",
    "is_lower_triangular",
    "is_square",
    "lm_accuracy",
    "lm_cross_entropy_loss",
    "remove_batch_dim",
    "repeat_along_head_dimension",
    "sample_logits",
    "test_prompt",
    "to_numpy",
    "transpose",
]
for _part in (activation_functions, estimates, init_functions, small_helpers, text_data):
    __all__ += _part.__all__


def to_numpy(tensor: Any) -> Any:
    """A numpy array of a tensor, parameter, list, number or array."""
    if isinstance(tensor, Tensor):
        return tensor.detach().cpu().numpy()
    return torch.as_tensor(tensor).numpy() if not hasattr(tensor, "__array__") else tensor


def get_corner(tensor: Any, n: int = 3) -> Any:
    """The first n entries along every dimension."""
    if hasattr(tensor, "get_corner"):
        return tensor.get_corner(n)
    return tensor[tuple(slice(n) for _ in range(tensor.ndim))]


def remove_batch_dim(tensor: Tensor) -> Tensor:
    """Without a first dimension of length 1; unchanged when it is longer."""
    return tensor.squeeze(0) if tensor.shape[0] == 1 else tensor


def transpose(tensor: Tensor) -> Tensor:
    """The last two dimensions exchanged."""
    return tensor.mT


def is_square(x: Tensor) -> bool:
    """Whether a matrix has as many rows as columns."""
    return x.dim() == 2 and x.shape[0] == x.shape[1]


def is_lower_triangular(x: Tensor) -> bool:
    """Whether a matrix is square and 0 above its diagonal."""
    return is_square(x) and torch.equal(x, x.tril())


def repeat_along_head_dimension(tensor: Tensor, n_heads: int, clone_tensor: bool = True) -> Tensor:
    """[batch, pos, d_model] once for each head: [batch, pos, head, d_model]"""
    repeated = tensor.unsqueeze(2).expand(-1, -1, n_heads, -1)
    return repeated.clone() if clone_tensor else repeated


def check_structure(t1: Tensor, t2: Tensor) -> None:
    """Raise RequestError unless neighbouring entries of two matrices compare alike, along rows and along columns."""
    if t1.dim() != 2 or t1.shape != t2.shape:
        raise RequestError(f"expected two matrices of one shape; got {list(t1.shape)} and {list(t2.shape)}")
    for axis, name in ((0, "rows"), (1, "columns")):
        unlike = (
            (t1.diff(dim=axis).le(0) != t2.diff(dim=axis).le(0)).any(1 - axis).nonzero().flatten().tolist()
        )
        if unlike:
            raise RequestError(
                f"the matrices are ordered differently between {name} {unlike[0]} and {unlike[0] + 1}"
            )


def get_cumsum_along_dim(tensor: Tensor, dim: int, reverse: bool = False) -> Tensor:
    """Sums of all entries up to each one, or from each one on."""
    return tensor.flip(dim).cumsum(dim).flip(dim) if reverse else tensor.cumsum(dim)


def get_offset_position_ids(past_kv_pos_offset: int, attention_mask: Tensor) -> Tensor:
    """Position of each token among the tokens that are no padding, from a mask that covers the cached ones, too."""
    positions = attention_mask.cumsum(1) - 1
    return positions.masked_fill(attention_mask == 0, 0)[:, past_kv_pos_offset:]


def get_attention_mask(model: HookedTransformer, tokens: Tensor, prepend_bos: bool | None = None) -> Tensor:
    """1 where the model takes ids for tokens, 0 where for padding, [batch, pos]. prepend_bos: accepted; the ids tell."""
    if not isinstance(model, HookedTransformer):
        raise RequestError(
            f"get_attention_mask takes the model, whose rules say what is padding; got {type(model).__name__}"
        )
    pad = model._padding_of(tokens)
    return torch.ones_like(tokens) if pad is None else (~pad).long()


def sample_logits(
    final_logits: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float = 1.0,
    freq_penalty: float = 0.0,
    tokens: Tensor | None = None,
) -> Tensor:
    """A token for each row of logits [batch, d_vocab], drawn with torch's generator; the likeliest at temperature 0.

    tokens: earlier ids [batch, pos], which `freq_penalty` counts.
    """
    logits = final_logits
    if freq_penalty:
        if tokens is None:
            raise RequestError("freq_penalty needs tokens=, whose repetitions it counts")
        counts = torch.zeros_like(logits).scatter_add_(1, tokens, torch.ones_like(tokens, dtype=logits.dtype))
        logits = penalise_frequency(logits, counts, freq_penalty)
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / temperature
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p is None else keep_top_p(logits, top_p)
    return draw(logits, torch.rand(len(logits), dtype=torch.float64).to(logits.device))


def __getattr__(name: str) -> Any:
    if name in OF_UTILS:
        raise not_offered("utils", name, OF_UTILS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def LocallyOverridenDefaults(
    model: HookedTransformer, prepend_bos: bool | None = None, padding_side: Any = None
) -> Iterator[HookedTransformer]:
    """Other defaults inside a `with` block; None leaves one as it is."""
    before = model.cfg.default_prepend_bos, model.padding_side
    try:
        if prepend_bos is not None:
            model.cfg.default_prepend_bos = prepend_bos
        if padding_side is not None:
            model.padding_side = padding_side
        yield model
    finally:
        model.cfg.default_prepend_bos, model.padding_side = before


def test_prompt(
    prompt: str,
    answer: str | list[str],
    model: HookedTransformer,
    prepend_space_to_answer: bool = True,
    print_details: bool = True,
    prepend_bos: bool | None = None,
    top_k: int = 10,
) -> list[dict[str, Any]]:
    """How likely a model finds the tokens of an answer after a prompt.

    Returns for each token of each answer {"token", "rank" (0 is the likeliest), "logit", "probability", "top"}; "top"
    holds the `top_k` likeliest (token, probability). `print_details` prints the same.
    """
    found = []
    for one in [answer] if isinstance(answer, str) else answer:
        text = f" {one}" if prepend_space_to_answer and not one.startswith(" ") else one
        before = model.to_tokens(prompt, prepend_bos=prepend_bos)
        after = model.to_tokens(text, prepend_bos=False).to(before.device)
        with torch.no_grad():
            logits = model(torch.cat((before, after), 1))[0, before.shape[1] - 1 : -1]
        for row, token in zip(logits, after[0].tolist(), strict=True):
            probs = row.float().softmax(-1)
            best = probs.topk(min(top_k, len(probs)))
            top = [
                (model.to_single_str_token(i), p)
                for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            entry: dict[str, Any] = {
                "token": model.to_single_str_token(token),
                "rank": int((row > row[token]).sum()),
            }
            found.append(
                {**entry, "logit": float(row[token]), "probability": float(probs[token]), "top": top}
            )
    if print_details:
        for entry in found:
            print(
                f"{entry['token']!r}: rank {entry['rank']}, probability {entry['probability']:.2%}; top {entry['top'][:3]}"
            )
    return found


# pytest takes functions of this name for tests
test_prompt.__test__ = False  # type: ignore[attr-defined]
