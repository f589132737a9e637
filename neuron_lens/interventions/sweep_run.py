"""Running the plan of a sweep: one clean pass, then passes in which each row is a cell's example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.errors import RequestError
from neuron_lens.hooks import AtRows, Run, TransformerHooks
from neuron_lens.interventions.cells_edit import CellsEdit, PromptFrame
from neuron_lens.interventions.metrics import BoundMetric
from neuron_lens.interventions.sweep_plan import PATTERNS, Group, Job, Part, place_free, row_bytes
from neuron_lens.transformer import KVCache

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["CleanRun", "SweepRunner"]

# More tokens than this in one product gain nothing on a CPU, and leave its caches.
TOKENS_AT_ONCE = 1536
# Fewer than this, and a pass costs as much as one of so many: it reads all weights either way.
MIN_TOKENS = 192


class CleanRun:
    """What the unedited run leaves: the stream entering each block, keys and values, logits at the columns read.

    stream: n_layers + 1 tensors [rows, pos, d_model]; the last leaves the last block.
    """

    def __init__(
        self, model: Transformer, tokens: Tensor, pad: Tensor | None, columns: Tensor | None
    ) -> None:
        rows, length = tokens.shape
        weight = model.embed.weight
        self.cache = KVCache(model.config, rows, length, dtype=weight.dtype, device=tokens.device)
        hooks = TransformerHooks()
        kept = hooks.record("resid.torso.pre_attn")
        hooks.append_to_path("resid.torso.post_mlp.fwd2", self._keep_last)
        hooks.append_to_path("resid.post_emb.fwd2", self._keep_last)
        self.logits: Tensor = model(tokens, hooks=hooks, pad=pad, kv_cache=self.cache, logits_at=columns)
        self.stream = [kept["resid.torso.pre_attn", layer] for layer in range(model.config.n_layers)] + [
            self._last
        ]

    def _keep_last(self, x: Tensor) -> None:
        self._last = x

    def prefix(self, columns: int, cells: int) -> PrefixCache | None:
        """Keys and values of the first columns, for `cells` copies of all rows; None when there are no columns."""
        return PrefixCache(self.cache, columns, cells) if columns else None


class PrefixCache(KVCache):
    """A frozen cache of the first columns of another, whose rows are repeated as one block for each cell."""

    def __init__(self, whole: KVCache, columns: int, cells: int) -> None:
        self.capacity = self.length = columns
        self.frozen, self.positions = True, None
        self.batch = whole.batch * cells
        self._whole, self._cells = whole, cells

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self._behind(self._whole.keys[layer], keys), self._behind(self._whole.values[layer], values)

    def _behind(self, whole: Tensor, new: Tensor) -> Tensor:
        old = whole[:, :, : self.length]
        repeated = old.expand(self._cells, *old.shape).reshape(self.batch, *old.shape[1:])
        return torch.cat((repeated, new), 2)


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
        whole: bool = False,
    ) -> None:
        self.model, self.tokens, self.pad, self.metrics = model, tokens, pad, metrics
        self.rows, self.length = tokens.shape
        self.columns = columns_read(metrics, self.rows, self.length, tokens.device)
        # nothing behind the last column read can matter; hooks of unknown reach see the whole prompt all the same
        self.stop = (
            self.length if self.columns is None or whole or pad is not None else int(self.columns.max()) + 1
        )
        self.frame = PromptFrame(self.rows, self.length, pad, autoencoders)
        self.memory_budget = memory_budget
        self.clean: CleanRun | None = None

    def start(self) -> CleanRun:
        """The clean run, made once."""
        if self.clean is None:
            self.clean = CleanRun(self.model, self.tokens, self.pad, self.columns)
        return self.clean

    def baseline(self) -> dict[str, Tensor]:
        """Each metric of the unedited run, [rows] or [1]."""
        return self._measured(self.start().logits)

    def groups(self, jobs: list[Job]) -> Iterator[Group]:
        """Jobs in groups that fit the budget: those of one first column together, ordered by first layer.

        Neighbouring first columns share a group while few cells have them: a pass of a few tokens costs as much as
        one of many. Raises RequestError when the budget does not hold one cell.
        """
        touching = [job for job in jobs if job.first < self.stop]
        touching.sort(key=lambda job: (job.splits_heads, -job.first, job.start, job.index))
        group: Group | None = None
        for job in touching:
            if group is None or not self._joins(group, job):
                if group is not None:
                    yield self._ordered(group)
                group = Group(job.first, job.splits_heads)
            group.jobs.append(job)
            group.first = min(group.first, job.first)
            group.explicit |= self._explicit(job)
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
        return len(group.jobs) < self.cells_at_once(job.first, group.explicit or self._explicit(job))

    def _explicit(self, job: Job) -> bool:
        if self.model.config.attention_softcap is not None or self.model.config.attention_sinks:
            return True
        return job.hooks is not None or not job.paths.isdisjoint(PATTERNS)

    def cells_at_once(self, first: int, explicit: bool) -> int:
        """How many cells of a first column run together. Raises RequestError when not even one fits."""
        config, element = self.model.config, self.model.embed.weight.element_size()
        columns = self.stop - first
        kept = (
            config.n_layers + 1
        ) * config.d_model + 2 * config.n_layers * config.n_kv_heads * config.d_head
        read = self.length if self.columns is None else self.columns.shape[1]
        fixed = self.rows * (self.length * kept + read * config.d_vocab) * element
        # logits and the softmax of a metric, of one cell at a time
        fixed += 3 * self.rows * read * config.d_vocab * 4
        one = self.rows * row_bytes(config, columns, self.length, element, explicit=explicit)
        if fixed + one > self.memory_budget:
            raise RequestError(
                f"a memory budget of {self.memory_budget:,} bytes is too small: the clean run takes {fixed:,} and one cell "
                f"{one:,}; raise memory_budget, take fewer rows at once, or read fewer columns (logits_at)"
            )
        return int(min((self.memory_budget - fixed) // one, max(1, TOKENS_AT_ONCE // (columns * self.rows))))

    def run(self, group: Group) -> dict[int, dict[str, Tensor]]:
        """Metrics of each job of a group, by the job's index."""
        clean, n_layers = self.start(), self.model.config.n_layers
        first, active, waiting = group.first, list[Job](), list(group.jobs)
        x: Tensor | None = None
        for layer in range(n_layers):
            joining = [job for job in waiting if job.start <= layer]
            if joining:
                waiting = waiting[len(joining) :]
                narrow = [job for job in joining if job.start >= 0 and job.last + 1 < self.stop]
                wide = [job for job in joining if job not in narrow]
            else:
                narrow, wide = [], []
            if layer == 0:
                stream: Tensor | None = self._tokens(first, len(wide)) if wide else None
            else:
                stream = self._joined(x, clean.stream[layer][:, first : self.stop], len(wide))
            active += wide
            x = self._block(layer, stream, active, first, self.stop) if stream is not None else None
            if narrow:
                x = self._narrow_entry(layer, narrow, x, first)
                active += narrow
        x = self._joined(x, clean.stream[n_layers][:, first : self.stop], len(waiting))
        return self._read(x, active + waiting, first)

    def _tokens(self, first: int, cells: int) -> Tensor:
        return self.tokens[:, first : self.stop].repeat(cells, 1)

    def _joined(self, x: Tensor | None, clean: Tensor, cells: int) -> Tensor | None:
        """The rows so far, and the clean stream for each cell that joins."""
        if not cells:
            return x
        fresh = clean.expand(cells, *clean.shape).reshape(cells * self.rows, *clean.shape[1:]).clone()
        return fresh if x is None else torch.cat((x, fresh))

    def _block(self, layer: int, x: Tensor, jobs: list[Job], first: int, stop: int) -> Tensor:
        """One block over some columns of the rows of some jobs."""
        assert self.clean is not None, "the clean run comes first"
        hooks = self._hooks(jobs, layer, first)
        cache = self.clean.prefix(first, len(jobs))
        out: Tensor = self.model(
            x,
            hooks=hooks,
            pad=self._pad(len(jobs)),
            kv_cache=cache,
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            run=self._run(len(jobs), first, stop),
        )
        return out

    def _narrow_entry(self, layer: int, jobs: list[Job], x: Tensor | None, first: int) -> Tensor:
        """Jobs whose first block changes only some columns: run on those, the rest is the clean stream."""
        assert self.clean is not None, "the clean run comes first"
        last = max(job.last for job in jobs) + 1
        if layer == 0:
            entering = self.tokens[:, first:last].repeat(len(jobs), 1)
        else:
            joined = self._joined(None, self.clean.stream[layer][:, first:last], len(jobs))
            assert joined is not None, "there are jobs"
            entering = joined
        changed = self._block(layer, entering, jobs, first, last)
        whole = self._joined(x, self.clean.stream[layer + 1][:, first : self.stop], len(jobs))
        assert whole is not None, "there are jobs"
        whole[-len(jobs) * self.rows :, : last - first] = changed
        return whole

    def _run(self, cells: int, first: int, stop: int) -> Run:
        """What hooks are told: the columns of this pass within the whole prompt."""
        tokens = self.tokens[:, first:stop].repeat(cells, 1)
        pad = self._pad(cells)
        prompt: int | None = self.length if pad is None else None
        return Run(tokens.shape[0], stop - first, tokens, pad, first, prompt, config=self.model.config)

    def _pad(self, cells: int) -> Tensor | None:
        return None if self.pad is None else self.pad.repeat(cells, 1)

    def _hooks(self, jobs: list[Job], layer: int, first: int) -> TransformerHooks | None:
        """One tree for all rows of a pass: parts that do the same thing in different places share one hook."""
        at_layer = (layer, -1) if layer == 0 else (layer,)
        shared: dict[tuple[Any, ...], list[tuple[int, Part]]] = {}
        tree = TransformerHooks()
        used = False
        for cell, job in enumerate(jobs):
            orders: dict[str, int] = {}
            for part in job.parts:
                if part.layers.isdisjoint(at_layer):
                    continue
                order = orders[part.path] = orders.get(part.path, -1) + 1
                what = part.intervention
                same = id(part) if what.depends_on_place() else tuple(map(id, place_free(what)))
                shared.setdefault((order, part.path, type(what), same), []).append((cell, part))
            if job.hooks is not None:
                used |= self._add_users_hooks(tree, job.hooks, layer, cell)
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

    def _read(self, x: Tensor | None, jobs: list[Job], first: int) -> dict[int, dict[str, Tensor]]:
        """Metrics of each job, a few at a time: logits are the widest tensors of all."""
        assert x is not None, "a group has jobs"
        read = self.stop - first if self.columns is None else self.columns.shape[1]
        plain = all(self.model.config.n_layers not in part.layers for job in jobs for part in job.parts)
        most = max(1, int(self.memory_budget / 8 // (4 * self.rows * read * self.model.config.d_vocab)))
        results: dict[int, dict[str, Tensor]] = {}
        for begin in range(0, len(jobs), most):
            some = jobs[begin : begin + most]
            part = x[begin * self.rows : (begin + len(some)) * self.rows]
            logits = self._logits(part, some, first, plain and all(job.hooks is None for job in some))
            for cell, job in enumerate(some):
                results[job.index] = self._measured(logits[cell * self.rows : (cell + 1) * self.rows])
        return results

    def _logits(self, x: Tensor, jobs: list[Job], first: int, plain: bool) -> Tensor:
        """Logits at the columns read, [cells · rows, columns, d_vocab]; columns before the first from the clean run."""
        assert self.clean is not None, "the clean run comes first"
        n_layers, cells = self.model.config.n_layers, len(jobs)
        hooks = None if plain else self._hooks(jobs, n_layers, first)
        fresh: Tensor
        columns = self.columns
        if columns is None:
            columns = torch.arange(self.length, device=x.device).expand(self.rows, -1)
        wanted = columns - first
        run = self._run(cells, first, self.stop)
        alike = bool((wanted == wanted[:1]).all())
        if hooks is not None:  # hooks behind the blocks see every column of the pass
            logits = self.model(x, hooks=hooks, start_at_layer=n_layers, run=run)
            local = wanted.clamp_min(0).repeat(cells, 1)[:, :, None].expand(-1, -1, logits.shape[-1])
            fresh = logits.gather(1, local)
        elif alike:
            new = wanted[0][wanted[0] >= 0]
            fresh = self.model(x, start_at_layer=n_layers, run=run, logits_at=new.expand(x.shape[0], -1))
            if new.numel() == wanted.shape[1]:
                return fresh
            whole = self.clean.logits.repeat(cells, 1, 1)
            whole[:, wanted[0] >= 0] = fresh
            return whole
        else:
            fresh = self.model(
                x, start_at_layer=n_layers, run=run, logits_at=wanted.clamp_min(0).repeat(cells, 1)
            )
        if bool((wanted >= 0).all()):
            return fresh
        return torch.where(
            (wanted >= 0).repeat(cells, 1)[:, :, None], fresh, self.clean.logits.repeat(cells, 1, 1)
        )

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
