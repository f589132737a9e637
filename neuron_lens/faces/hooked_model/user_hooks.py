"""Users' own hooks: components by their module names or by paths of the tree, and the forms of function they take."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.hooks import AtLayers, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["COMPONENTS", "UserHook"]

# Module name with .input or .output, below a block or outside -> site.
COMPONENTS: dict[str, str] = {
    "embed.output": "emb.tok",
    "block.input": "resid.torso.pre_attn",
    "block.output": "resid.torso.post_mlp",
    "block.attn.input": "resid.torso.post_ln_attn",
    "block.attn.q.output": "attn.q",
    "block.attn.k.output": "attn.k",
    "block.attn.v.output": "attn.v",
    "block.attn.out.input": "attn.v_out",
    "block.attn.output": "resid.torso.delta_attn",
    "block.mlp.input": "resid.torso.post_ln_mlp",
    "block.mlp.output": "resid.torso.delta_mlp",
    "ln_f.output": "resid.post_ln_f",
    "unembed.output": "logits",
}
# Names that Hugging Face's Llama-like models give the same modules.
RENAMED = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj.input": "attn.out.input",
    "self_attn.o_proj.output": "attn.output",
    "self_attn": "attn",
    "mlp.down_proj.output": "mlp.output",
    "embed_tokens": "embed",
    "lm_head": "unembed",
}


class UserHook:
    """One function at one component; a handle that `remove` takes out.

    component: a path of the tree (`resid.torso.post_mlp`, at every layer), or a module's name with .input or .output
        (`blocks.3.attn.output`, also `model.layers[3].self_attn.output`).
    function: takes the tensor (and the context it names: `fn(x, layer)`), or three or four arguments as torch's hooks do,
        `fn(module, args, output)` or `fn(module, args, kwargs, output)`, with the site's tensor as output. Returns the new
        tensor, or None to leave it.

    Raises RequestError for a component that does not exist, and for a function that takes something else.
    """

    def __init__(
        self, model: Transformer, component: str, function: Callable[..., Any], registry: list[UserHook]
    ) -> None:
        self.component, self.function, self._registry = component, function, registry
        self.path, self.layer = _site_of(component, model)
        self._hook = _as_hook(function, component, model, self.layer)

    def attach(self, hooks: TransformerHooks) -> None:
        """Append to a tree."""
        hook: Any = self._hook if self.layer is None else AtLayers(self.layer).append(self._hook)
        hooks.append_to_path(f"{self.path}.fwd", hook)

    def remove(self) -> None:
        """Take it out. Raises RequestError when it is gone already."""
        if not any(hook is self for hook in self._registry):
            raise RequestError(f"the hook at {self.component} is not registered; was it removed before?")
        self._registry[:] = [hook for hook in self._registry if hook is not self]


def _site_of(component: str, model: Transformer) -> tuple[str, int | None]:
    known = {site.path for site in TransformerHooks().sites()}
    if component in known:
        return component, None
    name = re.sub(r"\[(\d+)\]", r".\1", component).removeprefix("model.")
    match = re.fullmatch(r"(?:model\.|transformer\.)?(?:layers|blocks|h)\.(\d+)\.(.+)", name)
    rest = f"block.{match[2]}" if match else name
    for given, ours in RENAMED.items():
        rest = rest.replace(given, ours, 1) if given in rest else rest
    if rest not in COMPONENTS:
        raise RequestError(
            f"no component is called {component!r}; {did_you_mean(rest, [*COMPONENTS, *known])}"
        )
    layer = int(match[1]) if match else None
    if layer is not None and layer >= model.config.n_layers:
        raise RequestError(
            f"{component}: layer {layer} does not exist: the model has {model.config.n_layers}, from 0"
        )
    return COMPONENTS[rest], layer


def _as_hook(
    function: Callable[..., Any], component: str, model: Transformer, layer: int | None
) -> Callable[..., Any]:
    if not callable(function):
        raise RequestError(f"{component}: a hook must be a function; got {function!r:.60}")
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # builtins have no signature: they are given the tensor
        return function
    needed = [
        p
        for p in parameters
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    first = needed[0].name if needed else ""
    if len(needed) not in (3, 4) or first != "module":
        return function
    module = model if layer is None else model.blocks[layer]

    def as_torch_does(x: Tensor) -> Any:
        return function(module, (x,), x) if len(needed) == 3 else function(module, (x,), {}, x)

    return as_torch_does
