"""Scripts written for TransformerLens 1.x to 3.x, run on this library.

`install_as_transformer_lens()` makes `import transformer_lens`, and the submodules people import, resolve to ours in
this process. It is opt in, and refuses to hide the real package once that is loaded.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from neuron_lens.errors import NeuronLensError

__all__ = ["install_as_transformer_lens"]

_FACE = "neuron_lens.faces.hooked_transformer"

# Module of transformer_lens -> the names it offers and the module of ours that has each.
_MODULES: dict[str, dict[str, str]] = {
    "": {
        "HookedTransformer": f"{_FACE}.model",
        "HookedTransformerConfig": f"{_FACE}.config",
        "ActivationCache": f"{_FACE}.activation_cache",
        "FactoredMatrix": "neuron_lens.weights",
        "HookedTransformerKeyValueCache": f"{_FACE}.kv_cache",
        "SVDInterpreter": f"{_FACE}.svd_interpreter",
        "HookedRootModule": f"{_FACE}.root_module",
    },
    "hook_points": {
        "HookPoint": f"{_FACE}.hook_point",
        "LensHandle": f"{_FACE}.hook_point",
        "HookedRootModule": f"{_FACE}.root_module",
        "NamesFilter": f"{_FACE}.name_filter",
    },
    "HookedTransformer": {"HookedTransformer": f"{_FACE}.model", "Output": f"{_FACE}.forward"},
    "HookedTransformerConfig": {"HookedTransformerConfig": f"{_FACE}.config"},
    "ActivationCache": {"ActivationCache": f"{_FACE}.activation_cache"},
    "FactoredMatrix": {"FactoredMatrix": "neuron_lens.weights"},
    "head_detector": dict.fromkeys(
        ("detect_head", "compute_head_attention_similarity_score"), f"{_FACE}.head_detector"
    ),
    "past_key_value_caching": {"HookedTransformerKeyValueCache": f"{_FACE}.kv_cache"},
    "train": dict.fromkeys(("train", "HookedTransformerTrainConfig"), f"{_FACE}.train"),
    "SVDInterpreter": {"SVDInterpreter": f"{_FACE}.svd_interpreter"},
}
# These resolve to a module of ours as a whole.
_WHOLE = {"utils": f"{_FACE}.utils", "evals": f"{_FACE}.evals", "utilities": f"{_FACE}.utils"}
_WHOLE |= {"patching": f"{_FACE}.patching"}

# What people look for and we do not offer -> what to use instead.
_INSTEAD = {
    "HookedEncoder": "encoder models are not offered",
    "HookedEncoderDecoder": "encoder-decoder models are not offered",
    "HookedAudioEncoder": "audio models are not offered",
    "BertNextSentencePrediction": "encoder models are not offered",
    "TransformerBridge": "use HookedTransformer",
    "model_bridge": "use HookedTransformer",
    "EasyTransformer": "use HookedTransformer",
    "loading_from_pretrained": "use HookedTransformer.from_pretrained or neuron_lens.loading",
    "components": "use model.blocks[i].attn and so on, or start_at_layer and stop_at_layer to run some blocks",
    "get_dataset": "load data with the datasets library",
    "make_pile_data_loader": "use evals.make_text_loader over texts of your own",
    "make_owt_data_loader": "use evals.make_text_loader over texts of your own",
    "make_wiki_data_loader": "use evals.make_text_loader over texts of your own",
    "make_code_data_loader": "use evals.make_text_loader over texts of your own",
    "download_file_from_hf": "use huggingface_hub",
}


class _Stand(ModuleType):
    """A module that finds its names in ours when they are first used."""

    def __init__(self, name: str, below: str, offered: dict[str, str], whole: str | None) -> None:
        super().__init__(name, f"neuron_lens in place of {name}")
        self._below, self._offered, self._whole = below, offered, whole
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._offered:
            return getattr(importlib.import_module(self._offered[name]), name)
        if self._whole is not None:
            module = importlib.import_module(self._whole)
            if hasattr(module, name):
                return getattr(module, name)
        known = sorted(self._offered)
        reason = _INSTEAD.get(name, f"it offers {', '.join(known)}" if known else "see its documentation")
        raise AttributeError(
            f"neuron_lens stands in for {self.__name__} and does not offer {name!r}: {reason}"
        )


def install_as_transformer_lens() -> ModuleType:
    """Let `import transformer_lens` mean this library, in this process. Returns the module.

    Offers what code for TransformerLens 1.x to 3.x uses; anything else raises with what to use instead. Calling it
    twice does nothing more. Raises NeuronLensError when the real package is loaded already.
    """
    loaded = sys.modules.get("transformer_lens")
    if isinstance(loaded, _Stand):
        return loaded
    if loaded is not None:
        raise NeuronLensError(
            "transformer_lens is loaded already: call install_as_transformer_lens() before anything imports it"
        )
    root = _Stand("transformer_lens", "", _MODULES[""], None)
    root.__dict__["__version__"] = "3.9.0"
    sys.modules["transformer_lens"] = root
    for name in [*(n for n in _MODULES if n), *_WHOLE]:
        stand = _Stand(f"transformer_lens.{name}", name, _MODULES.get(name, {}), _WHOLE.get(name))
        sys.modules[stand.__name__] = stand
        if (
            name not in _MODULES[""]
        ):  # `transformer_lens.HookedTransformer` is the class first, as it always was
            setattr(root, name, stand)
    return root
