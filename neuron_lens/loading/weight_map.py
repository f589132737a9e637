"""From a checkpoint's tensors to a model's parameters, by a definition's rows.

Everything is checked on names and shapes before the first tensor is put into the model: tensors no row knows, parameters
no tensor fills, shapes that contradict the config. All of them are named at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neuron_lens.errors import CheckpointError
from neuron_lens.loading.definitions import Definition, TensorRule
from neuron_lens.loading.transforms import apply_transforms
from neuron_lens.transformer import Transformer

__all__ = ["Filling", "fill", "plan_filling"]

_SHOWN = 8


@dataclass(frozen=True)
class Filling:
    """Some tensors of the checkpoint (one, or one for each expert) that become some parameters."""

    rule: TensorRule
    sources: tuple[str, ...]
    targets: tuple[str, ...]


def plan_filling(names: Iterable[str], definition: Definition, source: str) -> list[Filling]:
    """Which tensors become which parameters.

    Raises CheckpointError naming every tensor that no row of the definition maps, and every parameter that two tensors
    would fill.
    """
    groups: dict[tuple[str, ...], dict[int, str]] = {}
    rules: dict[tuple[str, ...], TensorRule] = {}
    unmapped, twice = [], []
    for name in names:
        found = _matching_rule(name, definition)
        if found is None:
            unmapped.append(name)
            continue
        rule, match = found
        if not rule.targets:
            continue
        numbers = match.groupdict()
        targets = tuple(
            target.replace("{layer}", str(int(numbers.get("layer", 0)))) for target in rule.targets
        )
        group = groups.setdefault(targets, {})
        item = int(numbers.get("item", 0))
        if item in group or rules.setdefault(targets, rule) is not rule:
            twice.append(f"{name} and {group[min(group)]} (both {targets[0]})")
        group[item] = name
    problems = []
    if unmapped:
        problems.append(f"no row of model_defs/{definition.path.name} maps {_listed(unmapped)}")
    if twice:
        problems.append(f"two tensors fill one parameter: {_listed(twice)}")
    for targets, group in groups.items():
        if rules[targets].stacks and sorted(group) != list(range(len(group))):
            problems.append(f"{targets[0]} lacks parts: of those counted from 0 there are {sorted(group)}")
    if problems:
        raise CheckpointError(f"{source} does not fit {definition.title}: " + "; ".join(problems))
    return [
        Filling(rules[targets], tuple(group[item] for item in sorted(group)), targets)
        for targets, group in groups.items()
    ]


def fill(
    model: Transformer,
    fillings: list[Filling],
    get: Callable[[str, bool], Tensor],
    convert: Callable[[Tensor], Tensor],
    source: str,
) -> None:
    """Put tensors into a model that stands on the meta device.

    get: reads a tensor by name; true where only copies of it are kept. convert: puts a parameter in its final dtype and place.

    Raises CheckpointError naming all parameters that are missing, surplus, or of a shape that contradicts the config.
    """
    expected = {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    _check_complete(model, fillings, expected, source)
    filled: dict[str, Tensor] = {}
    wrong: list[str] = []
    for filling in fillings:
        tensors = [get(name, filling.rule.copies) for name in filling.sources]
        try:
            made = apply_transforms(tensors, filling.rule.transforms, model.config)
        except (ValueError, RuntimeError) as error:
            wrong.append(f"{filling.sources[0]}: {error}")
            continue
        del tensors
        for target, tensor in zip(filling.targets, made, strict=True):
            if tuple(tensor.shape) != expected[target]:
                wrong.append(
                    f"{filling.sources[0]} gives {target} the shape {list(tensor.shape)}, the config {list(expected[target])}"
                )
            elif not wrong:
                filled[target] = convert(tensor)
    if wrong:
        raise CheckpointError(f"{source}: shapes contradict config.json: {_listed(wrong)}")
    if model.config.tied:
        _check_tied(filled, source)
    model.load_state_dict(filled, strict=False, assign=True)
    if model.config.tied:
        model.unembed.weight = model.embed.weight


def _matching_rule(name: str, definition: Definition) -> tuple[TensorRule, re.Match[str]] | None:
    bare = next((name[len(prefix) :] for prefix in definition.prefixes if name.startswith(prefix)), name)
    for rule in definition.tensors:
        if match := rule.regex.fullmatch(bare) or rule.regex.fullmatch(name):
            return rule, match
    return None


def _check_complete(
    model: Transformer, fillings: list[Filling], expected: dict[str, tuple[int, ...]], source: str
) -> None:
    given = {target: filling for filling in fillings for target in filling.targets}
    needed = set(expected) - ({"unembed.weight"} if model.config.tied else set())
    missing, surplus = sorted(needed - set(given)), sorted(set(given) - set(expected))
    problems = []
    if missing:
        problems.append(f"no tensor fills {_listed(missing)}")
    if surplus:
        named = [
            f"{given[target].sources[0]} (which {given[target].rule.place} makes {target})"
            for target in surplus
        ]
        problems.append(f"the model of its config.json has no place for {_listed(named)}")
    if problems:
        raise CheckpointError(f"{source} does not fit its config.json: " + "; ".join(problems))


def _check_tied(filled: dict[str, Tensor], source: str) -> None:
    own = filled.pop("unembed.weight", None)
    if own is not None and not torch.equal(own, filled["embed.weight"]):
        raise CheckpointError(
            f"{source}: config.json says that the unembedding is the embedding (tie_word_embeddings), but the weights "
            f"hold two different ones; set tie_word_embeddings to false to load both"
        )


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
