"""SVDInterpreter: singular vectors of a model's weights, in the vocabulary."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from neuron_lens.analysis.singular_vectors import unembedded_directions
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.model import HookedTransformer
from neuron_lens.weights import FactoredMatrix

__all__ = ["SVDInterpreter"]


class SVDInterpreter:
    """Singular vectors of heads' OV circuits and of MLP weights, unembedded."""

    def __init__(self, model: HookedTransformer) -> None:
        self.model, self.cfg = model, model.cfg

    def get_singular_vectors(
        self,
        vector_type: Literal["OV", "w_in", "w_out"],
        layer_index: int,
        num_vectors: int = 10,
        head_index: int | None = None,
    ) -> Tensor:
        """The strongest directions of the stream that a weight reads ("w_in") or writes ("OV", "w_out").

        The weight of an unfolded norm is applied to "w_in". Returns [d_vocab, 1, num_vectors]; signs are arbitrary.
        """
        if not 0 <= layer_index < self.cfg.n_layers:
            raise RequestError(f"layer_index must be 0 to {self.cfg.n_layers - 1}; got {layer_index}")
        width = self.cfg.d_head if vector_type == "OV" else min(self.cfg.d_model, self.cfg.d_mlp or 0)
        if not 1 <= num_vectors <= width:
            raise RequestError(f"num_vectors must be 1 to {width} for {vector_type}; got {num_vectors}")
        block = self.model.blocks[layer_index]
        matrix: Tensor | FactoredMatrix
        if vector_type == "OV":
            if head_index is None or not 0 <= head_index < self.cfg.n_heads:
                raise RequestError(
                    f"vector_type 'OV' needs head_index from 0 to {self.cfg.n_heads - 1}; got {head_index}"
                )
            matrix = FactoredMatrix(block.attn.W_V[head_index].detach(), block.attn.W_O[head_index].detach())
        elif vector_type == "w_in":
            norm = getattr(block, "ln2", None)
            matrix = (
                block.mlp.W_in.detach().T if norm is None else block.mlp.W_in.detach().T * norm.w.detach()
            )
        elif vector_type == "w_out":
            matrix = block.mlp.W_out.detach()
        else:
            raise RequestError(f"vector_type must be 'OV', 'w_in' or 'w_out'; got {vector_type!r}")
        return unembedded_directions(matrix, self.model.W_U.detach(), num_vectors)[:, None]
