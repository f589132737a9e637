"""Reading the stream, or a part of it, as logits: through the final norm and the unembedding.

The logit lens (nostalgebraist 2020) norms a layer's stream with its own statistics, as if the model ended there. Direct
logit attribution (Elhage et al. 2021) norms a part with the statistics of the stream that the model itself norms, which is
linear, so that the parts' logits sum to the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from neuron_lens.analysis.residual import norm_of_part
from neuron_lens.transformer.functional import softcap

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["final_norm_of_part", "stream_logits"]


def final_norm_of_part(model: Transformer, part: Tensor, moments: Mapping[str, Tensor]) -> Tensor:
    """A part of the final stream as the final norm passes it on, without the norm's bias. [batch, pos, d_model]

    part: [batch, pos, d_model]. moments: "variance" and "second_moment" of the final stream, each [batch, pos].
    """
    norm = model.ln_f
    if norm is None:
        return part
    squares = moments["variance" if norm.center else "second_moment"].to(part.device)
    scale = (squares[..., None] + norm.eps).sqrt().to(part.dtype)
    weight = None if norm.weight is None else norm.weight.detach() + (1 if norm.offset else 0)
    return norm_of_part(part, scale, centre=norm.center, weight=weight)


def stream_logits(
    model: Transformer, normed: Tensor, tokens: Tensor | None = None, *, linear: bool = False
) -> Tensor:
    """Logits of a stream behind the final norm.

    normed: [batch, pos, d_model]. tokens: only these ids [batch, tokens]. linear: of a part: without the unembedding's
    bias and the soft cap, which belong to the whole. Returns [batch, pos, d_vocab], or [batch, pos, tokens].
    """
    weight, bias = model.unembed.weight.detach(), model.unembed.bias
    logits = normed @ (weight if tokens is None else weight[tokens.to(weight.device)]).mT
    if bias is not None and not linear:
        logits = logits + (bias if tokens is None else bias[tokens.to(bias.device)][:, None]).detach()
    logits = logits * model.config.logit_scale
    return logits if linear else softcap(logits, model.config.logit_softcap)
