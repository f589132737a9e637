"""Scripts written for TransformerLens 1.x to 3.x, run on this library.

`install_as_transformer_lens()` makes `import transformer_lens`, and the submodules people import, resolve to ours in
this process. It is opt in, and refuses to hide the real package once that is loaded.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType

from neuron_lens.errors import NeuronLensError

__all__ = ["install_as_transformer_lens"]

_FACE = "neuron_lens.faces.hooked_transformer"

_ROOT = {
    "HookedTransformer": f"{_FACE}.model",
    "HookedTransformerConfig": f"{_FACE}.config",
    "ActivationCache": f"{_FACE}.activation_cache",
    "FactoredMatrix": "neuron_lens.weights",
    "HookedTransformerKeyValueCache": f"{_FACE}.kv_cache",
    "TransformerLensKeyValueCache": f"{_FACE}.kv_cache",
    "SVDInterpreter": f"{_FACE}.svd_interpreter",
    "HookedRootModule": f"{_FACE}.root_module",
}
_OUTPUTS = dict.fromkeys(("Output", "Loss", "LossPerToken", "SingleLoss"), f"{_FACE}.forward")
_HOOKS = {
    "HookPoint": f"{_FACE}.hook_point",
    "LensHandle": f"{_FACE}.hook_point",
    "HookFunction": f"{_FACE}.hook_point",
    "HookedRootModule": f"{_FACE}.root_module",
    "NamesFilter": f"{_FACE}.name_filter",
}
_PARTS = ("Attention", "Embed", "MLP", "PosEmbed", "Unembed")
_COMPONENTS = dict.fromkeys(_PARTS, f"{_FACE}.weight_views")
_COMPONENTS["TransformerBlock"] = f"{_FACE}.block_view"
# Names that mean one class of ours: the module, and what the class is called there.
_RENAMED = {
    "TransformerLensKeyValueCache": "HookedTransformerKeyValueCache",
    "CanBeUsedAsMLP": "MLP",
    "GatedMLP": "MLP",
    "GroupedQueryAttention": "Attention",
    "AbstractAttention": "Attention",
}
_RENAMED |= dict.fromkeys(("LayerNorm", "LayerNormPre", "RMSNorm", "RMSNormPre"), "Norm")
_COMPONENTS |= dict.fromkeys(
    (n for n in _RENAMED if n != "TransformerLensKeyValueCache"), f"{_FACE}.weight_views"
)

# Module of transformer_lens -> the names it offers and the module of ours that has each.
_MODULES: dict[str, dict[str, str]] = {
    "": _ROOT,
    "hook_points": _HOOKS,
    "HookedRootModule": {"HookedRootModule": f"{_FACE}.root_module"},
    "HookedTransformer": {**_ROOT, **_HOOKS, **_OUTPUTS},
    "HookedTransformerConfig": {"HookedTransformerConfig": f"{_FACE}.config"},
    "config": {"HookedTransformerConfig": f"{_FACE}.config"},
    "config.hooked_transformer_config": {"HookedTransformerConfig": f"{_FACE}.config"},
    "ActivationCache": {"ActivationCache": f"{_FACE}.activation_cache"},
    "FactoredMatrix": {"FactoredMatrix": "neuron_lens.weights"},
    "past_key_value_caching": {"HookedTransformerKeyValueCache": f"{_FACE}.kv_cache"},
    "cache": {"TransformerLensKeyValueCache": f"{_FACE}.kv_cache"},
    "cache.key_value_cache": {"TransformerLensKeyValueCache": f"{_FACE}.kv_cache"},
    "components": _COMPONENTS,
    "components.mlps": {},
    "components.mlps.can_be_used_as_mlp": {"CanBeUsedAsMLP": f"{_FACE}.weight_views"},
    "components.mlps.mlp": {"MLP": f"{_FACE}.weight_views"},
    "components.mlps.gated_mlp": {"GatedMLP": f"{_FACE}.weight_views"},
    "components.transformer_block": {"TransformerBlock": f"{_FACE}.block_view"},
    "components.attention": {"Attention": f"{_FACE}.weight_views"},
    "SVDInterpreter": {"SVDInterpreter": f"{_FACE}.svd_interpreter"},
}
# These resolve to a module of ours as a whole.
_WHOLE = dict.fromkeys(("utils", "utilities"), f"{_FACE}.utils")
_WHOLE |= {name: f"{_FACE}.{name}" for name in ("evals", "head_detector", "patching", "train")}
# Parts of `utilities` that people import from.
_UTILITIES = (
    "activation_functions attribute_utils components_utils defaults_utils devices exploratory_utils hf_utils"
)
_UTILITIES += " initialization_utils lm_utils logits_utils matrix parameter_swap slice tensors tokenize_utils"
_WHOLE |= dict.fromkeys((f"utilities.{name}" for name in _UTILITIES.split()), f"{_FACE}.utils")

# What people look for and we do not offer -> what to use instead.
_INSTEAD = {
    "HookedEncoder": "encoder models are not offered",
    "HookedEncoderDecoder": "encoder-decoder models are not offered",
    "HookedAudioEncoder": "audio models are not offered",
    "BertNextSentencePrediction": "encoder models are not offered",
    "TransformerBridge": "use HookedTransformer",
    "TransformerBridgeConfig": "use HookedTransformerConfig",
    "model_bridge": "use HookedTransformer",
    "EasyTransformer": "use HookedTransformer",
    "loading_from_pretrained": "use HookedTransformer.from_pretrained or neuron_lens.loading",
    "loading": "use HookedTransformer.from_pretrained or neuron_lens.loading",
    "pretrained": "use HookedTransformer.from_pretrained, or its hf_model= for a model in memory",
    "weight_processing": "use model.process_weights_ or neuron_lens.weights",
    "factories": "use HookedTransformer",
    "conversion_utils": "hooks see tensors as the engine has them",
    "tools": "use neuron_lens.analysis, neuron_lens.interventions and the methods of ActivationCache",
    "lit": "use neuron_lens.report for pages",
    "supported_models": "use `neuron-lens models`",
    "benchmarks": "use neuron_lens.loading.verify",
    "IOIDataset": "use utils.test_prompt, or a dataset of your own",
    "tracr": "tracr models are not offered",
    "tl_checkpoint_conversion": "HookedTransformer.load_state_dict takes classic state dicts",
    "enable_hf_retry": "use huggingface_hub's own settings",
    "clear_huggingface_cache": "use `hf cache` of huggingface_hub",
    "download_file_from_hf": "use huggingface_hub.hf_hub_download",
    "resolve_device_map": "several devices are not offered",
}
_INSTEAD |= dict.fromkeys(
    ("make_pile_data_loader", "make_owt_data_loader", "make_wiki_data_loader", "make_code_data_loader"),
    "use evals.make_text_loader over texts of your own",
)
_INSTEAD |= dict.fromkeys(
    ("ioi_eval", "mmlu_eval", "make_mmlu_data_loader", "evaluate"),
    "it needs a download: use evals.evaluate_on_dataset over evals.make_text_loader",
)


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
            return getattr(importlib.import_module(self._offered[name]), _RENAMED.get(name, name))
        if self._whole is not None:
            module = importlib.import_module(self._whole)
            if hasattr(module, name):
                return getattr(module, name)
        raise AttributeError(self.refusal(name))

    def refusal(self, name: str) -> str:
        """Why a name is not here, and what to use instead."""
        known = set(self._offered)
        if self._whole is not None:
            known = set(getattr(importlib.import_module(self._whole), "__all__", ()))
        known |= {
            each.rpartition(".")[2] for each in (*_MODULES, *_WHOLE) if each.rpartition(".")[0] == self._below
        }
        reason = _INSTEAD.get(name, f"it offers {', '.join(sorted(known - {''}))}")
        return f"neuron_lens stands in for {self.__name__} and does not offer {name!r}: {reason}"


class _Refusal(MetaPathFinder):
    """Says, for a submodule of transformer_lens that we do not offer, what to use instead."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """Nothing for other packages; raises ModuleNotFoundError below the stand-in."""
        if not fullname.startswith("transformer_lens.") or not isinstance(
            sys.modules.get("transformer_lens"), _Stand
        ):
            return
        # without name=: Python would take the error of `from transformer_lens import x` for its own, and drop what it says
        above, _, name = fullname.rpartition(".")
        stand = sys.modules.get(above)
        raise ModuleNotFoundError(
            stand.refusal(name) if isinstance(stand, _Stand) else f"{above} is not offered by neuron_lens"
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
    for name in sorted({*(n for n in _MODULES if n), *_WHOLE}):
        stand = _Stand(f"transformer_lens.{name}", name, _MODULES.get(name, {}), _WHOLE.get(name))
        sys.modules[stand.__name__] = stand
        above, _, last = name.rpartition(".")
        parent = sys.modules[f"transformer_lens.{above}" if above else "transformer_lens"]
        # `transformer_lens.HookedTransformer` is the class first, as it always was
        if last not in _MODULES.get(above, {}):
            setattr(parent, last, stand)
    sys.meta_path.insert(0, _Refusal())
    return root
