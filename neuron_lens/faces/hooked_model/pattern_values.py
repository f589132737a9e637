"""What is written into attention patterns or scores, cut to a row's queries and keys; the future stays unseen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.requests import Intervention

__all__ = ["PatternValues"]


@dataclass(frozen=True, eq=False)
class PatternValues:
    """Values of a request.

    label: the request's activation, for messages. tensor: a number, or [example, query, key].
    before: they are scores, before the softmax. added: they are added to what is there.
    """

    label: str
    tensor: Tensor
    before: bool
    added: bool

    @classmethod
    def of(cls, request: Intervention, *, before: bool) -> PatternValues:
        """The values a request gives, or takes from its source: all examples to resample, else their mean.

        Raises RequestError when the source lacks them, or they are no grids of queries and keys.
        """
        if request.does in ("mean", "resample"):
            tensor = _of_source(request, before)
        else:
            tensor = torch.as_tensor(request.patching_values, dtype=torch.float32)
        tensor = tensor[None] if tensor.dim() == 2 else tensor
        if tensor.dim() not in (0, 3):
            raise RequestError(
                f"{request.activation}: values are a number, [queries, keys] or [batch or 1, queries, keys]; got "
                f"{list(tensor.shape)}"
            )
        if bool(tensor.isnan().any()):
            raise RequestError(f"{request.activation}: the values hold NaN")
        return cls(request.activation, tensor.detach().cpu(), before, request.does == "add")

    @property
    def examples(self) -> int:
        """How many grids there are."""
        return 1 if self.tensor.dim() == 0 else self.tensor.shape[0]

    def at(
        self, example: int, queries: tuple[int, ...], keys: tuple[int, ...], longest: int, row: int
    ) -> Tensor:
        """One example's values at a row's queries and keys, [queries, keys].

        longest: positions of the longest row, which a grid of all positions covers.

        Raises RequestError when the grid has another size, lets a query see later keys, or leaves one nothing to look at.
        """
        q, k = torch.tensor(queries)[:, None], torch.tensor(keys)[None, :]
        future = k > q
        if self.tensor.dim() == 0:
            value = self.tensor.expand(future.shape)
        elif self.tensor.shape[1:] == future.shape:
            value = self.tensor[example]
        elif self.tensor.shape[1:] == (longest, longest):
            value = self.tensor[example][q, k]
        else:
            raise RequestError(
                f"{self.label}, row {row}: a grid of {len(queries)} queries and {len(keys)} keys, or of all {longest}, was "
                f"expected; got {list(self.tensor.shape[1:])}"
            )
        masked = -torch.inf if self.before and not self.added else 0.0
        # numbers fill what may be seen; so do scores that are added, for masked ones stay masked
        if self.tensor.dim() and not (self.before and self.added) and bool((value[future] != masked).any()):
            raise RequestError(
                f"{self.label}, row {row}: the values to write let a query see later keys; make those {masked:g}"
            )
        value = torch.where(future, masked, value)
        self._check_left(value, future, q, row)
        return value

    def _check_left(self, value: Tensor, future: Tensor, queries: Tensor, row: int) -> None:
        """Whether every query whose keys are all written keeps one: a softmax of nothing is undefined."""
        if not self.before or not bool(value.isneginf().any()):
            return
        covered = (~future).sum(1) > queries[:, 0]
        emptied = covered & value.isneginf().all(1)
        if bool(emptied.any()):
            raise RequestError(
                f"{self.label}, row {row}: query {int(queries[emptied][0])} is left with nothing to look at; leave it a score"
            )


def _of_source(request: Intervention, before: bool) -> Tensor:
    """Patterns or scores of a source [example, query, key]: their mean over examples, or all of them."""
    place = request.place
    key = f"{'scores' if before else 'pattern'}_L{place.layer}H{place.head}"
    source: Any = request.source
    found = f"avg_{key}" if request.does == "mean" and f"avg_{key}" in source else key
    if found not in source:
        raise RequestError(f"{request.activation}: the source has no {key!r}; extract it there")
    if not isinstance(source[found], Tensor):
        raise RequestError(
            f"{request.activation}: the source is ragged; extract it at equally many positions in each row"
        )
    tensor: Tensor = source[found].float()
    return tensor.mean(0, keepdim=True) if request.does == "mean" else tensor
