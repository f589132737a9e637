"""Patching in three passes, base, clean and patched, and sweeps of requests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from neuron_lens.analysis.comparison import kl_by_row, pair_differences
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.compile import compiled
from neuron_lens.faces.hooked_model.dataset import BatchSaver, add_own, require_batches, split_batch
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.fields import named_place
from neuron_lens.faces.hooked_model.positions import hashable, resolve_positions
from neuron_lens.faces.hooked_model.queries import indices_of, patches, query_group, query_rows
from neuron_lens.faces.hooked_model.requests import Intervention
from neuron_lens.interventions import Grid, Metric, OfLogits, SweepResult, sweep

if TYPE_CHECKING:
    from neuron_lens.faces.hooked_model.model import HookedModel

__all__ = ["compute_patching", "sweep_requests"]

Query = Any  # dict, list of dicts or data frame


def compute_patching(
    model: HookedModel,
    target_token_positions: Sequence[Any],
    base_dataloader: Iterable[Any],
    target_dataloader: Iterable[Any],
    patching_query: Query,
    base_dictonary_idxs: Sequence[Any] | None = None,
    target_dictonary_idxs: Sequence[Any] | None = None,
    return_logit_diff: bool = False,
    batch_saver: BatchSaver | None = None,
    *,
    each: Literal["layer"] | None = None,
    extraction_config: ExtractionConfig | None = None,
    progress: bool = False,
    **options: Any,
) -> ActivationCache:
    """Write activations of base prompts into target prompts, and measure how far the output goes over to base.

    For each pair of batches: base is run and its activations kept; target is run clean; target is run with base's activations
    at the queried positions of all queried layers together.

    Args:
        target_token_positions: groups whose logits are compared.
        base_dataloader, target_dataloader: as many batches, of as many rows.
        patching_query: as `queries.patches` takes it, without patching_activations.
        base_dictonary_idxs, target_dictonary_idxs: for each batch, token ids: a list, whose pairs hold for all rows, or a tensor
            [batch, pairs]. The logit difference is that of the target's id minus the base's.
        return_logit_diff: needs both of them.
        batch_saver: takes a target batch's own entries and returns what to keep.
        each: "layer" also measures every layer and every query's position alone, by the sweep engine.
        extraction_config: what to keep of the patched pass.
        options: further options of `forward`, for all passes.

    Returns:
        What the patched pass extracted, and by row: `base_logits`, `target_clean_logits`,
            `target_patched_logits` [batch, P, d_vocab];
        `kl_clean|base` = KL(base ‖ clean), `kl_patched|base`, `kl_patched|clean` = KL(clean ‖ patched),
        `kl_difference` = patched|base − clean|base, each [batch], in nats, the mean over the positions; with
        return_logit_diff `logit_diff_in_clean`, `logit_diff_in_patched` and `logit_diff_variation`, each
        [batch, pairs]. Their means over rows are the usual scalars. With each="layer" also
        `sweep_kl_patched|base` (and `sweep_logit_diff_in_patched`, the mean over pairs) [batch, layers, queries].

    Raises:
        RequestError: dataloaders of different length, rows that do not pair up, a query that does not fit.
    """
    queries = query_rows(patching_query, "patching_query")
    if each not in (None, "layer"):
        raise RequestError(f"each must be None or 'layer'; got {each!r}")
    if return_logit_diff and (base_dictonary_idxs is None or target_dictonary_idxs is None):
        raise RequestError(
            "return_logit_diff compares tokens: give base_dictonary_idxs and target_dictonary_idxs"
        )
    if options.get("ragged"):
        raise RequestError("patching pairs positions of base and target: rows cannot be ragged")
    for name, loader in (("base_dataloader", base_dataloader), ("target_dataloader", target_dataloader)):
        require_batches(name, loader)
    caches = []
    batches = zip(_numbered(base_dataloader), _numbered(target_dataloader), strict=False)
    for number, (base, target) in enumerate(tqdm(batches, disable=not progress, unit="batch")):
        if base is None and target is None:
            break
        if base is None or target is None:
            which = "target" if base is None else "base"
            raise RequestError(
                f"the {which} dataloader has more than {number} batches and the other has not: they must pair up"
            )
        pairs = None
        if return_logit_diff:
            d_vocab = model.model.config.d_vocab
            pairs = _pairs(number, base_dictonary_idxs or (), target_dictonary_idxs or (), d_vocab)
        one = _PatchedPair(model, list(target_token_positions), queries, base, target, options, number)
        caches.append(one.run(extraction_config or ExtractionConfig(), pairs, each, batch_saver))
    if not caches:
        raise RequestError("the dataloaders are empty: there is nothing to patch")
    return ActivationCache.join(caches).add_metadata(model_name=model.config.model_name)


class _PatchedPair:
    """The three passes of one pair of batches."""

    def __init__(
        self,
        model: HookedModel,
        positions: list[Any],
        queries: list[dict[str, Any]],
        base: Any,
        target: Any,
        options: dict[str, Any],
        number: int,
    ) -> None:
        self.model, self.positions, self.queries, self.number = model, positions, queries, number
        self.base, base_options, _ = split_batch(base)
        self.target, target_options, self.own = split_batch(target)
        self.base_options = {**options, **base_options}
        self.target_options = {**options, **target_options}

    def run(
        self,
        config: ExtractionConfig,
        pairs: tuple[Tensor, Tensor] | None,
        each: str | None,
        batch_saver: BatchSaver | None,
    ) -> ActivationCache:
        base = self._base_pass()
        logits_only = ExtractionConfig()
        clean = self.model.forward(
            self.target, self.positions, extraction_config=logits_only, **self.target_options
        )
        interventions = patches(self.queries, self.model.model, base)
        options = {**self.target_options}
        options["interventions"] = [*(options.pop("interventions", None) or []), *interventions]
        config = config.model_copy(update={"save_logits": True})
        patched = self.model.forward(self.target, self.positions, extraction_config=config, **options)
        count = clean["logits"].shape[1]
        logits = {"base": base["logits"][:, :count], "clean": clean["logits"], "patched": patched["logits"]}
        self._check(logits)
        result = patched
        del result["logits"]
        result.update(_comparisons(logits, pairs))
        if each is not None:
            result.update(self._swept(base, logits, pairs))
        if batch_saver is not None:
            add_own(result, batch_saver(dict(self.own)), self.number)
        return result

    def _base_pass(self) -> ActivationCache:
        """Base's logits and the queried activations, at the target positions and then at those of the queries."""
        wanted: dict[str, Any] = {}
        layers: set[int] = set()
        groups = [hashable(_plain(group)) for group in self.positions]
        positions = [_plain(group) for group in self.positions]
        for number, query in enumerate(self.queries):
            where = f"patching query {number}"
            kind = query.get("activation_type")
            if not isinstance(kind, str) or "{}" not in kind:
                patches([query], self.model.model, ActivationCache())  # says what is wrong
                continue
            wanted[named_place(kind.replace("{}", "0")).name] = True
            asked = query.get("layers_to_patch", query.get("layer"))
            layers.update(indices_of(where, "layers_to_patch", asked, self.model.model.config.n_layers))
            group = query_group(where, query.get("patching_elem", query.get("pos_token_to_patch")))
            if hashable(group) not in groups:
                groups.append(hashable(group))
                positions.append(group)
        config = ExtractionConfig(**wanted, layers=tuple(sorted(layers)))
        options = {key: value for key, value in self.base_options.items() if key != "interventions"}
        return self.model.forward(self.base, positions, extraction_config=config, **options)

    def _check(self, logits: Mapping[str, Tensor]) -> None:
        if logits["base"].shape != logits["clean"].shape:
            raise RequestError(
                f"batch {self.number}: base has {list(logits['base'].shape[:2])} rows and positions, target "
                f"{list(logits['clean'].shape[:2])}; they must pair up"
            )

    def _swept(
        self, base: ActivationCache, logits: Mapping[str, Tensor], pairs: tuple[Tensor, Tensor] | None
    ) -> dict[str, Tensor]:
        """Every layer and query alone, on the sweep engine."""
        sizes = self.model.model.config
        asked = [
            indices_of(
                f"patching query {i}",
                "layers_to_patch",
                q.get("layers_to_patch", q.get("layer")),
                sizes.n_layers,
            )
            for i, q in enumerate(self.queries)
        ]
        if any(layers != asked[0] for layers in asked):
            raise RequestError(
                "each='layer' lays layers and queries out as a table: ask for the same layers in all queries"
            )
        cells = []
        for layer in asked[0]:
            for query in self.queries:
                rest = {k: v for k, v in query.items() if k not in ("layers_to_patch", "layer")}
                cells.append(patches([{**rest, "layers_to_patch": layer}], self.model.model, base))

        def divergence(patched: Tensor) -> Tensor:
            return kl_by_row(logits["base"], patched)

        metrics: dict[str, Any] = {"kl_patched|base": divergence}
        if pairs is not None:
            known = pairs
            metrics["logit_diff_in_patched"] = lambda patched: pair_differences(
                patched, known[1], known[0]
            ).mean(-1)
        axes = {"layer": tuple(asked[0]), "query": tuple(range(len(self.queries)))}
        options = {
            k: v for k, v in self.target_options.items() if k in ("pivot_positions", "split_positions")
        }
        result = sweep_requests(
            self.model, self.target, cells, metrics, axes=axes, metric_positions=self.positions, **options
        )
        return {f"sweep_{name}": result.per_example(name).movedim(-1, 0) for name in metrics}


def sweep_requests(
    model: HookedModel,
    inputs: Any,
    cells: Iterable[Any],
    metric: Any,
    *,
    axes: Mapping[str, Sequence[Any]] | None = None,
    metric_positions: Sequence[Any] | None = None,
    pivot_positions: Sequence[Any] | None = None,
    split_positions: Sequence[Any] | None = None,
    **options: Any,
) -> SweepResult:
    """One metric of many requests, each cell alone, with shared work done once: a table and a heatmap.

    Args:
        cells: each an `Intervention`, or several that act together.
        metric: a metric of `neuron_lens.interventions` (`LogitDifference`), or a function of logits [batch,
            columns, d_vocab] that returns one number a row; or several by name.
        axes: names and labels of a table whose entries the cells are, the last axis fastest; None numbers them.
        metric_positions: groups whose logits plain functions are given; None gives all columns.
        options: those of `neuron_lens.interventions.sweep`.

    Raises:
        RequestError: cells that do not fit the model, the prompts or the axes.
    """
    batch = model._batch(inputs, pivot_positions, split_positions)
    made = []
    for cell in cells:
        requests = [cell] if isinstance(cell, Intervention) or not isinstance(cell, Iterable) else list(cell)
        made.append(tuple(compiled(requests, model.model, batch)))
    if not made:
        raise RequestError("a sweep needs at least one cell")
    named = (
        {"cell": tuple(range(len(made)))} if axes is None else {name: tuple(v) for name, v in axes.items()}
    )
    size = torch.Size(len(labels) for labels in named.values()).numel()
    if size != len(made):
        raise RequestError(f"the axes have {size} entries, and there are {len(made)} cells")
    if metric_positions is not None:
        where = resolve_positions(
            [_plain(g) for g in metric_positions], batch.tokens, batch.pad, **batch.options()
        )
        given = metric if isinstance(metric, Mapping) else {"metric": metric}
        metric = {
            name: one if isinstance(one, Metric) else OfLogits(one, where.columns, name=name)
            for name, one in given.items()
        }
    return sweep(model.model, batch.tokens, Grid(named, tuple(made)), metric, pad=batch.pad, **options)


def _numbered(dataloader: Iterable[Any]) -> Iterable[Any]:
    """The batches, and None once they are over: so that a longer partner is seen."""
    yield from dataloader
    yield None


def _plain(group: Any) -> Any:
    return group.removeprefix("@") if isinstance(group, str) else group


def _pairs(number: int, base: Sequence[Any], target: Sequence[Any], d_vocab: int) -> tuple[Tensor, Tensor]:
    """Token ids of one batch: base's and target's, as many of each."""
    if number >= min(len(base), len(target)):
        raise RequestError(
            f"batch {number}: base_dictonary_idxs and target_dictonary_idxs have no entry for it"
        )
    try:
        ids = torch.stack([torch.as_tensor(entry) for entry in (base[number], target[number])])
    except (TypeError, ValueError, RuntimeError):
        ids = torch.empty(0)
    if ids.dim() not in (2, 3) or ids.is_floating_point() or not bool(((ids >= 0) & (ids < d_vocab)).all()):
        raise RequestError(
            f"batch {number}: base_dictonary_idxs and target_dictonary_idxs are as many token ids of each, below {d_vocab}; got "
            f"{base[number]!r:.80} and {target[number]!r:.80}"
        )
    return ids[0], ids[1]


def _comparisons(logits: Mapping[str, Tensor], pairs: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    clean_base = kl_by_row(logits["base"], logits["clean"])
    patched_base = kl_by_row(logits["base"], logits["patched"])
    compared = {
        "base_logits": logits["base"],
        "target_clean_logits": logits["clean"],
        "target_patched_logits": logits["patched"],
        "kl_clean|base": clean_base,
        "kl_patched|base": patched_base,
        "kl_patched|clean": kl_by_row(logits["clean"], logits["patched"]),
        "kl_difference": patched_base - clean_base,
    }
    if pairs is not None:
        clean = pair_differences(logits["clean"], pairs[1], pairs[0])
        patched = pair_differences(logits["patched"], pairs[1], pairs[0])
        compared |= {
            "logit_diff_in_clean": clean,
            "logit_diff_in_patched": patched,
            "logit_diff_variation": patched - clean,
        }
    return compared
