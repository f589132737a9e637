"""The result of a sweep: numbers on labelled axes, with the baseline they are compared to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import MissingExtraError, RequestError, did_you_mean

if TYPE_CHECKING:
    import pandas

__all__ = ["SweepResult"]


class SweepResult:
    """Metrics over the axes of a grid.

    Attributes:
        axes: name of each axis and its labels, in order.
        metrics: names of the metrics.

    A metric's name may be left out everywhere when there is only one.
    """

    def __init__(
        self,
        axes: Mapping[str, tuple[Any, ...]],
        values: Mapping[str, Tensor],
        baseline: Mapping[str, Tensor],
        reference: Mapping[str, Tensor] | None,
    ) -> None:
        self.axes = dict(axes)
        self.metrics = tuple(values)
        self._shape = tuple(len(labels) for labels in self.axes.values())
        self._values = {name: value.reshape(*self._shape, -1) for name, value in values.items()}
        self._baseline = dict(baseline)
        self._reference = None if reference is None else dict(reference)

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis."""
        return self._shape

    def values(self, metric: str | None = None) -> Tensor:
        """The metric of each cell, averaged over rows. [*axes]"""
        return self._values[self._name(metric)].mean(-1)

    def per_example(self, metric: str | None = None) -> Tensor:
        """The metric of each cell and row. [*axes, batch]

        Raises RequestError when the metric is a function that returned one number for all rows.
        """
        return self._values[self._name(metric)]

    def baseline(self, metric: str | None = None) -> float:
        """The metric of the run without interventions, averaged over rows."""
        return float(self._baseline[self._name(metric)].mean())

    def reference(self, metric: str | None = None) -> float:
        """The metric of the reference prompts. Raises RequestError when the sweep had none."""
        name = self._name(metric)
        if self._reference is None:
            raise RequestError("this sweep had no reference: give sweep(…, reference_tokens=…)")
        return float(self._reference[name].mean())

    def effect(self, metric: str | None = None) -> Tensor:
        """values − baseline. [*axes]"""
        return self.values(metric) - self.baseline(metric)

    def normalised(self, metric: str | None = None) -> Tensor:
        """(values − baseline) / (reference − baseline): 0 is no effect, 1 the reference's value. [*axes]

        Raises RequestError when there is no reference, or it equals the baseline.
        """
        span = self.reference(metric) - self.baseline(metric)
        if span == 0:
            raise RequestError(
                "the reference prompts have the same metric as the prompts: there is nothing to normalise by"
            )
        return self.effect(metric) / span

    def interval(
        self, metric: str | None = None, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Percentile bootstrap interval of the mean effect over rows: its low and its high end, each [*axes].

        Rows are drawn together for all cells, and each row's own baseline is subtracted (Efron, 1979).

        Raises:
            RequestError: there is only one row, or the metric gave one number for all rows.
        """
        name = self._name(metric)
        effects = self._values[name] - self._baseline[name]
        rows = effects.shape[-1]
        if rows < 2:
            raise RequestError(
                "an interval needs several rows, and a metric that returns one number for each"
            )
        if not 0 < confidence < 1:
            raise RequestError(f"confidence must be between 0 and 1, got {confidence}")
        drawn = torch.randint(rows, (resamples, rows), generator=torch.Generator().manual_seed(seed))
        weights = torch.zeros(resamples, rows).scatter_add_(1, drawn, torch.ones(resamples, rows)) / rows
        means = effects.double() @ weights.double().T  # [*axes, resamples]
        tail = (1 - confidence) / 2
        ends = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=-1)
        return ends[0].float(), ends[1].float()

    def transposed(self, axes: Sequence[str]) -> SweepResult:
        """The same with its axes in another order. Raises RequestError for other names than its axes'."""
        if sorted(axes) != sorted(self.axes):
            raise RequestError(f"the axes are {', '.join(self.axes)}; cannot order them as {', '.join(axes)}")
        order = [list(self.axes).index(name) for name in axes]
        values = {name: value.permute(*order, -1) for name, value in self._values.items()}
        return SweepResult({name: self.axes[name] for name in axes}, values, self._baseline, self._reference)

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each cell: its labels, and each metric's value and effect. Needs pandas."""
        try:
            import pandas
        except ImportError:
            raise MissingExtraError("pandas", "report", "a table of a sweep") from None
        cells = list(itertools.product(*self.axes.values()))
        frame = {name: [cell[i] for cell in cells] for i, name in enumerate(self.axes)}
        for metric in self.metrics:
            frame[metric] = self.values(metric).flatten().tolist()
            frame[f"{metric}_effect"] = self.effect(metric).flatten().tolist()
        return pandas.DataFrame(frame)

    def to_svg(self, metric: str | None = None, *, normalised: bool = False) -> str:
        """A heatmap of the effect: the first axis down, the others across."""
        from neuron_lens.report.charts import heatmap_svg

        name = self._name(metric)
        effect = self.normalised(name) if normalised else self.effect(name)
        matrix = effect.reshape(self._shape[0], -1) if self._shape else effect.reshape(1, 1)
        (first, rows), *others = list(self.axes.items()) or [("cell", ("",))]
        across = [
            " ".join(map(str, labels)) for labels in itertools.product(*(labels for _, labels in others))
        ]
        words = "normalised effect" if normalised else "effect"
        columns = " × ".join(axis for axis, _ in others)
        return heatmap_svg(
            [[float(value) for value in row] for row in matrix],
            [f"{first} {label}" for label in rows],
            across,
            title=f"{name}: {first}" + (f" by {columns}" if columns else ""),
            value_label=f"{words} on {name}",
        )

    def _repr_html_(self) -> str:
        return "\n".join(self.to_svg(metric) for metric in self.metrics)

    def __repr__(self) -> str:
        axes = ", ".join(f"{name} {len(labels)}" for name, labels in self.axes.items())
        figures = "; ".join(f"{name} baseline {self.baseline(name):.4g}" for name in self.metrics)
        return f"SweepResult [{axes}]: {figures}"

    def _name(self, metric: str | None) -> str:
        if metric is None and len(self.metrics) == 1:
            return self.metrics[0]
        if metric is None:
            raise RequestError(f"this sweep has several metrics; name one of {', '.join(self.metrics)}")
        if metric not in self.metrics:
            raise RequestError(f"this sweep has no metric {metric!r}; {did_you_mean(metric, self.metrics)}")
        return metric
