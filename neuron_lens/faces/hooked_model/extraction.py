"""One forward's recorders: sites are sliced to the requested positions as they pass, and named when the pass is over.

The one rule of recording: what is kept is what leaves the site, after every intervention and user hook at it, whether given for
the call or registered before. It is what the rest of the model reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neuron_lens.analysis.position_groups import group_means, stream_moments
from neuron_lens.errors import RequestError
from neuron_lens.faces.hooked_model.derived import (
    block_reduction,
    projected,
    projected_gradient,
    weighted,
    weighted_gradient,
)
from neuron_lens.faces.hooked_model.extraction_config import ExtractionConfig
from neuron_lens.faces.hooked_model.fields import FIELDS, Field
from neuron_lens.faces.hooked_model.positions import ResolvedPositions
from neuron_lens.hooks import AtLayers, Run, TransformerHooks

if TYPE_CHECKING:
    from neuron_lens.transformer import Transformer

__all__ = ["Extraction"]

SitePlace = tuple[str, int | None]
LAST_STREAM = "resid.torso.post_mlp"


class Extraction:
    """What one forward is to keep.

    Args:
        model: the model that will run.
        config: what to keep.
        where: the selected positions. rows: those of the query rows of patterns; None for the same.
        ragged: rows may differ in their number of positions; every value is then a list with one tensor a row.
        to_cpu: move what is kept.

    Raises:
        RequestError: a field whose site this model does not have, a layer or head that does not exist, rows of different
            length without `ragged`.
    """

    def __init__(
        self,
        model: Transformer,
        config: ExtractionConfig,
        where: ResolvedPositions,
        rows: ResolvedPositions | None = None,
        *,
        ragged: bool = False,
        to_cpu: bool = False,
    ) -> None:
        self.model, self.config, self.where, self.to_cpu = model, config, where, to_cpu
        self.ragged = ragged and not config.avg_over_example
        self.rows = where if rows is None else rows
        if not self.ragged and not config.avg:
            where.require_rectangular()
            self.rows.require_rectangular()
        self._check()
        self.heads = self._heads()
        self.live: dict[SitePlace, Tensor] = {}
        self.kept: dict[SitePlace, Tensor] = {}
        self.gradients: dict[SitePlace, Tensor] = {}
        self.results_hooked = False

    def attach(self, hooks: TransformerHooks) -> None:
        """Append recorders behind everything that is in the tree."""
        self.results_hooked = hooks.attn.result.has_any()
        for path, layers in self._sites().items():
            recorder: Any = _Recorder(self, path)
            if layers is not None:
                recorder = AtLayers(sorted(layers)).append(recorder)
            hooks.append_to_path(f"{path}.fwd2", recorder)
        if self.config.keep_gradient:
            hooks.append_to_path("resid.post_emb.fwd", lambda x: x.detach().requires_grad_())

    def last_layer(self) -> int:
        """The deepest layer something is kept at, -1 for none."""
        layers = [max(layers) for layers in self._sites().values() if layers]
        return max(layers, default=-1)

    def keep(self, path: str, layer: int | None, x: Tensor) -> None:
        """Called by the recorders."""
        if self.config.keep_gradient:
            self.live[path, layer] = x
        self.kept[path, layer] = self._selected(path, layer, x.detach())

    def differentiate(self, target: Tensor) -> None:
        """Keep the derivative of a scalar with respect to everything kept; zero where nothing flows."""
        gradients = torch.autograd.grad(target, list(self.live.values()), allow_unused=True)
        for place, gradient in zip(self.live, gradients, strict=True):
            x = self.live[place]
            self.gradients[place] = self._selected(
                *place, torch.zeros_like(x) if gradient is None else gradient
            )
        self.live.clear()

    def values(self) -> dict[str, Any]:
        """What was kept, by key. It is handed over, and no longer held here."""
        named = dict(self._named())
        if self.config.keep_gradient:
            named |= {f"{key}_gradients": value for key, value in self._named(gradients=True)}
        if self.config.avg_over_example:
            named = {f"avg_{key}": value.mean(0, keepdim=True) for key, value in named.items()}
            named["n_examples"] = self.where.columns.shape[0]
        if self.config.extract_last_layernorm:
            stream = self.kept[LAST_STREAM, self.model.config.n_layers - 1]
            named["last_layernorm"] = {
                name: self.shaped(value) for name, value in stream_moments(stream).items()
            }
        # hooks may live until the next collection of reference cycles; what they kept must not
        self.kept.clear()
        self.gradients.clear()
        return named

    def shaped(self, value: Tensor) -> Any:
        """A value [batch, selected, ...] as it is stored: averaged over groups, or split by rows."""
        value = value.detach()
        if self.config.avg:
            value = group_means(value, self.where.groups, self.where.mask.to(value.device))
            return value.cpu() if self.to_cpu else value
        return self.split(value)

    def split(self, value: Tensor) -> Any:
        """A value [batch, selected, ...]; a list of one tensor a row when rows are ragged."""
        value = value.cpu() if self.to_cpu else value
        if not self.ragged:
            return value
        return [row[mask] for row, mask in zip(value, self.where.mask.to(value.device), strict=True)]

    def _named(self, *, gradients: bool = False) -> Iterator[tuple[str, Any]]:
        """Keys and values of all fields; or keys and the gradients of the values."""
        for name in self.config.fields():
            field = FIELDS[name]
            for layer in self._layers(field):
                yield from self._named_at(name, field, layer, gradients)

    def _named_at(
        self, name: str, field: Field, layer: int | None, gradients: bool
    ) -> Iterator[tuple[str, Any]]:
        if field.kind == "pattern":
            yield from self._patterns(name, field, layer, gradients)
            return
        place = self._read_from(field), layer
        x = (self.gradients if gradients else self.kept)[place]
        if field.kind == "stream":
            yield field.key.format(l=layer), self.shaped(x)
            return
        if field.kind == "packed":
            yield field.key.format(l=layer), self.shaped(x.flatten(2))
            return
        assert layer is not None, "heads are in layers"
        group = self.model.config.n_heads // self.model.config.n_kv_heads
        heads = self.heads[layer]
        if field.kind == "kv_head":
            heads = sorted({head // group for head in heads})
        for head in heads:
            shared = "kv_head" in self._axes(field)
            part = x[:, :, head // group if shared and field.kind != "kv_head" else head]
            if field.kind == "projected" or (place[0] == "attn.v_out" and field.site == "attn.result"):
                part = (projected_gradient if gradients else projected)(self.model, layer, head, part)
            yield field.key.format(l=layer, h=head), self.shaped(part)

    def _patterns(
        self, name: str, field: Field, layer: int | None, gradients: bool
    ) -> Iterator[tuple[str, Any]]:
        assert layer is not None, "patterns are in layers"
        heads = self.heads[layer]
        # [batch, chosen head, query, key]
        pattern = (self.gradients if gradients else self.kept)[field.site, layer]
        if name == "extract_value_weighted_pattern":
            of_weighted = weighted_gradient if gradients else weighted
            pattern = of_weighted(self.model, layer, heads, pattern, self.kept["attn.v", layer])
        reduction = self.config.attn_pattern_avg
        if self.config.avg and reduction == "none":
            reduction = "mean"
        if reduction != "none":
            pattern = block_reduction(pattern, self.rows, self.where, reduction)
        for index, head in enumerate(heads):
            value = pattern[:, index].cpu() if self.to_cpu else pattern[:, index]
            key = field.key.format(l=layer, h=head)
            if reduction != "none" or not self.ragged:
                yield key, value
                continue
            rows, columns = self.rows.mask.to(value.device), self.where.mask.to(value.device)
            yield key, [one[q][:, k] for one, q, k in zip(value, rows, columns, strict=True)]

    def _selected(self, path: str, layer: int | None, x: Tensor) -> Tensor:
        """The selected positions of a site's tensor: [batch, selected, ...], patterns [batch, chosen head, query, key]."""
        columns = self.where.columns.to(x.device)
        batch = torch.arange(x.shape[0], device=x.device)[:, None]
        if path not in ("attn.qk_logits", "attn.qk_probs"):
            return x[batch, columns]
        assert layer is not None, "patterns are in layers"
        x, rows = x[:, self.heads[layer]], self.rows.columns.to(x.device)
        return x.movedim(1, -1)[batch[:, :, None], rows[:, :, None], columns[:, None, :]].movedim(-1, 1)

    def _sites(self) -> dict[str, set[int] | None]:
        """Paths to record at, with their layers; None outside the blocks."""
        sites: dict[str, set[int] | None] = {}

        def add(path: str, layers: list[int | None]) -> None:
            if layers == [None]:
                sites[path] = None
                return
            sites[path] = (sites.get(path) or set()) | {layer for layer in layers if layer is not None}

        for name in self.config.fields():
            field = FIELDS[name]
            add(self._read_from(field), self._layers(field))
            if name == "extract_value_weighted_pattern":
                add("attn.v", self._layers(field))
        if self.config.extract_last_layernorm:
            add(LAST_STREAM, [self.model.config.n_layers - 1])
        return {path: layers for path, layers in sites.items() if layers is None or layers}

    def _read_from(self, field: Field) -> str:
        """The site a field is made from: heads' outputs come from their z where nothing edits them, which is far smaller."""
        if field.site == "attn.result" and not self.results_hooked and not self.config.keep_gradient:
            return "attn.v_out"
        return field.site

    def _layers(self, field: Field) -> list[int | None]:
        if field.site == "resid.post_emb":
            return [None]
        chosen = range(self.model.config.n_layers) if self.config.layers is None else self.config.layers
        return [layer for layer in chosen if not field.per_head or self.heads.get(layer)]

    def _axes(self, field: Field) -> tuple[str, ...]:
        return ("kv_head",) if field.site in ("attn.k", "attn.v") else ("head",)

    def _heads(self) -> dict[int, list[int]]:
        """The query heads asked for in each layer."""
        sizes = self.model.config
        if self.config.attn_heads is None:
            return {layer: list(range(sizes.n_heads)) for layer in range(sizes.n_layers)}
        heads: dict[int, set[int]] = {}
        for layer, head in self.config.attn_heads:
            if not 0 <= layer < sizes.n_layers or (head is not None and not 0 <= head < sizes.n_heads):
                raise RequestError(
                    f"attn_heads: layer {layer}, head {head} does not exist: the model has {sizes.n_layers} layers of "
                    f"{sizes.n_heads} heads, counted from 0"
                )
            heads.setdefault(layer, set()).update(range(sizes.n_heads) if head is None else [head])
        return {layer: sorted(chosen) for layer, chosen in heads.items()}

    def _check(self) -> None:
        n_layers, absent = self.model.config.n_layers, self.model.config.absent_sites()
        wrong = [layer for layer in self.config.layers or () if not 0 <= layer < n_layers]
        if wrong:
            raise RequestError(
                f"layers: layer {wrong[0]} does not exist: the model has {n_layers}, counted from 0"
            )
        for name in self.config.fields():
            path = FIELDS[name].site
            if path in absent:
                raise RequestError(f"{name}: this model has no {path}: {absent[path]}")


class _Recorder:
    """The hook that keeps what leaves one site. In generation it keeps the prompt's pass only."""

    def __init__(self, extraction: Extraction, path: str) -> None:
        self.extraction, self.path = extraction, path

    def __call__(self, x: Tensor, run: Run, layer: int | None = None) -> None:
        if run.step in (None, 0):
            self.extraction.keep(self.path, layer, x)
