"""Two runs compared by their logits: divergence and differences of token pairs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kl_by_row", "pair_differences"]


def kl_by_row(reference: Tensor, logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(reference ‖ other) of next-token distributions in nats, the mean over each row's positions. [batch]

    reference, logits: [batch, pos, d_vocab]. mask: false where a position does not count [batch, pos].
    """
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    counted = torch.ones_like(kl) if mask is None else mask.to(kl)
    return (kl * counted).sum(-1) / counted.sum(-1)


def pair_differences(logits: Tensor, up: Tensor, down: Tensor, mask: Tensor | None = None) -> Tensor:
    """logit[up] − logit[down], the mean over each row's positions. [batch, pairs]

    logits: [batch, pos, d_vocab]. up, down: token ids [pairs] for all rows, or [batch, pairs]. mask: as above.
    """
    rows, columns = logits.shape[:2]

    def picked(ids: Tensor) -> Tensor:
        chosen = ids.to(logits.device).expand(rows, -1)[:, None, :].expand(-1, columns, -1)
        return logits.float().gather(-1, chosen)

    difference = picked(up) - picked(down)
    counted = torch.ones(rows, columns, device=logits.device) if mask is None else mask.to(difference)
    return (difference * counted[..., None]).sum(1) / counted.sum(1)[:, None]
