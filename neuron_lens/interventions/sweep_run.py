"""Running the plan of a sweep: one clean pass, then passes in which each row is a cell's example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtRows, TransformerHooks
from neuron_lens.interventions.cells_edit import CellsEdit, PromptFrame
from neuron_lens.interventions.metrics import BoundMetric
from neuron_lens.interventions.sweep_clean import CleanRun, SharedPrompts
from neuron_lens.interventions.sweep_plan import (
    AFTER_MIXING,
    Group,
    Job,
    Part,
    place_free,
    row_bytes,
)

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["SweepRunner"]

# More tokens than this in one product gain nothing on a CPU, and leave its caches.
TOKENS_AT_ONCE = 1536
# Fewer than this, and a pass costs as much as one of so many: it reads all weights either way.
MIN_TOKENS = 192


class SweepRunner:
    """Runs groups of jobs and gives each job's metrics."""

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        pad: Tensor | None,
        metrics: Mapping[str, BoundMetric],
        memory_budget: int,
        autoencoders: Mapping[str, Any] | None = None,
        *,
        vocab: Tensor | None = None,
        whole: bool = False,
    ) -> None:
        self.model, self.metrics, self.vocab = model, metrics, vocab
        self.prompts = SharedPrompts(tokens, pad)
        self.rows, self.length = tokens.shape
        self.columns = columns_read(metrics, self.rows, self.length, tokens.device)
        # nothing behind the last column read can matter; hooks of unknown reach see the whole prompt all the same
        whole |= self.columns is None or _depends_on_length(model)
        self.stop = self.length if self.columns is None or whole else int(self.columns.max()) + 1
        self.frame = PromptFrame(self.prompts, autoencoders)
        self.memory_budget = memory_budget
        self.clean: CleanRun | None = None
        self._carried: dict[Any, Any] = {}

    def start(self) -> CleanRun:
        """The clean run, made once."""
        if self.clean is None:
            self.clean = CleanRun(self.model, self.prompts, self.columns, self.vocab)
        return self.clean

    def baseline(self) -> dict[str, Tensor]:
        """Each metric of the unedited run, [rows] or [1]."""
        return self._measured(self.start().logits)

    def groups(self, jobs: list[Job]) -> Iterator[Group]:
        """Jobs in groups that fit the budget: those of one first column together, ordered by first layer.

        Neighbouring first columns share a group while few cells have them: a pass of a few tokens costs as much as
        one of many. Raises RequestError when the budget does not hold one cell.
        """
        touching = [job for job in jobs if self.shows(job)]
        touching.sort(key=lambda job: (job.splits_heads, -job.first, job.start, job.index))
        group: Group | None = None
        for job in touching:
            if group is None or not self._joins(group, job):
                if group is not None:
                    yield self._ordered(group)
                self.cells_at_once(job.first, job.opened)  # refused now, not when its turn comes
                group = Group(job.first, job.splits_heads)
            group.jobs.append(job)
            group.first = min(group.first, job.first)
            group.opened |= job.opened
        if group is not None:
            yield self._ordered(group)

    def _ordered(self, group: Group) -> Group:
        group.jobs.sort(key=lambda job: (job.start, job.index))
        return group

    def _joins(self, group: Group, job: Job) -> bool:
        if job.splits_heads != group.splits_heads:
            return False
        if job.first != group.first and len(group.jobs) * self.rows * (self.stop - group.first) >= MIN_TOKENS:
            return False
        return len(group.jobs) < self.cells_at_once(job.first, group.opened | job.opened)

    def cells_at_once(self, first: int, opened: frozenset[str] = frozenset()) -> int:
        """How many cells of a first column run together. opened: as in `Job`.

        Raises RequestError when not even one fits.
        """
        config, element = self.model.config, self.model.embed.weight.element_size()
        columns = self.stop - first
        kept = (
            config.n_layers + 1
        ) * config.d_model + 2 * config.n_layers * config.n_kv_heads * config.d_head
        read = self.length if self.columns is None else self.columns.shape[1]
        entries = config.d_vocab if self.vocab is None else self.vocab.numel()
        fixed = self.rows * (self.length * kept + read * entries) * element
        # logits and the softmax of a metric, of one cell at a time
        fixed += 3 * self.rows * read * entries * 4
        one = self.rows * row_bytes(config, columns, self.length, element, opened)
        if fixed + one > self.memory_budget:
            raise RequestError(
                f"a memory budget of {self.memory_budget:,} bytes is too small: the clean run takes {fixed:,} and one cell "
                f"{one:,}; raise memory_budget, take fewer rows at once, or read fewer columns (logits_at)"
            )
        return int(min((self.memory_budget - fixed) // one, max(1, TOKENS_AT_ONCE // (columns * self.rows))))

    def shows(self, job: Job) -> bool:
        """Whether a cell can change what any metric reads; if not, its value is the baseline's."""
        n_layers = self.model.config.n_layers
        if job.first >= self.stop:
            return False
        if self.columns is None or job.hooks is not None or job.start < n_layers - 1:
            return True
        if not all(part.path in AFTER_MIXING or part.layers == {n_layers} for part in job.parts):
            return True
        # behind the last mixing of positions, an edit changes the logits of its own columns only
        read = torch.zeros(self.rows, self.length, dtype=torch.bool, device=self.columns.device)
        read.scatter_(1, self.columns, True)
        return any(
            bool((read if part.mask is None else read & part.mask)[:, part.columns or slice(None)].any())
            for part in job.parts
        )

    def run(self, group: Group) -> dict[int, dict[str, Tensor]]:
        """Metrics of each job of a group, by the job's index."""
        clean, n_layers, first = self.start(), self.model.config.n_layers, group.first
        active, waiting = list[Job](), list(group.jobs)
        self._carried = {}
        results: dict[int, dict[str, Tensor]] = {}
        x: Tensor | None = None
        for layer in range(n_layers):
            joining = [job for job in waiting if job.start <= layer]
            waiting = waiting[len(joining) :]
            narrow = [job for job in joining if job.start >= 0 and job.last + 1 < self.stop]
            wide = [job for job in joining if job not in narrow]
            active += wide
            x = clean.joined(layer, x, first, self.stop, len(wide))
            if x is not None and layer == n_layers - 1:
                results |= self._read(x, active, first, layer)
                x, active = None, []
            elif x is not None:
                x = self._block(layer, x, active, first, self.stop)
            if narrow:
                x = self._narrow_entry(layer, narrow, x, first)
                active += narrow
        x = clean.joined(n_layers, x, first, self.stop, len(waiting))
        if x is not None:
            results |= self._read(x, active + waiting, first, n_layers)
        return results

    def _block(self, layer: int, x: Tensor, jobs: list[Job], first: int, stop: int) -> Tensor:
        """One block over some columns of the rows of some jobs."""
        out: Tensor = self.model(
            x,
            **self._pass(len(jobs), first, stop),
            hooks=self._hooks(jobs, [layer], first),
            start_at_layer=layer,
            stop_at_layer=layer + 1,
        )
        return out

    def _pass(self, cells: int, first: int, stop: int) -> dict[str, Any]:
        """What a pass over some columns of the rows of some cells is given beside its tensor."""
        run = self.prompts.run(cells, first, stop, self.model.config, self._carried)
        return {"run": run, "pad": run.pad, "kv_cache": self.start().prefix(first, cells)}

    def _narrow_entry(self, layer: int, jobs: list[Job], x: Tensor | None, first: int) -> Tensor:
        """Jobs whose first block changes only some columns: run on those, the rest is the clean stream."""
        last, clean = max(job.last for job in jobs) + 1, self.start()
        entering = clean.joined(layer, None, first, last, len(jobs))
        whole = clean.joined(layer + 1, x, first, self.stop, len(jobs))
        assert entering is not None and whole is not None, "there are jobs"
        changed = self._block(layer, entering, jobs, first, last)
        whole[-len(jobs) * self.rows :, : last - first] = changed
        return whole

    def _hooks(self, jobs: list[Job], layers: list[int], first: int) -> TransformerHooks | None:
        """One tree for all rows of a pass: parts that do the same thing in different places share one hook.

        layers: those that the pass runs; n_layers stands for the end.
        """
        at_layers = {*layers, *([-1] if 0 in layers else [])}
        shared: dict[tuple[Any, ...], list[tuple[int, Part]]] = {}
        tree = TransformerHooks()
        used = False
        for cell, job in enumerate(jobs):
            orders: dict[str, int] = {}
            for part in job.parts:
                if part.layers.isdisjoint(at_layers):
                    continue
                order = orders[part.path] = orders.get(part.path, -1) + 1
                what = part.intervention
                same = id(part) if what.depends_on_place() else tuple(map(id, place_free(what)))
                shared.setdefault((order, part.path, type(what), same), []).append((cell, part))
            if job.hooks is not None:
                added = [self._add_users_hooks(tree, job.hooks, layer, cell) for layer in layers]
                used |= any(added)
        for (_, path, _, _), parts in sorted(shared.items(), key=lambda item: item[0][0]):
            used = True
            edit = CellsEdit(parts, path, len(jobs), first, self.frame)
            tree.append_to_path(f"{path}.fwd", edit)
        return tree if used else None

    def _add_users_hooks(
        self, tree: TransformerHooks, hooks: TransformerHooks, layer: int, cell: int
    ) -> bool:
        rows = slice(cell * self.rows, (cell + 1) * self.rows)
        used = False
        n_layers = self.model.config.n_layers
        for site in hooks.hooked_sites():
            if not site.per_layer:
                early = site.path.startswith("emb.") or site.path == "resid.post_emb"
                if layer != (0 if early else n_layers):
                    continue
            elif layer >= n_layers or not site.acts_at(layer):
                continue
            for name, chain in (("fwd", site.fwd), ("fwd2", site.fwd2)):
                if len(chain):
                    tree.append_to_path(f"{site.path}.{name}", AtRows(rows).append(chain))
                    used = True
        return used

    def _read(self, x: Tensor, jobs: list[Job], first: int, layer: int) -> dict[int, dict[str, Tensor]]:
        """Metrics of each job, from what enters the last block or leaves it (layer n_layers).

        A few jobs at a time: logits are the widest tensors of all.
        """
        read = self.stop - first if self.columns is None else self.columns.shape[1]
        entries = self.model.config.d_vocab if self.vocab is None else self.vocab.numel()
        most = max(1, int(self.memory_budget / 8 // (4 * self.rows * read * entries)))
        results: dict[int, dict[str, Tensor]] = {}
        for begin in range(0, len(jobs), most):
            some = jobs[begin : begin + most]
            logits = self._logits(x[begin * self.rows :][: len(some) * self.rows], some, first, layer)
            for cell, job in enumerate(some):
                results[job.index] = self._measured(logits[cell * self.rows : (cell + 1) * self.rows])
        return results

    def _logits(self, x: Tensor, jobs: list[Job], first: int, layer: int) -> Tensor:
        """Logits at the columns read, [cells · rows, columns, entries]; columns before the first from the clean run."""
        n_layers, cells, clean = self.model.config.n_layers, len(jobs), self.start()
        columns = self.columns
        if columns is None:
            columns = torch.arange(self.length, device=x.device).expand(self.rows, -1)
        wanted = columns - first
        there = wanted >= 0
        if bool((wanted == wanted[:1]).all()):
            wanted = wanted[:, there[0]]
        wanted = wanted.clamp_min(0).repeat(cells, 1)
        given = self._pass(cells, first, self.stop) | {
            "hooks": self._hooks(jobs, [*range(layer, n_layers), n_layers], first),
            "start_at_layer": layer,
            "logits_of": self.vocab,
        }
        if layer == n_layers:
            given["kv_cache"] = None
        if all(job.hooks is None and all(n_layers not in p.layers for p in job.parts) for job in jobs):
            fresh: Tensor = self.model(x, logits_at=wanted, **given)
        else:  # hooks behind the blocks see every column of the pass
            logits = self.model(x, **given)
            fresh = logits.gather(1, wanted[:, :, None].expand(-1, -1, logits.shape[-1]))
        if bool(there.all()):
            return fresh
        whole = clean.logits.repeat(cells, 1, 1)
        if fresh.shape[1] < whole.shape[1]:
            whole[:, there[0]] = fresh
            return whole
        return torch.where(there.repeat(cells, 1)[:, :, None], fresh, whole)

    def _measured(self, logits: Tensor) -> dict[str, Tensor]:
        """Each metric of the logits of one cell at all columns read."""
        values = {}
        for name, metric in self.metrics.items():
            if metric.columns is None or self.columns is None or metric.columns is self.columns:
                given = logits
                if metric.columns is not None and self.columns is None:
                    given = logits.gather(1, metric.columns[:, :, None].expand(-1, -1, logits.shape[-1]))
            else:
                at = (self.columns[:, None, :] == metric.columns[:, :, None]).float().argmax(-1)
                given = logits.gather(1, at[:, :, None].expand(-1, -1, logits.shape[-1]))
            values[name] = metric(given).float()
        return values


def columns_read(
    metrics: Mapping[str, BoundMetric], rows: int, length: int, device: torch.device
) -> Tensor | None:
    """All columns that some metric reads, [rows, columns], each row's in order; None for all columns."""
    wanted = [metric.columns for metric in metrics.values()]
    if any(columns is None for columns in wanted):
        return None
    tensors = [columns for columns in wanted if columns is not None]
    if len(tensors) == 1:
        return tensors[0]
    mask = torch.zeros(rows, length, dtype=torch.bool, device=device)
    for columns in tensors:
        mask.scatter_(1, columns, True)
    most = int(mask.sum(-1).max())
    # rows that read fewer read some others too: every metric finds its own
    return mask.float().topk(most, -1).indices.sort(-1).values


def _depends_on_length(model: Transformer) -> bool:
    """Whether positions mean something else in a longer prompt: LongRoPE changes its factors with the length."""
    rotary = model.config.rotary
    return rotary is not None and rotary.scaling is not None and rotary.scaling.kind == "longrope"
