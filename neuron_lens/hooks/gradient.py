"""Gradient hooks: a function of a gradient becomes a forward hook, through an identity autograd function.

The identity copies its input, so that a later hook may still edit its output in place: autograd refuses
in-place edits of views that a custom function returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuron_lens.hooks.chain import Hook, Hooks, Site, SiteAware, describe

__all__ = ["GradientHook", "grad_hook_wrapper"]


class _IdentityWithGradientHook(torch.autograd.Function):
    """Identity going forward; going backward, the gradient passes through a `GradientHook`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, hook: Hooks, context: dict[str, Any], site: Site) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.hook, ctx.context, ctx.site = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # A copy: autograd may hand the same tensor to another branch, and hooks may edit what they are given.
        return ctx.hook._run(gradient.clone(), ctx.context, ctx.site), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()


class GradientHook(SiteAware):
    """The forward hook that `grad_hook_wrapper` makes. Compared by the gradient hook it holds."""

    def __init__(self, grad_hook: Hook) -> None:
        self._chain = Hooks([grad_hook], name="gradient")

    @property
    def grad_hook(self) -> Hook:
        """The wrapped hook, which sees gradients."""
        return next(iter(self._chain))

    @property
    def name(self) -> str:
        """The wrapped hook's own name."""
        return f"gradient of {describe(self.grad_hook)}"

    def __call__(self, x: Tensor, **context: Any) -> Tensor:
        return self._run(x, context, self._chain._site)

    def _run(self, x: Tensor, context: dict[str, Any], site: Site) -> Tensor:
        if not self.acts_at(context.get("layer")):
            return x
        result: Tensor = _IdentityWithGradientHook.apply(x, self._chain, context, site)  # type: ignore[no-untyped-call]
        return result

    def is_empty(self) -> bool:
        return self._chain.is_empty()

    def acts_at(self, layer: int | None) -> bool:
        return self._chain.acts_at(layer)

    def layers_named(self) -> set[int]:
        return self._chain.layers_named()

    def tree_lines(self, indent: int = 0) -> list[str]:
        return self._chain.tree_lines(indent)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GradientHook) and bool(self.grad_hook == other.grad_hook)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GradientHook({describe(self.grad_hook)})"


def grad_hook_wrapper(grad_hook: Hook) -> GradientHook:
    """Turn `grad_hook(gradient, **context) -> Tensor | None` into a forward hook.

    The forward hook leaves its tensor unchanged; when gradients flow back through it, `grad_hook` sees the
    gradient with the same context as forward hooks, and may return a replacement (None keeps the gradient).
    Works under double backward, torch.func.grad, vjp, jvp and vmap, and activation checkpointing.
    """
    return GradientHook(grad_hook)
