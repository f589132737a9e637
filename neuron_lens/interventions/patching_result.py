"""What activation patching returns when more than one number a patch is wanted: means, their errors, effects and tests."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from neuron_lens.errors import MissingExtraError, RequestError, did_you_mean
from neuron_lens.interventions.sweep_result import SweepResult

if TYPE_CHECKING:
    import pandas

__all__ = ["PatchingResult", "index_frame", "sign_flip_pvalues"]


class PatchingResult:
    """Metrics of patches over the index axes, with each row's own numbers.

    `result["name"]` is the part of one metric; of a single metric the name may be left out everywhere.

    Args:
        sweep: the metrics of all patches.
        baselines: each metric of the corrupted run without a patch, [batch], or [1] of functions that average themselves.
        index: the indices patched, one row each, and the names of their entries.
        metric: only this one; None for all.
    """

    def __init__(
        self,
        sweep: SweepResult,
        baselines: Mapping[str, Tensor],
        index: tuple[Sequence[Sequence[int]], Sequence[str]],
        metric: str | None = None,
    ) -> None:
        self._sweep, self._baselines, self._index, self._metric = sweep, dict(baselines), index, metric

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics."""
        return self._sweep.metrics if self._metric is None else (self._metric,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each index axis."""
        return self._sweep.shape

    def __getitem__(self, metric: str) -> PatchingResult:
        if metric not in self.metrics:
            raise RequestError(f"there is no metric {metric!r}; {did_you_mean(metric, self.metrics)}")
        return PatchingResult(self._sweep, self._baselines, self._index, metric)

    @property
    def per_example(self) -> Tensor:
        """The metric of each patch and row. [*axes, batch]"""
        return self._sweep.per_example(self._one())

    @property
    def mean(self) -> Tensor:
        """The metric of each patch, averaged over rows. [*axes]"""
        return self._sweep.values(self._one())

    @property
    def baseline(self) -> float:
        """The metric of the corrupted run without a patch, averaged over rows."""
        return float(self._baselines[self._one()].mean())

    @property
    def effect(self) -> Tensor:
        """mean − baseline. [*axes]"""
        return self.mean - self.baseline

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean over rows, from the unbiased variance. [*axes]

        Raises RequestError when there is one row, or the metric gave one number for all rows.
        """
        values = _several(self.per_example)
        return values.std(-1) / values.shape[-1] ** 0.5

    def normalized(self, clean_baseline: float | Tensor) -> Tensor:
        """effect / (clean_baseline − baseline): 0 is the corrupted run, 1 the clean one. [*axes]

        Raises RequestError when both runs have the same metric.
        """
        span = float(torch.as_tensor(clean_baseline).float().mean()) - self.baseline
        if span == 0:
            raise RequestError(
                "the clean and the corrupted run have the same metric: there is nothing to normalise by"
            )
        return self.effect / span

    def bootstrap_ci(
        self, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap interval of the effect: its low and its high end, each [*axes]. See `SweepResult.interval`."""
        return self._sweep.interval(self._one(), confidence=confidence, resamples=resamples, seed=seed)

    def permutation_pvalue(self, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
        """Two-sided p-value of the effect by flipping the signs of rows' effects: `sign_flip_pvalues`. [*axes]

        Raises RequestError when there is one row, or the metric gave one number for all rows.
        """
        effects = self.per_example.cpu() - self._baselines[self._one()].cpu()
        return sign_flip_pvalues(_several(effects), resamples=resamples, seed=seed)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each patch: its index, and of each metric mean and effect. Needs pandas."""
        frame = index_frame(*self._index)
        for metric in self.metrics:
            one = self[metric]
            frame[metric] = one.mean.flatten().tolist()
            frame[f"{metric}_effect"] = one.effect.flatten().tolist()
        return frame

    def __repr__(self) -> str:
        return f"PatchingResult {list(self.shape)} of {', '.join(self.metrics)}"

    def _one(self) -> str:
        """The metric meant. Raises RequestError when there are several."""
        if len(self.metrics) > 1:
            raise RequestError(f"there are several metrics; choose result[name] of {', '.join(self.metrics)}")
        return self.metrics[0]


def sign_flip_pvalues(effects: Tensor, *, resamples: int = 10_000, seed: int = 0) -> Tensor:
    """Two-sided p-values of mean effects [*axes, batch] by flipping the signs of rows. [*axes]

    All sign patterns are tried when there are at most `resamples` of them; else that many random ones, with the
    observed one counted in (Fisher's randomisation test).
    """
    effects = effects.double().cpu()
    rows = effects.shape[-1]
    if 2**rows <= resamples:
        patterns = list(itertools.product((1.0, -1.0), repeat=rows))
        signs, counted = torch.tensor(patterns, dtype=torch.float64), 0
    else:
        drawn = torch.rand(resamples, rows, generator=torch.Generator().manual_seed(seed))
        signs, counted = torch.where(drawn < 0.5, 1.0, -1.0).double(), 1
    means = (effects @ signs.T).abs() / rows
    observed = effects.mean(-1, keepdim=True).abs()
    # what differs by rounding alone is a tie
    as_large = (means >= observed * (1 - 1e-9)).sum(-1) + counted
    return (as_large / (len(signs) + counted)).float()


def index_frame(rows: Sequence[Sequence[int]], names: Sequence[str]) -> pandas.DataFrame:
    """Indices as a table. Needs pandas."""
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "report", "a table of indices") from None
    return pandas.DataFrame([list(row) for row in rows], columns=list(names))


def _several(values: Tensor) -> Tensor:
    """values [*axes, batch], of several rows. Raises RequestError otherwise."""
    if values.shape[-1] < 2:
        raise RequestError("this needs several rows, and a metric that gives one number for each")
    return values
