"""Tensors as data: compared and hashed by content, stored by digest, never silently changed.

`TensorData` wraps one tensor for a frozen model; `Activations` is a set of them by site and layer, the source that
patches take from. Knows no intervention.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema
from torch import Tensor

from neuron_lens.errors import HookError, RequestError, did_you_mean

__all__ = ["Activations", "TensorData", "tensor_digest"]

Place = tuple[str, int | None]


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, in hexadecimal."""
    plain = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TensorData:
    """One tensor that may be a field of a frozen model. Not copied; reading it after an in-place edit raises.

    >>> TensorData(torch.ones(2)) == TensorData(torch.ones(2))
    True
    """

    __slots__ = ("_digest", "_tensor", "_version")

    def __init__(self, value: Tensor | TensorData | float | Iterable[Any]) -> None:
        if isinstance(value, TensorData):
            value = value.tensor
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float32)
        self._tensor = tensor.detach()
        self._version = -1 if tensor.is_inference() else self._tensor._version
        self._digest: str | None = None

    @property
    def tensor(self) -> Tensor:
        """The tensor itself. Raises HookError when somebody edited it in place since it was handed over."""
        if self._version >= 0 and self._tensor._version != self._version:
            raise HookError(
                "a tensor held by an intervention was edited in place after it was given; give a copy (x.clone())"
            )
        return self._tensor

    @property
    def digest(self) -> str:
        """SHA-256 of dtype, shape and content."""
        if self._digest is None:
            self._digest = tensor_digest(self.tensor)
        return self._digest

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorData):
            return NotImplemented
        return self._tensor is other._tensor or self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"TensorData({str(self._tensor.dtype).removeprefix('torch.')} {list(self._tensor.shape)})"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda x: {"tensor": x.digest}),
        )

    @classmethod
    def _validated(cls, value: Any) -> TensorData:
        if isinstance(value, TensorData):
            return value
        if isinstance(value, Tensor | int | float | list | tuple) and not isinstance(value, bool):
            return cls(value)
        raise ValueError(f"expected a tensor, a number or a list of numbers, got {type(value).__name__}")


class Activations(Mapping[Place, Tensor]):
    """Activations of one run by site and layer: `activations["attn.v_out", 3]`, `activations["logits", None]`.

    Made from any mapping with keys `(path, layer)`, or `path` outside the blocks: a `Recording`, a dict, another
    Activations. Tensors [batch, pos, …] in the site's axes are shared, not copied.

    Raises:
        RequestError: a key or value of another kind.
    """

    __slots__ = ("_entries",)

    def __init__(self, given: Mapping[Any, Any]) -> None:
        if not isinstance(given, Mapping):
            raise RequestError(
                f"activations must be a mapping (site path, layer) -> tensor; got {type(given).__name__}"
            )
        self._entries: dict[Place, TensorData] = {}
        for key in given:
            place = key if isinstance(key, tuple) else (key, None)
            value = given.entry(key) if isinstance(given, Activations) else given[key]
            if len(place) != 2 or not isinstance(place[0], str) or not isinstance(place[1], int | None):
                raise RequestError(f"activations are keyed by (site path, layer); got {key!r}")
            if not isinstance(value, Tensor | TensorData):
                raise RequestError(f"activations[{key!r}] must be a tensor; got {type(value).__name__}")
            self._entries[place] = TensorData(value) if isinstance(value, Tensor) else value

    def entry(self, key: Place) -> TensorData:
        """The wrapped tensor at a site and layer. Raises RequestError naming what is there when it is not."""
        if key not in self._entries:
            have = [shown_place(place) for place in self._entries]
            raise RequestError(
                f"the source has no activation {shown_place(key)!r}; {did_you_mean(shown_place(key), have)}"
            )
        return self._entries[key]

    def narrowed(self, path: str, layers: Iterable[int | None]) -> Activations:
        """Only one site at some layers; the tensors stay shared."""
        return Activations({(path, layer): self.entry((path, layer)) for layer in layers})

    def __getitem__(self, key: Place | str) -> Tensor:
        return self.entry(key if isinstance(key, tuple) else (key, None)).tensor

    def __contains__(self, key: object) -> bool:
        return (key if isinstance(key, tuple) else (key, None)) in self._entries

    def __iter__(self) -> Iterator[Place]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Activations) and (self is other or self._entries == other._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"Activations of {len(self)} tensors: {', '.join(shown_place(place) for place in self)}"

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(cls._stored)
        )

    @classmethod
    def _validated(cls, value: Any) -> Activations:
        if isinstance(value, Activations):
            return value
        return cls(value)

    def _stored(self) -> dict[str, list[tuple[str, int | None, str]]]:
        ordered = sorted(
            self._entries.items(), key=lambda item: (item[0][0], -1 if item[0][1] is None else item[0][1])
        )
        return {"activations": [(site, layer, data.digest) for (site, layer), data in ordered]}


def shown_place(place: Place) -> str:
    """A site and layer for messages: `attn.v_out, layer 3`."""
    site, layer = place
    return site if layer is None else f"{site}, layer {layer}"
