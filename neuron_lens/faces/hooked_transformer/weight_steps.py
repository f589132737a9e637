"""Single steps of weight processing, on classic state dicts: `state = model.center_unembed(state)`.

`process_weights_` takes several at once, on the model itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_transformer.autoencoders import WithAutoencoders
from neuron_lens.faces.hooked_transformer.not_offered import OF_MODELS, not_offered
from neuron_lens.transformer import Transformer
from neuron_lens.weights import Processing, process

__all__ = ["WeightSteps"]


class WeightSteps(WithAutoencoders):
    """Each takes a state dict of this model and returns a new one; a step that would change the function is left out."""

    def fold_layer_norm(
        self, state_dict: dict[str, Tensor], fold_biases: bool = True, center_weights: bool = True
    ) -> dict[str, Tensor]:
        """Norm weights and biases moved into the linear maps that read them."""
        if not (fold_biases and center_weights):
            raise RequestError("fold_layer_norm folds weights and biases together: leave both options True")
        return self._processed(state_dict, Processing(fold_ln=True))

    def center_writing_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """What writes to the stream without its mean over d_model."""
        return self._processed(state_dict, Processing(center_writing_weights=True))

    def center_unembed(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The unembedding without its mean over the vocabulary."""
        return self._processed(state_dict, Processing(center_unembed=True))

    def fold_value_biases(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """b_V W_O moved into b_O."""
        return self._processed(state_dict, Processing(fold_value_biases=True))

    def refactor_factored_attn_matrices(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """W_Q and W_K with even singular values, W_O a rotation; the products stay."""
        return self._processed(state_dict, Processing(refactor_factored_attn_matrices=True))

    def fill_missing_keys(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state with what it lacks of this model: norms' weights and biases, from the model as it is.

        Raises RequestError for weight matrices that are missing: a name is wrong, or the state is of another model.
        """
        own: dict[str, Tensor] = self.state_dict()
        missing = [name for name in own if name not in state_dict]
        matrices = [
            name for name in missing if own[name].dim() > 1 and ".b_" not in name and "._b_" not in name
        ]
        if matrices:
            raise RequestError(
                f"the state lacks {len(matrices)} weight matrices of the model, such as {', '.join(matrices[:4])}; "
                f"{did_you_mean(matrices[0], state_dict)}"
            )
        return {**state_dict, **{name: own[name] for name in missing}}

    def _processed(self, state_dict: dict[str, Tensor], steps: Processing) -> dict[str, Tensor]:
        other = copy.deepcopy(self)
        other._use_engine(
            _with_all_biases(self.engine), folded=False
        )  # a state may hold some of earlier steps
        other.load_state_dict(state_dict, strict=False)
        other._use_engine(process(other.engine, steps), folded=False)
        found: dict[str, Tensor] = other.state_dict()
        return found

    def _use_engine(self, engine: Transformer, folded: bool) -> None:
        """Take another engine of the same shape, and keep hooks and tokenizer."""
        self.engine = engine
        for owner in (*(slot.owner for slot in self._slots), *self._own_ends.values()):
            owner.__dict__["_held"] = (engine,)
        if folded and self.cfg.normalization_type in ("LN", "RMS"):
            self.cfg.__dict__["normalization_type"] += "Pre"

    def __getattr__(self, name: str) -> Any:
        if name in OF_MODELS:
            raise not_offered(type(self).__name__, name, OF_MODELS[name])
        return super().__getattr__(name)


def _with_all_biases(engine: Transformer) -> Transformer:
    """The same function with every bias there can be, zero where there was none, and an unembedding of its own."""
    fields = dict.fromkeys(("qkv_bias", "out_bias", "unembed_bias"), True) | {"tied": False}
    if engine.config.mlp in ("plain", "gated"):
        fields["mlp_bias"] = True
    roomy = Transformer(engine.config.model_copy(update=fields), seed=None, tokenizer=engine.tokenizer)
    roomy.to(engine.embed.weight)
    with torch.no_grad():
        for name, parameter in roomy.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    roomy.load_state_dict({**engine.state_dict(), "unembed.weight": engine.unembed.weight}, strict=False)
    return roomy.train(engine.training)
