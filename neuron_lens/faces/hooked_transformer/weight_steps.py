"""Single steps of weight processing, on classic state dicts: `state = model.center_unembed(state)`.

`process_weights_` takes several at once, on the model itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_transformer.autoencoders import WithAutoencoders
from neuron_lens.transformer import Transformer
from neuron_lens.weights import Processing, process

__all__ = ["WeightSteps"]

# Names of the original that are not offered -> what to use instead.
_INSTEAD = {
    "load_sample_training_dataset": "it needs a download: utils.get_dataset reads files of yours",
    "sample_datapoint": "it needs a download: utils.get_dataset reads files of yours",
    "fill_missing_keys": "load_state_dict(state, strict=False) keeps weights that the state lacks",
    "get_pos_offset": "past_kv_cache.length is what came before",
    "get_residual": "model(tokens, stop_at_layer=0) is the stream entering the first block",
    "hf_generate": "use generate",
    "enable_compatibility_mode": "use process_weights_",
    "boot_transformers": "use from_pretrained",
}


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
            self.cfg.normalization_type += "Pre"

    def __getattr__(self, name: str) -> Any:
        if name in _INSTEAD:
            raise AttributeError(f"{type(self).__name__} does not offer {name!r}: {_INSTEAD[name]}")
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
