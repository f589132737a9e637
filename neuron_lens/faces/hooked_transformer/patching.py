"""Activation patching under its classic names, over `neuron_lens.interventions.patching`.

`get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, patching_metric)` and its siblings, for a HookedTransformer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal

from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_transformer.activation_cache import ActivationCache
from neuron_lens.faces.hooked_transformer.model import HookedTransformer
from neuron_lens.interventions import patching as below

_OVER_ENGINE = [name for name in below.__all__ if name.startswith(("get_act_patch_", "generic_"))]
_AS_THEY_ARE = [name for name in below.__all__ if name.endswith("_setter") or name == "make_df_from_ranges"]


def get_act_patch_direct_path(
    model: HookedTransformer,
    corrupted_tokens: Any,
    clean_cache: ActivationCache,
    corrupted_cache: ActivationCache | None,
    patching_metric: Any,
    src_layer: int,
    src_head: int,
    component: Literal["q", "k", "v"] = "q",
    verbose: bool = False,
    **options: Any,
) -> Tensor:
    """One head's clean output into each later head's queries, keys or values only. [layer, head or kv_head]

    corrupted_cache: has its classic place among the arguments; the corrupted run is made anew, so None will do.
    verbose: show a progress bar. options, errors: as of `neuron_lens.interventions.get_act_patch_direct_path`.
    """
    run = _over_engine(below.get_act_patch_direct_path)
    options = {"progress": verbose, **options}
    table: Tensor = run(
        model, corrupted_tokens, clean_cache, patching_metric, src_layer, src_head, component, **options
    )
    return table


def __getattr__(name: str) -> Any:
    if name in _AS_THEY_ARE:
        return getattr(below, name)
    if name in _OVER_ENGINE:
        return _over_engine(getattr(below, name))
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(f"patching has no {name!r}; {did_you_mean(name, __dir__())}")


def __dir__() -> list[str]:
    return [*_OVER_ENGINE, *_AS_THEY_ARE]


def _over_engine(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, taking a HookedTransformer in the model's place."""

    @wraps(function)
    def patch(
        model: HookedTransformer,
        corrupted_tokens: Any,
        clean_cache: ActivationCache,
        patching_metric: Any,
        *rest: Any,
        **options: Any,
    ) -> Any:
        held = [name for name, handles in model.list_hooks(dir="fwd").items() if handles]
        if held:
            raise RequestError(
                f"patching runs the model without the hooks that are on it ({held[0]}, …); reset_hooks() first"
            )
        if not clean_cache.has_batch_dim:
            raise RequestError("patching needs a clean cache with its batch dimension")
        return function(model.engine, corrupted_tokens, clean_cache, patching_metric, *rest, **options)

    return patch
