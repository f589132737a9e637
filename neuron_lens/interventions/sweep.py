"""Sweeps: one metric of many interventions, exact, and many times faster than one run after another."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from neuron_lens.errors import RequestError
from neuron_lens.files.atomic import atomic_path
from neuron_lens.hooks import TransformerHooks
from neuron_lens.interventions.declared import Intervention
from neuron_lens.interventions.grid import Cell, Grid, as_grid
from neuron_lens.interventions.metrics import AnyMetric, Columns, bind_metrics, vocab_read
from neuron_lens.interventions.runs import weights_hash
from neuron_lens.interventions.sweep_plan import Job, jobs_of, takes_from_elsewhere
from neuron_lens.interventions.sweep_result import SweepResult
from neuron_lens.interventions.sweep_run import SweepRunner
from neuron_lens.interventions.tensors import tensor_digest

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["sweep"]

SECONDS_BETWEEN_SAVES = 10.0


def sweep(
    model: Transformer,
    tokens: Tensor,
    cells: Grid | Iterable[Intervention | Sequence[Intervention] | TransformerHooks],
    metric: AnyMetric | Mapping[str, AnyMetric],
    *,
    pad: Tensor | None = None,
    logits_at: Columns = None,
    reference_tokens: Tensor | None = None,
    reference_pad: Tensor | None = None,
    autoencoders: Mapping[str, Any] | None = None,
    memory_budget: int = 1 << 30,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SweepResult:
    """The metric of the run under each cell's interventions: what running every cell alone gives, to float rounding.

    What makes it fast: work below a cell's first touched layer and before its first touched position is done once for
    all cells; cells share passes as batch rows; logits are made only where the metric reads them.

    Args:
        tokens: [batch, pos]. pad: true where a column is padding.
        cells: a `grid`, or a list of cells, each an intervention, several, or `TransformerHooks`.
        metric: a `Metric`, or a function of logits [batch, columns, d_vocab] that returns one number a row (or one
            for all rows); or several by name.
        logits_at: the columns that plain functions are given (an index, a slice, or a long tensor [batch] or
            [batch, columns]); None gives all, which costs the most.
        reference_tokens: prompts whose metric counts as the full effect, for `SweepResult.normalised`.
        autoencoders: what `EditLatents` names.
        memory_budget: bytes that activations may take, the clean run's included and the weights left out.
        path: keep results in this file; a sweep that is interrupted resumes from it.
        progress: show a progress bar.

    Raises:
        RequestError: before any work starts: a cell that touches nothing or does not fit, a metric that gives no number
            a row, a budget too small for one cell, a file that belongs to another sweep.
    """
    given = as_grid(cells)
    _check_prompts(tokens, reference_tokens)
    vocab = vocab_read(metric)
    metrics = bind_metrics(metric, tokens, pad, logits_at, vocab=vocab)
    users = any(isinstance(cell, TransformerHooks) or takes_from_elsewhere(cell) for cell in given.cells)
    runner = SweepRunner(model, tokens, pad, metrics, memory_budget, autoencoders, vocab=vocab, whole=users)
    with torch.no_grad():
        jobs = jobs_of(given, model, tokens, pad, runner.stop, autoencoders)
        groups = list(runner.groups(jobs))  # plans everything, and refuses a budget that is too small
        baseline = runner.baseline()
        reference = None
        if reference_tokens is not None:
            bound = bind_metrics(metric, reference_tokens, reference_pad, logits_at, vocab=vocab)
            other = SweepRunner(model, reference_tokens, reference_pad, bound, memory_budget, vocab=vocab)
            reference = other.baseline()
        values = {name: value.new_zeros(len(jobs), value.numel()) for name, value in baseline.items()}
        done = torch.zeros(len(jobs), dtype=torch.bool)
        store = None if path is None else _Store(path, _fingerprint(model, tokens, pad, given, list(metrics)))
        if store is not None:
            store.load(values, done)
        _settle([job for job in jobs if not runner.shows(job)], baseline, values, done)
        with tqdm(total=len(jobs), initial=int(done.sum()), disable=not progress, unit="cell") as bar:
            try:
                for group in groups:
                    group.jobs = [job for job in group.jobs if not done[job.index]]
                    if not group.jobs:
                        continue
                    for index, measured in runner.run(group).items():
                        for name, value in measured.items():
                            values[name][index] = value
                        done[index] = True
                        bar.update()
                    if store is not None:
                        store.save(values, done, often=False)
            finally:
                if store is not None:
                    store.save(values, done)
    return SweepResult(given.axes, values, baseline, reference)


def _check_prompts(tokens: Tensor, reference: Tensor | None) -> None:
    if tokens.dim() != 2:
        raise RequestError(f"tokens must be [batch, pos]; got {list(tokens.shape)}")
    if reference is not None and reference.shape != tokens.shape:
        raise RequestError(
            f"the reference prompts are {list(reference.shape)} and the prompts {list(tokens.shape)}: they must align "
            f"position by position; choose prompts of equal length"
        )


def _settle(jobs: list[Job], baseline: dict[str, Tensor], values: dict[str, Tensor], done: Tensor) -> None:
    """Cells that change nothing a metric can see have the baseline's value."""
    for job in jobs:
        for name, value in baseline.items():
            values[name][job.index] = value
        done[job.index] = True


def _fingerprint(
    model: Transformer, tokens: Tensor, pad: Tensor | None, given: Grid, metrics: list[str]
) -> str:
    """What a results file belongs to. Functions (metrics, hooks) count by their names and places only."""
    digest = hashlib.sha256(weights_hash(model).encode())
    digest.update(tensor_digest(tokens).encode())
    digest.update((tensor_digest(pad) if pad is not None else "").encode())
    digest.update(
        repr((list(given.axes), [list(map(str, labels)) for labels in given.axes.values()], metrics)).encode()
    )
    for cell in given.cells:
        digest.update(_cell_text(cell).encode())
    return digest.hexdigest()


def _cell_text(cell: Cell) -> str:
    if isinstance(cell, TransformerHooks):
        return repr(cell)
    return " ".join(part.content_hash() for part in cell)


class _Store:
    """The results file of a sweep that can be resumed: values and which cells are done."""

    def __init__(self, path: str | os.PathLike[str], fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self._saved = time.monotonic()

    def load(self, values: dict[str, Tensor], done: Tensor) -> None:
        """Fill in what an earlier, interrupted call of the same sweep has done."""
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                if (file.metadata() or {}).get("fingerprint") != self.fingerprint:
                    raise RequestError(
                        f"{self.path} holds another sweep (other weights, tokens, cells or metrics); "
                        f"choose another path, or delete it"
                    )
                done.copy_(file.get_tensor("done"))
                for name, value in values.items():
                    value.copy_(file.get_tensor(f"values.{name}"))
        except (SafetensorError, OSError) as error:
            raise RequestError(
                f"{self.path} cannot be read as the results of a sweep: {error}; delete it"
            ) from None

    def save(self, values: dict[str, Tensor], done: Tensor, *, often: bool = True) -> None:
        """Write everything anew, atomically; with often=False at most every few seconds."""
        if not often and time.monotonic() - self._saved < SECONDS_BETWEEN_SAVES:
            return
        self._saved = time.monotonic()
        tensors = {f"values.{name}": value.cpu().contiguous() for name, value in values.items()}
        with atomic_path(self.path) as temporary:
            save_file({**tensors, "done": done}, temporary, metadata={"fingerprint": self.fingerprint})
