"""The cache: what forwards kept, by key, and how the caches of batches are joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor

from neuron_lens.analysis.position_groups import joined_means
from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.fields import newer_key

__all__ = ["ActivationCache"]

Aggregation = Callable[[Any, Any], Any]
# Same for all batches, or said of the cache as a whole.
SHARED = ("mapping_index", "metadata")
DESCRIBING = (*SHARED, "token_dict", "n_examples")


class ActivationCache(MutableMapping[str, Any]):
    """Activations by key: `cache["resid_out_3"]`, with `mapping_index`, `token_dict` and `metadata`.

    `cat` and `join` put batches after another, by these rules: tensors are concatenated along their first dimension; lists are
    joined; dicts of tensors (`last_layernorm`) and `token_dict` entry by entry; `avg_…` tensors become the mean weighted by
    `n_examples`, which is summed; `mapping_index` and `metadata` must be the same in all (with ragged rows
    mapping_index is a list with one entry a row, and joined). A rule registered for a prefix comes before
    these. Keys must be the same in all.

    Keys of the earlier generation (`values_3` for `values_L3`) find what they mean.
    """

    def __init__(self, values: dict[str, Any] | None = None) -> None:
        self._values: dict[str, Any] = dict(values or {})
        self._aggregations: dict[str, Aggregation] = {}
        self._waiting: list[ActivationCache] | None = None

    def __getitem__(self, key: str) -> Any:
        known = self._found(key)
        if known is None:
            raise KeyError(
                f"the cache has no {key!r}; {did_you_mean(str(key), self._values or ['(it is empty)'])}"
            )
        return self._values[known]

    def __setitem__(self, key: str, value: Any) -> None:
        if not isinstance(key, str):
            raise RequestError(f"keys of a cache are texts; got {key!r}")
        self._values[self._found(key) or key] = value

    def __delitem__(self, key: str) -> None:
        known = self._found(key)
        if known is None:
            raise KeyError(f"the cache has no {key!r}")
        del self._values[known]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._found(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def _found(self, key: str) -> str | None:
        if key in self._values:
            return key
        renamed = newer_key(key)
        return renamed if renamed in self._values else None

    def is_empty(self) -> bool:
        """True when it holds nothing but metadata."""
        return not set(self._values) - {"metadata"}

    def __add__(self, other: MutableMapping[str, Any]) -> ActivationCache:
        """Both caches' entries; the right one's where both have a key."""
        merged = ActivationCache({**self._values, **dict(other)})
        merged._aggregations = dict(self._aggregations)
        return merged

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors; returns self."""
        self._values = {key: _mapped(value, lambda x: x.to(device)) for key, value in self._values.items()}
        return self

    def cpu(self) -> Self:
        """Move all tensors to the CPU; returns self."""
        return self.to("cpu")

    def cuda(self) -> Self:
        """Move all tensors to the GPU; returns self."""
        return self.to("cuda")

    def add_metadata(self, **metadata: Any) -> Self:
        """Add entries to `metadata`; returns self."""
        self._values["metadata"] = {**self._values.get("metadata", {}), **metadata}
        return self

    def register_aggregation(self, prefix: str, rule: Aggregation) -> None:
        """Join keys that start with a prefix by `rule(old, new)`. Raises RequestError when the prefix has a rule."""
        if prefix in self._aggregations:
            raise RequestError(
                f"the prefix {prefix!r} has a rule already; remove_aggregation({prefix!r}) first"
            )
        self._aggregations[prefix] = rule

    def remove_aggregation(self, prefix: str) -> None:
        """Take a registered rule away. Raises RequestError when there is none."""
        if prefix not in self._aggregations:
            raise RequestError(f"no rule is registered for {prefix!r}")
        del self._aggregations[prefix]

    def cat(self, other: ActivationCache) -> Self:
        """Join another batch to this one in place; an empty cache takes over the other. Returns self.

        For many batches use `join` or `deferred_mode`, which copy each tensor once. Raises RequestError as `join` does.
        """
        if self._waiting is not None:
            self._waiting.append(other)
            return self
        if self.is_empty():
            self._values = {**self._values, **other._values}
            return self
        self._values = _joined([self, other], self._aggregations)
        return self

    @contextmanager
    def deferred_mode(self) -> Iterator[Self]:
        """Within the block `cat` only collects; what was collected is joined, each tensor copied once, when it ends.

        After an exception the cache is as it was before.
        """
        if self._waiting is not None:
            raise RequestError("deferred_mode is on already: end the block before another")
        self._waiting = []
        try:
            yield self
            waiting, self._waiting = self._waiting, None
            given: list[ActivationCache] = [*([] if self.is_empty() else [self]), *waiting]
            if given:
                self._values = {**self._values, **_joined(given, self._aggregations)}
        finally:
            self._waiting = None

    @classmethod
    def join(
        cls, caches: Iterable[ActivationCache], aggregations: dict[str, Aggregation] | None = None
    ) -> Self:
        """One cache of many batches.

        Raises RequestError when there are none, when keys differ, when mapping_index or metadata differ, or when tensors do not
        fit behind another.
        """
        given = list(caches)
        if not given:
            raise RequestError("there are no caches to join")
        rules = {**given[0]._aggregations, **(aggregations or {})}
        joined = cls(_joined(given, rules))
        joined._aggregations = rules
        return joined

    def map_to_dict(self, key: str) -> dict[Any, Any]:
        """The positions of one key by group: {group: tensor [batch, members, ...]}; a list of tensors when rows are ragged."""
        value, index = self[key], self["mapping_index"]
        if isinstance(index, list):
            return {
                group: [one[row[group]] for one, row in zip(value, index, strict=True)] for group in index[0]
            }
        return {group: value[:, where] for group, where in index.items() if group != "info"}

    def examples(self) -> int:
        """How many examples (rows) it holds."""
        if "n_examples" in self._values:
            return int(self._values["n_examples"])
        groups = self._values.get("token_dict")
        return len(next(iter(groups.values()))) if groups else 0

    def memory_size(self, key: str | None = None) -> int:
        """Bytes of the tensors under one key, or of all."""
        values = self._values.values() if key is None else [self[key]]
        return sum(x.numel() * x.element_size() for value in values for x in _tensors(value))

    def memory_tree(self, *, grouped: bool = True) -> str:
        """Keys with their sizes, the largest first; `grouped` puts layers and heads of a kind on one line."""
        sizes: dict[str, list[int]] = {}
        for key in self._values:
            name = _kind(key) if grouped else key
            sizes.setdefault(name, []).append(self.memory_size(key))
        ordered = sorted(sizes.items(), key=lambda item: -sum(item[1]))
        lines = [f"total: {_shown_bytes(self.memory_size())}"]
        for name, parts in ordered:
            if sum(parts):
                count = f" ({len(parts)} keys)" if len(parts) > 1 else ""
                lines.append(f"  {name}: {_shown_bytes(sum(parts))}{count}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"ActivationCache of {len(self)} keys, {self.examples()} examples, {_shown_bytes(self.memory_size())}"


def _joined(caches: list[ActivationCache], rules: dict[str, Aggregation]) -> dict[str, Any]:
    first = caches[0]
    for number, other in enumerate(caches[1:], 1):
        if other._values.keys() != first._values.keys():
            missing = sorted(first._values.keys() - other._values.keys())
            added = sorted(other._values.keys() - first._values.keys())
            raise RequestError(
                f"batch {number} has other keys than batch 0: it lacks {missing or 'none'} and adds {added or 'none'}"
            )
    counts = [cache.examples() for cache in caches]
    return {key: _joined_key(key, [c._values[key] for c in caches], counts, rules) for key in first._values}


def _joined_key(key: str, values: list[Any], counts: list[int], rules: dict[str, Aggregation]) -> Any:
    prefix = next((prefix for prefix in rules if key.startswith(prefix)), None)
    if prefix is not None:
        joined = values[0]
        for value in values[1:]:
            joined = rules[prefix](joined, value)
        return joined
    if key == "n_examples":
        return sum(values)
    if key in SHARED and not isinstance(values[0], list):
        wrong = next((number for number, value in enumerate(values) if value != values[0]), None)
        if wrong is not None:
            raise RequestError(
                f"{key} of batch {wrong} is {values[wrong]!r:.200}, that of batch 0 {values[0]!r:.200}: they cannot be joined; "
                f"for rows or batches of different length pass ragged=True, or average with avg=True"
            )
        return values[0]
    if key.startswith("avg_"):
        _same_shapes(key, values, 0)
        return joined_means(values, counts)
    return _behind(key, values)


def _behind(key: str, values: list[Any]) -> Any:
    """Values of a key one after another."""
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise RequestError(
            f"{key}: batches hold values of different kinds ({names}); make them the same in every batch"
        )
    value = values[0]
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return torch.stack(values)
        _same_shapes(key, values, 1)
        return torch.cat(values)
    if isinstance(value, dict):
        if any(other.keys() != value.keys() for other in values):
            raise RequestError(f"{key}: batches have different entries; name the same groups in every batch")
        return {name: _behind(f"{key}[{name!r}]", [other[name] for other in values]) for name in value}
    if isinstance(value, list | tuple):
        return [entry for other in values for entry in other]
    return list(values)


def _same_shapes(key: str, values: list[Any], first: int) -> None:
    shapes = {tuple(value.shape[first:]) for value in values}
    if len(shapes) > 1:
        raise RequestError(
            f"{key}: batches have shapes {sorted(tuple(value.shape) for value in values)[:4]}, which do not fit behind another; "
            f"for prompts of different length pass ragged=True, or average with avg=True"
        )


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    return [_mapped(entry, change) for entry in value] if isinstance(value, list) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _tensors(entry)


def _kind(key: str) -> str:
    """A key without its layer and head: `head_out_L*H*`."""
    return "".join("*" if char.isdigit() else char for char in key).replace("**", "*")


def _shown_bytes(size: int) -> str:
    amount, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1024 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{int(amount)} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
