"""Next-token loss and accuracy, aware of padding."""

from __future__ import annotations

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = ["lm_accuracy", "lm_cross_entropy_loss"]


def lm_cross_entropy_loss(
    logits: Tensor, tokens: Tensor, attention_mask: Tensor | None = None, per_token: bool = False
) -> Tensor:
    """Cross entropy of each next token, in nats.

    Args:
        logits: [batch, pos, d_vocab]. tokens: [batch, pos].
        attention_mask: 0 where padding [batch, pos]; a pair of positions counts when neither is.
        per_token: the loss of each pair [batch, pos - 1] (0 where it does not count) instead of their mean.
    """
    if tokens.shape != logits.shape[:2]:
        raise RequestError(f"logits {list(logits.shape)} do not belong to tokens {list(tokens.shape)}")
    if tokens.numel() and int(tokens.max()) >= logits.shape[-1]:
        raise RequestError(
            f"the token {int(tokens.max())} has no logit among {logits.shape[-1]}: the next-token loss is for models whose "
            "logits are of the tokens they read"
        )
    if tokens.shape[1] < 2:
        raise RequestError("the loss needs at least two tokens: the first predicts the second")
    log_probs = logits.log_softmax(-1)
    losses = -log_probs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    if attention_mask is None:
        return losses if per_token else losses.mean()
    mask = attention_mask.to(tokens.device).bool()
    counted = mask[:, :-1] & mask[:, 1:]
    losses = torch.where(counted, losses, 0.0)
    return losses if per_token else losses.sum() / counted.sum()


def lm_accuracy(logits: Tensor, tokens: Tensor, per_token: bool = False) -> Tensor:
    """Whether the likeliest next token is the next token: its share, or for each pair [batch, pos - 1]."""
    correct = logits.argmax(-1)[:, :-1] == tokens[:, 1:]
    return correct if per_token else correct.float().mean()
