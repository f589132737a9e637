"""Metrics of logits, one number a row: what a sweep or an attribution measures.

A metric says which columns it reads, so that only those are unembedded. All take padding into account: positions are
absolute (0 is a row's first real token) or counted from the row's last real token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError

__all__ = [
    "BoundMetric",
    "CrossEntropy",
    "KLDivergence",
    "LogitDifference",
    "Metric",
    "OfLogits",
    "TokenLogit",
    "TokenProbability",
    "TokenRank",
    "bind_metrics",
    "vocab_read",
]

Columns = int | slice | Tensor | None


@dataclass(frozen=True, eq=False)
class BoundMetric:
    """A metric for certain prompts.

    columns: columns it reads [batch, columns]; None for all. value: logits at those [batch, columns, d_vocab] ->
    [batch], or a scalar when it is a function that averages over rows.
    """

    name: str
    columns: Tensor | None
    value: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor) -> Tensor:
        """The metric of logits at the columns it reads. Raises RequestError when it is not one number a row."""
        value = self.value(logits)
        if not isinstance(value, Tensor):
            value = torch.as_tensor(value, dtype=torch.float32)
        if value.shape not in ((logits.shape[0],), (), (1,)):
            raise RequestError(
                f"the metric {self.name!r} returned a tensor of shape {list(value.shape)} for {logits.shape[0]} rows; "
                f"it must return one number for each row, or one for all"
            )
        return value.reshape(-1)


class Metric:
    """Base of metrics. `metric(logits, tokens, pad)` gives one number a row from logits of all columns."""

    name: str = "metric"

    @property
    def vocab(self) -> Tensor | None:
        """Vocabulary entries whose logits it reads, [entries]; None for all."""
        return None

    def among(self, vocab: Tensor) -> Metric:
        """The same metric of logits of some vocabulary entries only. vocab: [entries], sorted, with all it reads."""
        raise RequestError(f"metric {self.name!r} reads the logits of the whole vocabulary")

    def bind(self, tokens: Tensor, pad: Tensor | None) -> BoundMetric:
        """The metric for these prompts [batch, pos]. Raises RequestError when it does not fit them."""
        raise NotImplementedError

    def __call__(self, logits: Tensor, tokens: Tensor, pad: Tensor | None = None) -> Tensor:
        """One number for each row. logits: [batch, pos, d_vocab]."""
        bound = self.bind(tokens, pad)
        if bound.columns is None:
            return bound(logits)
        return bound(logits.gather(1, bound.columns[:, :, None].expand(-1, -1, logits.shape[-1])))


@dataclass(frozen=True, eq=False)
class OfLogits(Metric):
    """Any function of logits [batch, columns, d_vocab] -> [batch], or a scalar.

    columns: which columns it is given (an index, a slice, or a long tensor [batch] or [batch, columns]); None for all.
    """

    function: Callable[[Tensor], Tensor]
    columns: Columns = None
    name: str = "metric"

    def bind(self, tokens: Tensor, pad: Tensor | None) -> BoundMetric:
        rows, length = tokens.shape[:2]
        if self.columns is None:
            return BoundMetric(self.name, None, self.function)
        if isinstance(self.columns, Tensor):
            columns = self.columns.to(tokens.device).reshape(rows, -1)
        else:
            chosen = [self.columns] if isinstance(self.columns, int) else list(range(length)[self.columns])
            columns = torch.tensor(chosen, device=tokens.device, dtype=torch.long).expand(rows, -1)
        columns = torch.where(columns < 0, columns + length, columns)
        if columns.numel() == 0 or int(columns.min()) < 0 or int(columns.max()) >= length:
            raise RequestError(
                f"metric {self.name!r}: columns {self.columns!r} are not in prompts of {length} columns"
            )
        return BoundMetric(self.name, columns, self.function)


class _AtPosition(Metric):
    """Base of metrics of the logits at one position of each row."""

    def __init__(self, position: int | Tensor, name: str) -> None:
        self.position, self.name = position, name

    def _value(self, logits: Tensor) -> Tensor:
        """logits [batch, d_vocab] -> [batch]"""
        raise NotImplementedError

    def bind(self, tokens: Tensor, pad: Tensor | None) -> BoundMetric:
        return BoundMetric(
            self.name,
            columns_of(self.position, tokens, pad)[:, None],
            lambda logits: self._value(logits[:, 0]),
        )


class LogitDifference(_AtPosition):
    """Logit of the correct token minus that of the wrong one (mean, where a row has several of either).

    Args:
        correct, wrong: token ids: one for all rows, [batch], or [batch, several].
        position: where: -1 is the row's last real token; an int or a long tensor [batch].
    """

    def __init__(
        self,
        correct: int | Tensor,
        wrong: int | Tensor,
        position: int | Tensor = -1,
        *,
        name: str = "logit_difference",
    ) -> None:
        super().__init__(position, name)
        self.correct, self.wrong = torch.as_tensor(correct), torch.as_tensor(wrong)

    @property
    def vocab(self) -> Tensor | None:
        return torch.cat((self.correct.flatten(), self.wrong.flatten())).unique()

    def among(self, vocab: Tensor) -> Metric:
        correct, wrong = (torch.searchsorted(vocab, given) for given in (self.correct, self.wrong))
        return LogitDifference(correct, wrong, self.position, name=self.name)

    def _value(self, logits: Tensor) -> Tensor:
        correct, wrong = (_picked(logits, tokens, self.name) for tokens in (self.correct, self.wrong))
        return correct.mean(-1) - wrong.mean(-1)


class TokenLogit(_AtPosition):
    """Logit of a token. token: one id for all rows, [batch], or [batch, several], whose mean is taken."""

    def __init__(self, token: int | Tensor, position: int | Tensor = -1, *, name: str = "logit") -> None:
        super().__init__(position, name)
        self.token = torch.as_tensor(token)

    @property
    def vocab(self) -> Tensor | None:
        return self.token.flatten().unique()

    def among(self, vocab: Tensor) -> Metric:
        return TokenLogit(torch.searchsorted(vocab, self.token), self.position, name=self.name)

    def _value(self, logits: Tensor) -> Tensor:
        return _picked(logits, self.token, self.name).mean(-1)


class _AgainstAll(TokenLogit):
    """Base of metrics that compare a token with the whole vocabulary."""

    @property
    def vocab(self) -> Tensor | None:
        return None


class TokenProbability(_AgainstAll):
    """Probability of a token (of several, [batch, several]: that it is one of them), or its natural logarithm with
    `log=True`."""

    def __init__(
        self,
        token: int | Tensor,
        position: int | Tensor = -1,
        *,
        log: bool = False,
        name: str = "probability",
    ) -> None:
        super().__init__(token, position, name=name)
        self.log = log

    def _value(self, logits: Tensor) -> Tensor:
        logs = _picked(logits.float().log_softmax(-1), self.token, self.name).logsumexp(-1)
        return logs if self.log else logs.exp()


class TokenRank(_AgainstAll):
    """Rank of a token among all: 0 when it is the most probable; of several, [batch, several], the best one's. Tokens
    with an equal logit do not count. Has no gradient."""

    def __init__(self, token: int | Tensor, position: int | Tensor = -1, *, name: str = "rank") -> None:
        super().__init__(token, position, name=name)

    def _value(self, logits: Tensor) -> Tensor:
        best = _picked(logits, self.token, self.name).amax(-1, keepdim=True)
        return (logits > best).sum(-1).float()


class CrossEntropy(Metric):
    """Mean next-token loss of each row, in nats, over its real tokens."""

    name = "loss"

    def bind(self, tokens: Tensor, pad: Tensor | None) -> BoundMetric:
        if tokens.shape[1] < 2:
            raise RequestError("the loss of a prompt needs at least two tokens")
        real = torch.ones_like(tokens, dtype=torch.bool) if pad is None else ~pad
        counted = real[:, 1:] & real[:, :-1]
        if bool((~counted).all(-1).any()):
            raise RequestError("a row has fewer than two real tokens: it has no loss")
        columns = torch.arange(tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape[0], -1)

        def loss(logits: Tensor) -> Tensor:
            logs = logits.float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
            return -torch.where(counted, logs, 0.0).sum(-1) / counted.sum(-1)

        return BoundMetric(self.name, columns, loss)


class KLDivergence(Metric):
    """KL(reference ‖ run) of the next-token distributions, in nats, mean over a row's real tokens or at one position.

    reference: logits of the reference run, [batch, pos, d_vocab].
    """

    name = "kl"

    def __init__(self, reference: Tensor, position: int | Tensor | None = None) -> None:
        self.reference, self.position = reference.detach(), position

    def bind(self, tokens: Tensor, pad: Tensor | None) -> BoundMetric:
        if self.reference.shape[:2] != tokens.shape:
            raise RequestError(
                f"the reference logits are for prompts {list(self.reference.shape[:2])}, these are {list(tokens.shape)}"
            )
        if self.position is None:
            columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
            counted = torch.ones_like(tokens, dtype=torch.bool) if pad is None else ~pad
        else:
            columns = columns_of(self.position, tokens, pad)[:, None]
            counted = torch.ones_like(columns, dtype=torch.bool)
        gathered = self.reference.gather(1, columns[:, :, None].expand(-1, -1, self.reference.shape[-1]))
        reference = gathered.float().log_softmax(-1)

        def divergence(logits: Tensor) -> Tensor:
            kl = (reference.exp() * (reference - logits.float().log_softmax(-1))).sum(-1)
            return torch.where(counted, kl, 0.0).sum(-1) / counted.sum(-1)

        return BoundMetric(self.name, columns, divergence)


def columns_of(position: int | Tensor, tokens: Tensor, pad: Tensor | None) -> Tensor:
    """The column of a position in each row, [batch]. Raises RequestError when a row does not have it."""
    rows, length = tokens.shape[:2]
    real = torch.ones(rows, length, dtype=torch.bool, device=tokens.device) if pad is None else ~pad
    wanted = torch.as_tensor(position, device=tokens.device).expand(rows)
    count = real.sum(-1)
    absolute = torch.where(wanted < 0, wanted + count, wanted)
    outside = (absolute < 0) | (absolute >= count)
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise RequestError(
            f"position {int(wanted[row])} is not in row {row}, which has {int(count[row])} tokens"
        )
    places = torch.where(real, real.cumsum(-1) - 1, -1)
    return (places == absolute[:, None]).float().argmax(-1)


def _picked(values: Tensor, tokens: Tensor, name: str) -> Tensor:
    """values [batch, d_vocab] at each row's tokens. [batch, several]"""
    rows, vocabulary = values.shape
    chosen = tokens.to(values.device)
    if chosen.dim() == 0:
        chosen = chosen.expand(rows)
    if chosen.shape[0] != rows:
        raise RequestError(
            f"metric {name!r}: tokens for {chosen.shape[0]} rows were given, but there are {rows}"
        )
    chosen = chosen.reshape(rows, -1)
    if int(chosen.min()) < 0 or int(chosen.max()) >= vocabulary:
        wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
        raise RequestError(f"metric {name!r}: token id {wrong} is outside the vocabulary of {vocabulary}")
    return values.gather(1, chosen)


AnyMetric = Metric | Callable[..., Any]


def by_name(metric: AnyMetric | Mapping[str, AnyMetric]) -> Mapping[str, AnyMetric]:
    """One metric or several by name. Raises RequestError when there is none."""
    named = metric if isinstance(metric, Mapping) else {getattr(metric, "name", None) or "metric": metric}
    if not named:
        raise RequestError("no metric was given")
    return named


def vocab_read(metric: AnyMetric | Mapping[str, AnyMetric]) -> Tensor | None:
    """All vocabulary entries that some metric reads, [entries] sorted; None for the whole vocabulary."""
    read: list[Tensor] = []
    for one in by_name(metric).values():
        entries = one.vocab if isinstance(one, Metric) else None
        if entries is None:
            return None
        read.append(entries)
    return torch.cat(read).unique()


def bind_metrics(
    metric: AnyMetric | Mapping[str, AnyMetric],
    tokens: Tensor,
    pad: Tensor | None,
    columns: Columns = None,
    *,
    vocab: Tensor | None = None,
) -> dict[str, BoundMetric]:
    """One metric or several by name, for these prompts.

    columns: what plain functions are given, as in `OfLogits`. vocab: the vocabulary entries whose logits there will be,
    as `vocab_read` gives them; None for all.
    """
    named = by_name(metric)
    bound = {}
    for name, one in named.items():
        if not isinstance(one, Metric):
            if not callable(one):
                raise RequestError(
                    f"metric {name!r} must be a Metric or a function of logits; got {type(one).__name__}"
                )
            one = OfLogits(one, columns, name=name)
        if vocab is not None:
            one = one.among(vocab)
        made = one.bind(tokens, pad)
        bound[name] = BoundMetric(name, made.columns, made.value)
    return bound
