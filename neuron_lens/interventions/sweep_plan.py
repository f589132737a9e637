"""The plan of a sweep: what each cell touches first, and which cells run together.

A cell changes nothing below the first layer it touches, nor (in a causal model) before the first position it touches:
what stands there is taken from one clean run. Cells of one first position share a pass, in which rows join at their
first layer, so that no row is run where it is still clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from neuron_lens.errors import HookError, RequestError
from neuron_lens.hooks import Run, TransformerHooks
from neuron_lens.interventions.apply import to_hooks, with_located_text
from neuron_lens.interventions.declared import Intervention, site_named
from neuron_lens.interventions.grid import Cell, Grid
from neuron_lens.interventions.patch import Patch
from neuron_lens.interventions.places import keys_meant, position_mask
from neuron_lens.transformer import TransformerConfig

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Group", "Job", "Part", "jobs_of", "row_bytes", "takes_from_elsewhere"]

# Sites behind the mixing of positions in a block: an edit at position p leaves the other positions of that
# block's output as they were.
AFTER_MIXING = frozenset(
    ["attn.q", "attn.rot_q", "attn.q_in", "attn.qk_logits", "attn.qk_probs", "attn.qk_softmax_denominator"]
    + ["attn.v_out", "attn.result", "mlp.pre_act", "mlp.pre_linear", "mlp.post_act", "mlp.router_logits"]
    + ["mlp.router_probs", "mlp.expert_indices", "mlp.expert_weights"]
    + [
        f"resid.torso.{site}"
        for site in ("delta_attn", "post_attn", "mlp_in", "post_ln_mlp", "delta_mlp", "post_mlp")
    ]
    + [
        f"resid.torso.{norm}.{part}"
        for norm in ("ln_attn_out", "ln_mlp", "ln_mlp_out")
        for part in ("post_mean_subtraction", "scale", "post_scale")
    ]
)
# A block gives every head an input of its own when one of these is hooked, and then has no shared norm to hook.
HEAD_INPUTS = frozenset(["resid.torso.attn_in", "attn.q_in", "attn.k_in", "attn.v_in"])
PATTERNS = frozenset(["attn.qk_logits", "attn.qk_probs", "attn.qk_softmax_denominator"])


@dataclass(frozen=True, eq=False)
class Part:
    """One intervention of a cell at one site.

    columns: the columns it selects when all rows are alike, else None; mask: then which, [rows, pos] bool.
    layers: layers it acts at; -1 stands for the embedding, n_layers for the end.
    """

    intervention: Intervention
    path: str
    layers: frozenset[int]
    columns: tuple[int, ...] | None
    mask: Tensor | None


@dataclass(eq=False)
class Job:
    """One cell, ready to run.

    start: first layer touched (-1: the embedding, n_layers: behind the blocks). first, last: first column touched, and
    last one touched at the starting layer when the edit is behind the mixing there (else the last column).
    """

    index: int
    parts: tuple[Part, ...]
    start: int
    first: int
    last: int
    hooks: TransformerHooks | None = None

    @property
    def paths(self) -> set[str]:
        """The sites this cell touches."""
        hooked = [] if self.hooks is None else self.hooks.hooked_sites()
        return {part.path for part in self.parts} | {site.path for site in hooked}

    @property
    def opened(self) -> frozenset[str]:
        """The wide tensors that only a hooked site makes: "pattern", "result", "head_inputs"."""
        wide = {"pattern": PATTERNS, "result": {"attn.result"}, "head_inputs": HEAD_INPUTS}
        paths = self.paths | (PATTERNS if self.hooks is not None else set())
        return frozenset(name for name, sites in wide.items() if not paths.isdisjoint(sites))

    @property
    def splits_heads(self) -> bool:
        """Whether it makes blocks give every head an input of its own: such cells share no pass with others."""
        return not self.paths.isdisjoint(HEAD_INPUTS)


@dataclass(eq=False)
class Group:
    """Jobs that share a pass over the columns from `first` on, in order of their first layer.

    opened: as in `Job`, of any of them. splits_heads: as in `Job`, the same for all.
    """

    first: int
    splits_heads: bool
    opened: frozenset[str] = frozenset()
    jobs: list[Job] = field(default_factory=list)


def jobs_of(
    given: Grid,
    model: Transformer,
    tokens: Tensor,
    pad: Tensor | None,
    stop: int,
    autoencoders: Mapping[str, Any] | None,
) -> list[Job]:
    """All cells checked and placed, before any work starts.

    stop: one past the last column any metric reads; what is touched behind it has no effect.

    Raises RequestError naming the cell when one touches nothing, or does not fit the model or the tokens.
    """
    reader = _Reader(model, tokens, pad, stop, autoencoders)
    jobs = []
    for index, cell in enumerate(given.cells):
        try:
            jobs.append(reader.job(index, cell))
        except (RequestError, HookError) as error:
            where = ", ".join(f"{name} {label}" for name, label in given.labels_of(index).items())
            raise RequestError(f"cell {where}: {error}") from None
    return jobs


class _Reader:
    """Turns cells into jobs; remembers what many cells have in common."""

    def __init__(
        self,
        model: Transformer,
        tokens: Tensor,
        pad: Tensor | None,
        stop: int,
        autoencoders: Mapping[str, Any] | None,
    ) -> None:
        self.model, self.tokens, self.pad, self.stop, self.autoencoders = (
            model,
            tokens,
            pad,
            stop,
            autoencoders,
        )
        self.config: TransformerConfig = model.config
        self.absent = self.config.absent_sites()
        self.rows, self.length = tokens.shape[:2]
        self._checked: set[tuple[Any, ...]] = set()

    def job(self, index: int, cell: Cell) -> Job:
        if isinstance(cell, TransformerHooks):
            return self._hooks_job(index, cell)
        if takes_from_elsewhere(cell):  # what it takes must be kept on the way, so it runs as hooks do
            for intervention in cell:
                self._parts(intervention)  # checks it
            hooks = to_hooks(
                cell, self.model, tokens=self.tokens, pad=self.pad, autoencoders=self.autoencoders
            )
            return self._hooks_job(index, hooks)
        parts: list[Part] = []
        for intervention in cell:
            parts += self._parts(intervention)
        parts = [part for part in parts if part.columns != () and part.layers]
        if not parts:  # everything lies behind the last column that is read
            return Job(index, (), self.config.n_layers, self.length, self.length)
        start = min(min(part.layers) for part in parts)
        first = min(self._first(part) for part in parts)
        if any(part.path in ("emb.tok", "emb.pos") for part in parts):
            start = -1
        return Job(index, tuple(parts), start, first, self._last(parts, start))

    def _parts(self, intervention: Intervention) -> list[Part]:
        self._check_once(intervention)
        intervention = with_located_text(intervention, self.tokens, self.pad, self.model)
        columns, mask = self._columns(intervention)
        parts = []
        for path in intervention.sites():
            if path in self.absent and path != intervention.site:
                continue
            layers = self._layers(intervention, path)
            parts.append(Part(intervention, path, layers, columns, mask))
        return parts

    def _check_once(self, intervention: Intervention) -> None:
        """The check against the model, once for all cells that say the same but for indices, which are cheap."""
        config = self.config
        place = (intervention.layers, intervention.heads, intervention.units, intervention.positions)
        key = (type(intervention), place, *(id(value) for value in place_free(intervention)))
        if key not in self._checked:
            intervention.check(config)
            self._checked.add(key)
        rows = [row for row in intervention.rows or () if row >= self.rows]
        if rows:
            raise RequestError(f"row {rows[0]} does not exist: the batch has {self.rows}")
        if intervention.keys is not None:
            whole = Run(self.rows, self.length, pad=self.pad)
            at = whole.positions(self.tokens.device)
            found = keys_meant(intervention.keys, at, whole.ends(at.device))[
                list(intervention.rows or range(self.rows))
            ]
            missing = ~found.any(-1).any(0)
            if bool(missing.any()):
                absent = intervention.keys[int(missing.nonzero()[0])]
                raise RequestError(
                    f"key {absent} is in none of the prompts, whose longest has {self.length} tokens"
                )
        named = intervention.autoencoder if hasattr(intervention, "autoencoder") else None
        if named is not None and named not in (self.autoencoders or {}):
            raise RequestError(f"no autoencoder is called {named!r}; pass autoencoders={{{named!r}: …}}")
        if intervention.steps is not None:
            raise RequestError("a sweep reads prompts only: leave steps out")

    def _columns(self, intervention: Intervention) -> tuple[tuple[int, ...] | None, Tensor | None]:
        """The columns an intervention selects, either alike for all rows or as a mask."""
        spec = intervention.positions
        if spec is None and self.pad is None:
            return tuple(range(self.stop)), None
        if self.pad is None and isinstance(spec, tuple):
            columns = [p + self.length if p < 0 else p for p in spec]
            wrong = [p for p, column in zip(spec, columns, strict=True) if not 0 <= column < self.length]
            if wrong:
                raise RequestError(
                    f"position {wrong[0]} is beyond the prompts, which have {self.length} tokens"
                )
            return tuple(sorted({column for column in columns if column < self.stop})), None
        run = Run(self.rows, self.length, pad=self.pad)
        mask = position_mask(spec, None, run, self.tokens.device)
        rows = range(self.rows) if intervention.rows is None else intervention.rows
        without = [row for row in rows if not bool(mask[row].any())]
        if without:
            raise RequestError(f"row {without[0]} has none of the positions {spec}")
        mask = mask.clone()
        mask[:, self.stop :] = False
        return (None, mask) if bool(mask.any()) else ((), None)

    def _layers(self, intervention: Intervention, path: str) -> frozenset[int]:
        if site_named(path).per_layer:
            return frozenset(
                layer for layer in intervention.layers_in(self.config, path) if layer is not None
            )
        return frozenset(
            [-1 if path.startswith("emb.") or path == "resid.post_emb" else self.config.n_layers]
        )

    def _first(self, part: Part) -> int:
        back = part.intervention.looks_back_to(self.length)
        if back is not None and self.pad is not None:
            return 0  # where the position looked back to stands is another column in each row
        first = _columns_of(part)[0]
        return first if back is None else min(first, back)

    def _last(self, parts: Sequence[Part], start: int) -> int:
        """Last column that differs after the starting layer."""
        here = [part for part in parts if start in part.layers]
        back = [part.intervention.looks_back_to(self.length) for part in here]
        if any(part.path not in AFTER_MIXING for part in here) or (self.pad is not None and any(back)):
            return self.stop - 1
        return max(
            [_columns_of(part)[1] for part in here] + [0 if column is None else column for column in back]
        )

    def _hooks_job(self, index: int, hooks: TransformerHooks) -> Job:
        """A cell of the user's own hooks: nothing is known of its positions."""
        n_layers = self.config.n_layers
        sites = hooks.hooked_sites()
        if not sites:
            raise RequestError("the hooks of this cell are empty: it touches nothing")
        self.model._checked_hooks(hooks)
        if any(len(site.bwd) for site in sites):
            raise RequestError("gradient hooks do nothing in a sweep, which runs forward only; take them out")
        starts = []
        for site in sites:
            if not site.per_layer:
                starts.append(
                    -1 if site.path.startswith("emb.") or site.path == "resid.post_emb" else n_layers
                )
                continue
            starts += [layer for layer in range(n_layers) if site.acts_at(layer)][:1]
        if not starts:
            raise RequestError("the hooks of this cell act at no layer: it touches nothing")
        return Job(index, (), min(starts), 0, self.length - 1, hooks)


def takes_from_elsewhere(cell: Cell) -> bool:
    """Whether a patch of a cell takes from another site or layer of the same run."""
    if isinstance(cell, TransformerHooks):
        return False
    return any(isinstance(one, Patch) and one.reads_elsewhere() for one in cell)


def _columns_of(part: Part) -> tuple[int, int]:
    """The first and the last column a part selects in any row."""
    if part.columns is not None:
        return part.columns[0], part.columns[-1]
    assert part.mask is not None, "a part has columns or a mask"
    selected = part.mask.any(0).nonzero()[:, 0]
    return int(selected[0]), int(selected[-1])


def place_free(intervention: Intervention) -> list[Any]:
    """The values of the fields that say what is done, not where."""
    names = type(intervention).model_fields
    return [getattr(intervention, name) for name in names if name not in PLACE_FIELDS]


PLACE_FIELDS = frozenset(["layers", "positions", "heads", "keys", "units", "rows", "steps"])


def row_bytes(
    config: TransformerConfig, columns: int, keys: int, element: int, opened: frozenset[str]
) -> int:
    """Memory one row of a pass takes at its peak, in bytes: activations of one block, its keys and values, the stream.

    opened: as in `Job`: those tensors, and the copies an edit of them makes.
    """
    heads = config.n_heads * config.d_head
    width = (
        10 * config.d_model
        + 6 * heads
        + (4 if config.mlp == "gated" else 3) * max(config.d_mlp, config.d_model)
    )
    per_row = columns * width + 4 * keys * config.n_kv_heads * config.d_head
    if "pattern" in opened or config.attention_softcap is not None or config.attention_sinks:
        per_row += 6 * columns * keys * config.n_heads
    per_head_stream = columns * config.n_heads * config.d_model
    per_row += (5 if "result" in opened else 0) * per_head_stream
    per_row += (8 if "head_inputs" in opened else 0) * per_head_stream
    return per_row * element
