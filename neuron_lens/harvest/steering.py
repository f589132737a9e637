"""Making one unit stronger: to what strength, and what the model then writes.

Strengths of different units are compared by what they do: the strength is searched at which the next-token prediction
has moved, in the mean, by a given KL divergence from the intact one (Paulo et al. 2024, "Automatically interpreting
millions of features in large language models", intervention scoring; a binary search as in EleutherAI's Delphi).

    neurons, latents   set to mean + s (largest - mean), s growing from 0: features are clamped to multiples of their
                       largest activation in Templeton et al. 2024, "Scaling monosemanticity"
    directions         s (largest - mean) times the vector added, s growing from 0 (Turner et al. 2023, "Activation
                       addition"): projections are seldom near their mean, and setting them to it is a change of its own
    heads              what the head writes multiplied by 1 + s: it writes in no one direction, and so is steered where
                       it writes something (the mask variable of Michel et al. 2019, "Are sixteen heads really better
                       than one?", which is 0 where a head is ablated)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.harvest.ablation import WindowRun, divergences
from neuron_lens.harvest.settings import model_inputs
from neuron_lens.harvest.sources import DirectionSource, UnitSource
from neuron_lens.hooks import AtLayers, TransformerHooks
from neuron_lens.transformer import KVCache

__all__ = ["Range", "Steered", "continued", "steered_to", "steering"]

_DOUBLINGS, _HALVINGS = 12, 12
_CLOSE = 0.05  # of the target: near enough


@dataclass(frozen=True)
class Range:
    """A unit's mean and largest activation: its strengths are counted from the one in steps of what lies between."""

    mean: float
    largest: float


@dataclass(frozen=True, eq=False)
class Steered:
    """A unit made stronger in some texts.

    `strength`: what it is set to, of a direction how much of it is added, of a head the factor on what it writes.
    `log_probabilities` of the next token then `[row, d_vocab]`, and `divergence` KL(intact || steered) `[row]`, nats.
    """

    strength: float
    log_probabilities: Tensor
    divergence: NDArray[np.float64]


def steering(source: UnitSource, index: int, strength: float, where: Tensor) -> TransformerHooks:
    """Hooks that make a unit so strong where `where` `[batch, pos]` (or what broadcasts to it) is True; see the module."""
    if isinstance(source, DirectionSource):
        along = source.vectors[index]

        def add(x: Tensor) -> Tensor:
            change = torch.where(where, strength, 0.0).to(along)
            return (x.float() + change[..., None] * along).to(x.dtype)

        return TransformerHooks().append_to_path(f"{source.site}.fwd", AtLayers(source.layer).append(add))
    if source.kind != "head":
        return source.replacing(index, strength, where)

    def scale(x: Tensor) -> Tensor:
        x = x.clone()
        factor = torch.where(where, strength, 1.0).to(x)
        x[:, :, index] = x[:, :, index] * factor[..., None]
        return x

    return TransformerHooks().append_to_path(f"{source.site}.fwd", AtLayers(source.layer).append(scale))


def steered_to(
    source: UnitSource, index: int, run: WindowRun, where: Tensor, span: Range, target: float
) -> Steered:
    """The unit steered in the windows of `run` (which compares one place a window) until the mean divergence is
    `target` nats, to within a twentieth.

    Where no strength reaches it (what is written is bounded by a norm behind it), the one that comes nearest: the
    divergence says how near.
    """

    def at(scale: float) -> Steered:
        strength = _strength(source, span, scale)
        changed = run.changed(steering(source, index, strength, where))[:, 0]
        moved = divergences(run.intact[:, 0], changed).double().cpu().numpy()
        return Steered(strength, changed, moved)

    return _searched(at, target)


def _strength(source: UnitSource, span: Range, scale: float) -> float:
    if source.kind == "head":
        return 1.0 + scale
    step = scale * (span.largest - span.mean)
    return step if source.kind == "direction" else span.mean + step


def _searched(at: Callable[[float], Steered], target: float) -> Steered:
    """The steering of a scale at which the mean divergence is the target: doubled until beyond it, then halved."""
    low, high = 0.0, 1.0
    best = found = at(high)
    for _ in range(_DOUBLINGS):
        if _reached(found, target):
            break
        low, high = high, 2 * high
        found = at(high)
        best = min(best, found, key=lambda one: _off(one, target))
    best = min(best, found, key=lambda one: _off(one, target))
    if not _reached(found, target):
        return best
    for _ in range(_HALVINGS):
        if _off(best, target) <= _CLOSE * target:
            break
        middle = (low + high) / 2
        found = at(middle)
        low, high = (low, middle) if _reached(found, target) else (middle, high)
        best = min(best, found, key=lambda one: _off(one, target))
    return best


def _off(steered: Steered, target: float) -> float:
    moved = float(steered.divergence.mean())
    return abs(moved - target) if np.isfinite(moved) else np.inf


def _reached(steered: Steered, target: float) -> bool:
    # What overflows has gone beyond any target.
    return not steered.divergence.mean() < target


@torch.inference_mode()
def continued(
    source: UnitSource,
    prompts: Sequence[NDArray[np.int32]],
    hooks: Sequence[TransformerHooks | None],
    *,
    n_tokens: int,
    seed: int,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """What the model writes after each prompt, once for each tree of hooks: ids `[tree, prompt, token]`.

    Hooks work from the last token of the prompt on, in every pass over one column. Prompts that are too long lose their
    beginning. The draws are the same for every tree, so that only the hooks make a difference.
    Raises RequestError for a prompt of no token but the last.
    """
    model = source.model
    room = model.config.n_ctx - n_tokens - 2
    if room < 1:
        raise RequestError(
            f"continuations of {n_tokens} tokens leave no room for a prompt in the model's context of {model.config.n_ctx}"
        )
    kept = [prompt[-room:] for prompt in prompts]
    tokens, pad, first = model_inputs(model, [prompt[:-1] for prompt in kept])
    if min(first + len(prompt) for prompt in kept) < 2:
        raise RequestError("a prompt to continue has at least two tokens; got one of a single token")
    weight = model.embed.weight
    prefix = KVCache(model.config, len(tokens), tokens.shape[1], dtype=weight.dtype, device=weight.device)
    model(tokens, pad=pad if pad.any() else None, kv_cache=prefix, logits_at=-1)
    prefix.freeze()
    last = [[int(prompt[-1])] for prompt in kept]
    written = []
    for tree in hooks:
        made = model.sample(
            last,
            max_new_tokens=n_tokens,
            temperature=temperature,
            seed=seed,
            stop_at_eos=False,
            hooks=tree,
            prefix=prefix,
        )
        assert isinstance(made, list), "a list of prompts gives a list of generations"
        written.append([one.ids for one in made])
    return written
